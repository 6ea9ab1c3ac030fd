"""`volumen view`: what is shown of volumes, predictions, runs and reports; the server; napari's layers."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from prediction import make_predictor
from test_file_writers import HEADS, IMAGE, PLACE, REGION, SHAPE, SPACING, run
from test_placement import write_ome

from volumen.cli.main import main
from volumen.data.formats.label_view import RegionLabel
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest
from volumen.utils.errors import VolumenError
from volumen.viewing.layers import ADDED, CONFUSED, MISSED, ErrorVolume, layer_of
from volumen.viewing.server import ViewServer
from volumen.viewing.sources import find_view

TRUTH = (IMAGE > 128).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path):
    """Return a data folder with two images, labels, and predictions in `out`."""
    for folder in ("images", "labels"):
        (tmp_path / "d" / folder).mkdir(parents=True)
    for name, image in (("a", IMAGE), ("b", IMAGE[::-1])):
        write_ome(tmp_path / "d" / "images" / f"{name}.zarr", image, SPACING, translation=PLACE)
        truth = (image > 128).astype(np.uint8) if name == "a" else np.roll(image > 128, 9, 1).astype(np.uint8)
        write_ome(tmp_path / "d" / "labels" / f"{name}_ink.zarr", truth, SPACING, translation=PLACE)
    predict(
        PredictRequest(str(tmp_path / "d"), "m", str(tmp_path / "out"), amp="off", device="cpu"),
        predictor=make_predictor(3, (8, 8, 8), HEADS),
    )
    return tmp_path


def whole(volume):
    return volume.read(tuple(slice(0, n) for n in volume.shape))


def kinds(view):
    return {layer.name: layer.content.kind for layer in view.layers}


def test_a_prediction_is_shown_with_its_image_truth_and_errors(dataset):
    view = find_view([str(dataset / "out" / "a.zarr")])
    assert kinds(view) == {
        "image": "image", "ink": "binary", "normals": "vector", "depth": "distance", "ink truth": "labels",
        "ink errors": "errors",
    }  # fmt: skip
    layers = {layer.name: layer for layer in view.layers}
    np.testing.assert_array_equal(whole(layers["image"].levels[0])[0], IMAGE)
    found = whole(open_volume(dataset / "out" / "a.zarr" / "ink"))[0] >= 127.5
    errors = whole(layers["ink errors"].levels[0])[0]
    np.testing.assert_array_equal(errors == MISSED, (TRUTH == 1) & ~found)
    np.testing.assert_array_equal(errors == ADDED, (TRUTH == 0) & found)
    assert len(layers["ink"].levels) > 1
    assert find_view([str(dataset / "out")], case="b").layers[0].levels[0].path.endswith("b.zarr/0")
    with pytest.raises(VolumenError, match="expected an image: a, b, found c"):
        find_view([str(dataset / "out")], case="c")


def test_overlapping_channels_of_a_label_are_shown_as_one_map():
    """Without this only the first channel would be shown: a whole organ, and neither its tumour nor other organs."""
    label = np.zeros((8, 9, 10), np.uint8)
    label[2:6], label[3:5, 4:6], label[7] = 1, 2, 3
    regions = RegionLabel(ArrayVolume(label, axes="zyx"), [[1, 2], [2], [3]])
    layer = layer_of("truth", regions, "labels")
    assert layer.content.channels == 1
    np.testing.assert_array_equal(whole(layer.levels[0])[0], label)
    assert whole(layer.levels[0]).dtype == layer.levels[0].dtype


def test_a_record_is_shown_with_the_truth_of_its_image(dataset):
    request = PredictRequest(
        str(dataset / "d"), "m", str(dataset / "files"), amp="off", device="cpu", format="tif"
    )
    predict(request, predictor=make_predictor(3, (8, 8, 8), HEADS))
    view = find_view([str(dataset / "files" / "b.volumen.json")])
    layers = {layer.name: layer for layer in view.layers}
    assert set(layers) == {"image", "ink", "normals", "depth", "ink truth", "ink errors"}
    truth = np.roll(IMAGE[::-1] > 128, 9, 1)
    np.testing.assert_array_equal(whole(layers["ink truth"].levels[0])[0] > 0, truth)


def test_a_report_is_shown_at_the_worst_place_of_its_worst_case(dataset):
    evaluate(EvaluateRequest(str(dataset / "out"), str(dataset / "d"), str(dataset / "r")))
    scores = json.loads((dataset / "r" / "metrics.json").read_text())["cases"]
    worst = min(scores, key=lambda name: scores[name]["ink/dice"])
    view = find_view([str(dataset / "r")])
    assert view.title.startswith(f"{worst} of ")
    layers = {layer.name: layer for layer in view.layers}
    assert set(layers) >= {"image", "ink", "ink truth", "ink errors"}
    errors = whole(layers["ink errors"].levels[0])[0]
    assert errors[view.position] != 0
    other = ({"a", "b"} - {worst}).pop()
    assert find_view([str(dataset / "r")], case=other).title.startswith(other)


def test_a_run_is_shown_by_an_image_that_validates(dataset):
    folder = dataset / "run"
    folder.mkdir()
    content = {"dataset_config": {"data_path": str(dataset / "d")}}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(content))
    (folder / "model_split.json").write_text(json.dumps({"train": {"a": None}, "val": {"b": None}}))
    view = find_view([str(folder)])
    assert kinds(view) == {"image": "image", "ink": "labels"}
    assert view.title.startswith("b of ")
    np.testing.assert_array_equal(whole(view.layers[0].levels[0])[0], IMAGE[::-1])


@pytest.mark.parametrize("kind", ["hdf5", "nrrd", "precomputed", "tif"])
def test_files_beside_a_record_and_parts_lie_in_their_place(tmp_path, kind):
    run(tmp_path, "out", format=kind, region=REGION)
    for path in ("out", "out/a.volumen.json"):
        view = find_view([str(tmp_path / path)])
        assert [layer.name for layer in view.layers] == ["image", "ink", "normals", "depth"]
        # TIFF states no place.
        start = (0, 0, 0) if kind == "tif" else tuple(low for low, _ in REGION)
        assert [layer.start for layer in view.layers] == [(0, 0, 0)] + [start] * 3


def test_several_volumes_and_labels_share_a_view(tmp_path):
    write_ome(tmp_path / "a.zarr", IMAGE, SPACING)
    write_ome(tmp_path / "b.zarr", TRUTH, SPACING, translation=(16.0, 4.0, 0.0))
    view = find_view([str(tmp_path / "a.zarr"), str(tmp_path / "a.zarr")], labels=[str(tmp_path / "b.zarr")])
    assert kinds(view) == {"a.zarr": "image", "a.zarr 2": "image", "b.zarr": "labels"}
    with pytest.raises(VolumenError, match="no such file or folder"):
        find_view([str(tmp_path / "none")])


# The server


@pytest.fixture
def served(dataset):
    view = find_view([str(dataset / "out" / "a.zarr")])
    with ViewServer(view) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server, view
        server.shutdown()


def test_tensorstore_reads_every_layer_from_the_server(served):
    tensorstore = pytest.importorskip("tensorstore")
    server, view = served
    entries = json.loads(urllib.request.urlopen(f"{server.root}/state.json").read())["layers"]
    assert [entry["name"] for entry in entries] == [layer.name for layer in view.layers]
    assert [entry["type"] for entry in entries] == ["image"] * 4 + ["segmentation"] * 2
    for entry, layer in zip(entries, view.layers):
        url = entry["source"].removeprefix("precomputed://")
        info = json.loads(urllib.request.urlopen(f"{url}/info").read())
        for level in range(len(info["scales"])):
            store = tensorstore.open(
                {"driver": "neuroglancer_precomputed", "kvstore": f"{url}/", "scale_index": level}, read=True
            ).result()
            found = np.asarray(store.read().result()).transpose(3, 2, 1, 0)
            finest = whole(layer.levels[0])
            expected = whole(layer.levels[level]) if len(layer.levels) > 1 else finest[:, :: 2**level]
            if len(layer.levels) > 1 or level == 0:
                np.testing.assert_array_equal(found, expected.astype(found.dtype))
            assert list(store.domain.origin[:3]) == [0, 0, 0]


def test_a_large_volume_without_levels_gets_coarse_ones(tmp_path):
    from volumen.viewing.chunks import ServedLayer
    from volumen.viewing.layers import View

    array = np.random.default_rng(0).integers(0, 256, (1, 3, 150, 200)).astype(np.uint8)
    write_ome(tmp_path / "a.zarr", array[0], SPACING)
    layer = layer_of("a", open_volume(tmp_path / "a.zarr"), "image")
    served = ServedLayer(layer, View((layer,)))
    sizes = [tuple(entry["size"]) for entry in served.info()["scales"]]
    assert sizes == [(200, 150, 3), (100, 75, 2), (50, 38, 3)]
    assert served.info()["scales"][2]["resolution"] == [16.0, 16.0, 8.0]
    chunk = np.frombuffer(served.chunk("0_4", "0-50_0-38_0-3"), np.uint8).reshape(3, 38, 50)
    np.testing.assert_array_equal(chunk, array[0, :, ::4, ::4])
    assert served.chunk("0_4", "1-50_0-38_0-3") is None
    assert served.chunk("0_4", "../../etc") is None


def ask(server, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_only_this_machine_with_the_token_may_read_and_nobody_may_write(served):
    server, _ = served
    good = f"/{server.token}/layers/0/info"
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, good)[0] == 200
    assert ask(server, good, host=f"localhost:{server.server_port}")[0] == 200
    # A page of another site that lets its name point to this machine.
    assert ask(server, good, host=f"evil.example:{server.server_port}")[0] == 403
    for path in ("/", "/x/layers/0/info", "/layers/0/info", f"/{server.token}x/state.json", "//"):
        status, body, headers = ask(server, path)
        assert (status, body) == (403, b"")
        assert "Access-Control-Allow-Origin" not in headers
    for path in (
        "client/../../secret",
        "client/%2e%2e%2fsecret",
        "layers/9/info",
        "layers/0/x",
        "layers/-1/info",
    ):
        assert ask(server, f"/{server.token}/{path}")[0] == 404
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(server, good, method)[0] == 501
    status, _, headers = ask(server, good, "OPTIONS")
    assert status == 204
    assert headers["Access-Control-Allow-Methods"] == "GET, HEAD"
    status, _, headers = ask(server, f"/{server.token}/")
    assert status == 302
    assert headers["Location"] == server.url
    assert len(server.token) >= 20


def test_a_damaged_chunk_is_an_answer_and_a_line(tmp_path, caplog):
    write_ome(tmp_path / "a.zarr", IMAGE, SPACING)
    view = find_view([str(tmp_path / "a.zarr")])
    (tmp_path / "a.zarr" / "0" / "0.0.0").write_bytes(b"x")
    with ViewServer(view) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status, body, _ = ask(server, f"/{server.token}/layers/0/0_1/0-19_0-24_0-13")
        server.shutdown()
    assert status == 500
    assert b"cannot be read" in body
    assert "cannot be read" in caplog.text


def test_a_port_that_is_taken_is_one_line(served, tmp_path, capsys):
    server, _ = served
    write_ome(tmp_path / "x.zarr", IMAGE, SPACING)
    assert main(["view", str(tmp_path / "x.zarr"), "--port", str(server.server_port)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].endswith(f"--port {server.server_port}: is taken by another program; choose another one, or 0 "
                              "for a free one")  # fmt: skip
    with pytest.raises(VolumenError, match="from 0 to 65535"):
        ViewServer(find_view([str(tmp_path / "x.zarr")]), 99999)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped_and_leaves_nothing(tmp_path, number):
    write_ome(tmp_path / "a.zarr", IMAGE, SPACING)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "volumen", "view", str(tmp_path / "a.zarr")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            page = process.stdout.readline().strip()
            info = json.loads(urllib.request.urlopen(f"{page}layers/0/info").read())
            assert info["scales"][0]["size"] == list(SHAPE[::-1])
            process.send_signal(number)
            assert process.wait(timeout=60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(page)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_of_the_package_shows_the_same_state(tmp_path):
    pytest.importorskip("neuroglancer")
    write_ome(tmp_path / "a.zarr", IMAGE, SPACING)
    with ViewServer(find_view([str(tmp_path / "a.zarr")])) as server:
        assert server.url == server.page.url
        assert server.url.startswith("http://127.0.0.1:")
        assert b"neuroglancer" in urllib.request.urlopen(server.url).read()
        (layer,) = server.page._viewer.state.to_json()["layers"]
        assert layer["source"] == f"precomputed://{server.root}/layers/0" or layer["source"]["url"] == (
            f"precomputed://{server.root}/layers/0"
        )


# napari


def test_napari_shows_vectors_as_colours_and_arrows_and_distances_around_zero(dataset):
    pytest.importorskip("napari")
    from napari.components import ViewerModel

    from volumen.viewing.napari_window import add_layers

    viewer = ViewerModel()
    add_layers(viewer, find_view([str(dataset / "out" / "a.zarr")]))
    layers = {layer.name: layer for layer in viewer.layers}
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    assert kinds == {
        "image": "Image", "ink": "Image", "normals": "Image", "normals arrows": "Vectors", "depth": "Image",
        "ink truth": "Labels", "ink errors": "Labels",
    }  # fmt: skip
    assert all(tuple(layer.scale) == SPACING for layer in viewer.layers)
    assert layers["normals"].rgb
    low, high = layers["depth"].contrast_limits
    assert low == -high < 0
    normals = whole(open_volume(dataset / "out" / "a.zarr" / "normals"))
    shown = np.asarray(layers["normals"].data[0])
    np.testing.assert_array_equal(shown[..., 0], (np.abs(normals[0]).clip(0, 1) * 255).astype(np.uint8))
    starts, ends = layers["normals arrows"].data[:, 0], layers["normals arrows"].data[:, 1]
    for start, end in zip(starts[:20].astype(int), ends[:20]):
        x, y, z = normals[(slice(None), *start)].astype(np.float32)
        np.testing.assert_allclose(end * np.array(SPACING) / min(SPACING), [z, y, x], atol=1e-2)


def test_without_napari_the_extra_is_named(tmp_path, monkeypatch):
    from volumen.viewing.napari_window import show

    write_ome(tmp_path / "a.zarr", IMAGE, SPACING)
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(
        VolumenError, match=r"--with napari: napari is not installed; pip install 'volumen\[napari\]'"
    ):
        show(find_view([str(tmp_path / "a.zarr")]))


def test_a_region_that_is_wrong_within_another_is_an_error():
    """A tumour (channel 1) in an organ (channel 0): missed as a part of the organ, and outside of it."""
    truth = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]], np.float32)[:, None]
    found = np.array([[1, 1, 1, 1, 0], [0, 0, 1, 0, 0]], np.float32)[:, None]
    volume = SimpleNamespace(
        path="p", shape=(1, 5), geometry=None, chunks=None, affine=None, fingerprint=lambda: ""
    )
    case = SimpleNamespace(
        prediction=volume,
        kind="multilabel",
        scale=1,
        read=lambda region: (found, truth, np.ones((1, 5), bool)),
    )
    errors = ErrorVolume(case, 0.5).read((slice(0, 1), slice(0, 5)))
    assert errors.tolist() == [[[0, CONFUSED, CONFUSED, ADDED, 0]]]
