"""`volumen instances`: a prediction whose heads were edited has the instances of a computation of everything."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import zarr
from instance_cases import cells, predicted, walls
from prediction import make_predictor
from scipy import ndimage
from test_instance_graph import OFFSETS, affinity_case
from test_instance_segmentation import identity_predictor, write_image

from volumen.cli.main import main
from volumen.data.formats.opening import open_volume
from volumen.inference import edited_instances
from volumen.inference.edited_instances import RECORD, update_instances
from volumen.inference.output.block_log import GRAPH_FOLDER
from volumen.inference.output.file_formats.agglomerates import Mapping, agglomerate_arrays
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import VolumeGraph, instances_of
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest
from volumen.inference.rules import InstanceRules, read_rules
from volumen.utils.errors import VolumenError

pytest.importorskip("bioimage_cpp", exc_type=ImportError)


def prediction(tmp_path, rules="boundary=membrane,block=8x16x16,halo=3", **request):
    truth = cells((24, 40, 40), 6)
    write_image(tmp_path / "s.zarr", np.rint(255 * predicted(walls(truth), 0.05)).astype(np.uint8))
    predictor = identity_predictor({"membrane": (1, "sigmoid", "binary"), "ink": (1, "sigmoid", "binary")})
    words = (str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"))
    predict(PredictRequest(*words, amp="off", instances=read_rules(rules), **request), predictor=predictor)
    return tmp_path / "p.zarr"


def stored(path, name="labels/membrane_instances", level=0):
    return zarr.open_array(path / name / str(level), mode="r")[...]


def whole(path, mask=None):
    rules = InstanceRules("membrane", halo=3)
    return instances_of({"membrane": stored(path, "membrane")[None]}, Source(rules, (1.0, 1.0, 1.0)), mask)


def edit(path, *region, value=0):
    """Set the walls of a region."""
    array = zarr.open_array(path / "membrane" / "0", mode="r+")
    array[region] = value


MIDDLE = (slice(2, 22), slice(10, 30), slice(10, 30))


@pytest.fixture
def steps(monkeypatch):
    """Return a list of the numbers of blocks whose fragments were found."""
    found, original = [], VolumeGraph.find_fragments

    def counted(self, number, *words):
        found.extend([] if self.pieces.has(number) else [number])
        return original(self, number, *words)

    monkeypatch.setattr(VolumeGraph, "find_fragments", counted)
    return found


def run(path, *words):
    return main(["instances", str(path), "--overwrite", "--quiet", *words])


def test_edited_chunks_are_found_and_computed_again_alone(tmp_path, steps):
    path = prediction(tmp_path)
    steps.clear()
    assert run(path) == 0
    blocks = len(steps)
    np.testing.assert_array_equal(stored(path), whole(path))
    before = stored(path)
    steps.clear()
    assert run(path) == 0
    assert not steps
    corner, plane = (slice(0, 5),) * 3, (slice(0, 24), slice(34, 36), slice(20, 40))
    for region, value in ((MIDDLE, 0), (corner, 255), (plane, 255)):
        edit(path, *region, value=value)
        steps.clear()
        assert run(path, "--workers", "3") == 0
        assert 0 < len(steps) <= blocks
        np.testing.assert_array_equal(stored(path), whole(path))
        assert not np.array_equal(stored(path), before)
    fine, coarse = stored(path), stored(path, level=1)
    cell = fine.reshape(12, 2, 20, 2, 20, 2).transpose(0, 2, 4, 1, 3, 5).reshape(12, 20, 20, 8)
    assert (cell == coarse[..., None]).any(axis=-1).all()
    group = zarr.open_group(path / "labels" / "membrane_instances", mode="r")
    described = group.attrs["ome"]["image-label"]["properties"]
    assert [item["voxels"] for item in described] == np.bincount(fine.ravel())[1:].tolist()
    root = zarr.open_group(path, mode="r")
    assert root["labels"].attrs["ome"]["labels"] == ["membrane_instances"]


def test_a_named_region_is_computed_again_though_its_file_looks_the_same(tmp_path, steps):
    path = prediction(tmp_path)
    assert run(path) == 0
    files = [file for file in (path / "membrane" / "0" / "c").rglob("*") if file.is_file()]
    times = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}
    edit(path, *MIDDLE)
    record = json.loads((path / GRAPH_FOLDER / RECORD).read_text())
    for (
        file
    ) in files:  # as a program that restores times would leave them, with the sizes that the record has
        os.utime(file, ns=(times[file][0],) * 2)
        key = "/".join(file.relative_to(path / "membrane" / "0" / "c").parts)
        record["heads"]["membrane"][key][1] = file.stat().st_size
    (path / GRAPH_FOLDER / RECORD).write_text(json.dumps(record))
    steps.clear()
    assert run(path) == 0
    assert not steps
    assert run(path, "--edited", "2:22,10:30,10:30") == 0
    assert steps
    np.testing.assert_array_equal(stored(path), whole(path))


def test_an_interrupted_call_is_continued(tmp_path, monkeypatch):
    path = prediction(tmp_path)
    assert run(path) == 0
    edit(path, *MIDDLE)
    original, calls = VolumeGraph.find_edges, []

    def stopped(self, number, *words):
        calls.extend([] if self.edges.has(number) else [number])
        if len(calls) % 4 == 0:
            calls.append(-1)
            raise KeyboardInterrupt
        return original(self, number, *words)

    monkeypatch.setattr(VolumeGraph, "find_edges", stopped)
    stops = 0
    while True:
        try:
            update_instances(path)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 2
    np.testing.assert_array_equal(stored(path), whole(path))


def test_a_new_prediction_removes_the_graph(tmp_path):
    path = prediction(tmp_path)
    assert run(path) == 0
    assert (path / GRAPH_FOLDER).exists()
    request = {"overwrite": True, "threshold": 0.4}
    (tmp_path / "again").mkdir()
    write_image(tmp_path / "again" / "s.zarr", np.zeros((24, 40, 40), np.uint8))
    predictor = identity_predictor({"membrane": (1, "sigmoid", "binary")})
    words = (str(tmp_path / "again" / "s.zarr"), "random.pth", str(path))
    predict(
        PredictRequest(*words, amp="off", instances=read_rules("membrane"), **request), predictor=predictor
    )
    assert not (path / GRAPH_FOLDER).exists()


def test_mask_and_region_are_those_of_the_prediction(tmp_path):
    mask = np.ones((24, 40, 40), np.uint8)
    mask[:, :, 30:] = 0
    write_image(tmp_path / "m.zarr", mask)
    path = prediction(tmp_path, mask=str(tmp_path / "m.zarr"), region=((4, 24), (0, 40), (8, 40)))
    edit(path, *MIDDLE)
    assert run(path) == 0
    np.testing.assert_array_equal(stored(path), whole(path, mask[4:, :, 8:] > 0))
    assert not stored(path)[:, :, 22:].any()
    zarr.open_array(tmp_path / "m.zarr", mode="r+")[:, :4] = 0
    with pytest.raises(VolumenError, match=r"expected the mask that .* was made with"):
        update_instances(path)


def test_affinities_keep_their_offsets(tmp_path):
    heads, _ = affinity_case()
    write_image(tmp_path / "s.zarr", heads["affs"], ["c", "z", "y", "x"])
    predictor = identity_predictor({"affs": (len(OFFSETS), "sigmoid", "multilabel")}, len(OFFSETS))
    task = {"type": "affinities", "source_target": "cell", "offsets": OFFSETS}
    predictor.config["auxiliary_tasks"] = {"affs": task}
    predictor.config["dataset_config"] = {"spacing": [2.0, 1.0, 1.0]}
    request = PredictRequest(
        str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"), amp="off", axes="czyx",
        instances=read_rules("affinities=affs,halo=4,block=16x16x16"),
    )  # fmt: skip
    predict(request, predictor=predictor)
    path = tmp_path / "p.zarr"
    array = zarr.open_array(path / "affs" / "0", mode="r+")
    assert run(path) == 0
    before = stored(path, "labels/affs_instances")
    array[:, 8:14, 10:20, 10:20] = 0
    assert run(path) == 0
    found = stored(path, "labels/affs_instances")
    assert not np.array_equal(found, before)
    rules = InstanceRules(affinities="affs", halo=4)
    expected = instances_of({"affs": array[...]}, Source(rules, (1.0, 1.0, 1.0), OFFSETS))
    np.testing.assert_array_equal(found, expected)


def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys):
    path = prediction(tmp_path)
    plain = prediction(tmp_path / "b", rules=None) if (tmp_path / "b").mkdir() is None else None
    cases = [
        ([str(path)], "--overwrite: the instances in .* are replaced, with all corrections made in them"),
        ([str(path), "--overwrite", "--edited", "3"], "--edited: expected start:stop per axis, by commas"),
        (
            [str(path), "--overwrite", "--edited", "0:99,:,:"],
            r"--edited: expected start:stop per axis inside",
        ),
        ([str(path), "--overwrite", "--workers", "0"], "--workers: expected at least 1"),
        (
            [str(plain), "--overwrite"],
            "expected a finished prediction with instances.*found a prediction without",
        ),
        (
            [str(tmp_path / "none.zarr"), "--overwrite"],
            "expected a finished prediction with instances.*found none",
        ),
    ]
    before = stored(path)
    for words, message in cases:
        assert main(["instances", *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        with pytest.raises(VolumenError, match=message):
            raise VolumenError(*[line for line in lines if "error:" in line])
    np.testing.assert_array_equal(stored(path), before)
    assert not (path / GRAPH_FOLDER).exists()
    assert not (tmp_path / "none.zarr").exists()


def direct_arrays(mapping):
    """Return the arrays of an agglomerate file by loops."""
    count = int(mapping.agglomerate.max(initial=0))
    segments, first, positions, pairs, starts, affinities = [], [0], [], [], [0], []
    for number in range(count + 1):
        own = [s for s in range(1, len(mapping.agglomerate)) if number and mapping.agglomerate[s] == number]
        segments += own
        positions += [mapping.positions[s].tolist() for s in own]
        inner = [
            (own.index(u), own.index(v), a)
            for (u, v), a in zip(mapping.edges, mapping.affinities)
            if u in own
        ]
        pairs += [edge[:2] for edge in sorted(inner)]
        affinities += [edge[2] for edge in sorted(inner)]
        first.append(len(segments))
        starts.append(len(pairs))
    return {
        "segment_to_agglomerate": mapping.agglomerate,
        "agglomerate_to_segments_offsets": first,
        "agglomerate_to_segments": segments,
        "agglomerate_to_positions": positions,
        "agglomerate_to_edges_offsets": starts,
        "agglomerate_to_edges": pairs,
        "agglomerate_to_affinities": np.float32(affinities),
    }


def test_agglomerate_arrays_are_those_of_webknossos():
    """A chain of segments 1, 2, 3, 4 with 7 at 1, and the pair 5, 6: the arrays of WEBKNOSSOS's own library."""
    edges = np.array([[1, 2], [2, 3], [3, 4], [5, 6], [1, 7]])
    owner = np.array([0, 1, 1, 1, 1, 2, 2, 1])
    mapping = Mapping(owner, np.arange(24).reshape(8, 3), edges, np.array([0.9, 0.8, 0.7, 0.6, 0.5]))
    found = agglomerate_arrays(mapping)
    assert found["segment_to_agglomerate"].tolist() == [0, 1, 1, 1, 1, 2, 2, 1]
    assert found["agglomerate_to_segments_offsets"].tolist() == [0, 0, 5, 7]
    assert found["agglomerate_to_segments"].tolist() == [1, 2, 3, 4, 7, 5, 6]
    assert found["agglomerate_to_edges_offsets"].tolist() == [0, 0, 4, 5]
    assert found["agglomerate_to_edges"].tolist() == [[0, 1], [0, 4], [1, 2], [2, 3], [0, 1]]
    rng = np.random.default_rng(0)
    for segments in (0, 1, 40):
        owner = np.concatenate([[0], rng.permutation(np.arange(segments) % 7)])
        pairs = rng.integers(1, segments + 1, (60 * (segments > 1), 2))
        pairs = np.unique(np.sort(pairs, axis=1), axis=0)
        pairs = pairs[
            (owner[pairs[:, 0]] == owner[pairs[:, 1]])
            & (owner[pairs[:, 0]] > 0)
            & (pairs[:, 0] < pairs[:, 1])
        ]
        mapping = Mapping(
            owner, rng.integers(0, 99, (segments + 1, 3)), rng.permutation(pairs), rng.random(len(pairs))
        )
        found, expected = agglomerate_arrays(mapping), direct_arrays(mapping)
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert found[name].tolist() == np.asarray(values).tolist(), name


def test_an_agglomerate_file_joins_the_regions_to_the_instances(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = prediction(tmp_path, region=((2, 24), (0, 40), (8, 40)))
    dataset = tmp_path / "out.webknossos"
    assert run(path, "--agglomerates", str(dataset)) == 0
    layer = open_volume(str(dataset / "membrane_regions"))
    regions = layer.read(tuple(slice(0, n) for n in layer.shape))[0]
    assert regions.shape == (22, 40, 32)
    with h5py.File(dataset / "membrane_regions" / "agglomerates" / "membrane_instances.hdf5") as file:
        content = {name: file[name][...] for name in file}
    owner = content["segment_to_agglomerate"]
    np.testing.assert_array_equal(owner[regions], stored(path))
    assert len(owner) - 1 == regions.max() > stored(path).max()
    for segment, place in zip(content["agglomerate_to_segments"], content["agglomerate_to_positions"]):
        assert regions[tuple(place[::-1].astype(int) - [2, 0, 8])] == segment
    offsets, starts = content["agglomerate_to_segments_offsets"], content["agglomerate_to_edges_offsets"]
    for number in range(1, len(offsets) - 1):
        own = content["agglomerate_to_segments"][offsets[number] : offsets[number + 1]]
        assert (owner[own] == number).all()
        edges = content["agglomerate_to_edges"][starts[number] : starts[number + 1]]
        reached = {0}
        for _ in own:
            reached |= {int(b) for a, b in [*edges, *edges[:, ::-1]] if int(a) in reached}
        assert reached == set(range(len(own)))  # the edges join all segments
        for a, b in edges:
            grown = ndimage.binary_dilation(regions == own[a])
            assert (grown & (regions == own[b])).any()
    affinities = content["agglomerate_to_affinities"]
    assert ((affinities >= 0) & (affinities <= 1)).all()
    properties = json.loads((dataset / "datasource-properties.json").read_text())
    (entry,) = properties["dataLayers"]
    assert entry["largestSegmentId"] == regions.max()
    assert entry["boundingBox"]["topLeft"] == [8, 0, 2]
    (attachment,) = entry["attachments"]["agglomerates"]
    assert attachment["name"] == "membrane_instances"
    assert (dataset / attachment["path"]).is_file()
    assert sorted(file.name for file in (path / GRAPH_FOLDER).iterdir() if "regions-" in file.name) == []
    with pytest.raises(VolumenError, match="expected a new folder, found an existing one"):
        update_instances(path, agglomerates=dataset)


def test_an_image_of_two_axes_has_agglomerates_in_one_plane(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    image = np.rint(255 * predicted(walls(cells((40, 60), 8)), 0.2)).astype(np.uint8)
    write_image(tmp_path / "s.zarr", image)
    predictor = make_predictor(2, (16, 16), {"wall": (1, "sigmoid", "binary")})
    rules = read_rules("boundary=wall,halo=3,block=16x16")
    words = (str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"))
    predict(PredictRequest(*words, amp="off", instances=rules), predictor=predictor)
    path, dataset = tmp_path / "p.zarr", tmp_path / "out.webknossos"
    zarr.open_array(path / "wall" / "0", mode="r+")[:] = image  # an edit of everything
    with monkeypatch.context() as patch:
        patch.setattr(edited_instances, "write_agglomerates", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update_instances(path, agglomerates=dataset)
    assert not dataset.exists()
    found = update_instances(path, agglomerates=dataset)
    source = Source(InstanceRules("wall", halo=3), (1.0, 1.0))
    instances = stored(path, "labels/wall_instances")
    np.testing.assert_array_equal(instances, instances_of({"wall": image[None]}, source))
    assert found.instances == instances.max() > 3
    layer = open_volume(str(dataset / "wall_regions"))
    regions = layer.read(tuple(slice(0, n) for n in layer.shape))[0]
    with h5py.File(dataset / "wall_regions" / "agglomerates" / "wall_instances.hdf5") as file:
        owner, places = file["segment_to_agglomerate"][...], file["agglomerate_to_positions"][...].astype(int)
        segments = file["agglomerate_to_segments"][...]
    np.testing.assert_array_equal(owner[regions].reshape(instances.shape), instances)
    assert (places[:, 2] == 0).all()
    np.testing.assert_array_equal(regions.reshape(instances.shape)[places[:, 1], places[:, 0]], segments)
