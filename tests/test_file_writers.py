"""Predictions in HDF5, MRC, NRRD and neuroglancer's format: values and place, read by other libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from prediction import make_predictor
from test_placement import write_nifti, write_ome

from volumen.data.formats.opening import open_volume
from volumen.data.formats.precomputed.volume import open_precomputed
from volumen.inference.output import exports
from volumen.inference.output.file_formats import precomputed, webknossos
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest
from volumen.utils.errors import VolumenError

h5py = pytest.importorskip("h5py")
mrcfile = pytest.importorskip("mrcfile")
nrrd = pytest.importorskip("nrrd")

SHAPE = (13, 24, 19)
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
SPACING, PLACE = (8.0, 4.0, 4.0), (40.0, 80.0, 120.0)
REGION = ((4, 12), (2, 20), (5, 19))
HEADS = {
    "ink": (1, "sigmoid", "binary"),
    "normals": (3, "none", "vector"),
    "depth": (1, "none", "distance"),
}


def run(tmp_path, output, image="a.zarr", heads=HEADS, shape=SHAPE, **options):
    """Predict an image to an output; return its folder."""
    if not (tmp_path / image).exists():
        write_ome(tmp_path / image, IMAGE, SPACING, translation=PLACE)
    ndim = len(shape)
    request = PredictRequest(
        str(tmp_path / image), "m", str(tmp_path / output), amp="off", device="cpu", **options
    )
    predict(request, predictor=make_predictor(ndim, (8,) * ndim, heads))
    return request


def expected_of(tmp_path, name, level=0, **options):
    """Return the values of the same prediction in zarr, (channels, *space); files have no 16-bit floats."""
    if name != "ink":
        options["dtype"] = "float32"
    output = f"expected_{options.get('dtype')}.zarr"
    run(tmp_path, output, **options)
    root = zarr.open_group(tmp_path / output, mode="r")
    group = root[f"labels/{name}"] if f"labels/{name}" in root else root[name]
    values = group[str(level)][...]
    return values if values.ndim == 4 else values[None]


def first_of(region):
    return [p + s * (r[0] if region else 0) for p, s, r in zip(PLACE, SPACING, region or ((0, 0),) * 3)]


@pytest.mark.parametrize("region", [None, REGION])
@pytest.mark.parametrize("compress", ["zstd", "none"])
def test_hdf5_holds_values_axes_and_place(tmp_path, region, compress):
    run(tmp_path, "out", format="hdf5", region=region, compress=compress)
    for name in HEADS:
        values = expected_of(tmp_path, name, region=region)
        with h5py.File(tmp_path / "out" / f"a_{name}.h5") as file:
            (dataset,) = file.values()
            found = dataset[...]
            np.testing.assert_array_equal(
                found if len(values) > 1 else found[None], values.astype(found.dtype)
            )
            assert dataset.chunks is not None
            assert (dataset.compression is None) == (compress == "none")
            np.testing.assert_allclose(dataset.attrs["element_size_um"], np.array(SPACING) / 1000)
            np.testing.assert_allclose(dataset.attrs["offset"], first_of(region))
            tags = json.loads(dataset.attrs["axistags"])["axes"]
            assert "".join(tag["key"] for tag in tags) == ("czyx" if len(values) > 1 else "zyx")
        again = open_volume(tmp_path / "out" / f"a_{name}.h5")
        assert again.geometry.origin == pytest.approx(first_of(region))
        assert (again.spacing, again.unit) == (SPACING, "nanometer")
        assert again.channels == len(values)


@pytest.mark.parametrize("region", [None, REGION])
def test_mrc_holds_values_and_place(tmp_path, region):
    heads = {name: HEADS[name] for name in ("ink", "depth")}
    run(tmp_path, "out", format="mrc", region=region, heads=heads)
    for name in heads:
        values = expected_of(tmp_path, name, region=region, heads=heads)[0]
        path = tmp_path / "out" / f"a_{name}.mrc"
        assert mrcfile.validate(path)
        with mrcfile.open(path) as file:
            np.testing.assert_array_equal(file.data, values.astype(file.data.dtype))
            sizes = [float(file.voxel_size[axis]) for axis in "zyx"]
            np.testing.assert_allclose(sizes, np.array(SPACING) * 10, rtol=1e-6)
            place = [float(file.header.origin[axis]) for axis in "zyx"]
            np.testing.assert_allclose(place, np.array(first_of(region)) * 10, rtol=1e-6)
            assert float(file.header.dmean) == pytest.approx(
                float(file.data.mean(dtype=np.float64)), rel=1e-5
            )
            assert float(file.header.rms) == pytest.approx(float(file.data.std(dtype=np.float64)), rel=1e-4)
        again = open_volume(path)
        assert again.geometry.in_unit("nanometer").origin == pytest.approx(first_of(region), rel=1e-5)


@pytest.mark.parametrize("region", [None, REGION])
@pytest.mark.parametrize("compress", ["zstd", "none"])
def test_nrrd_holds_values_and_place(tmp_path, region, compress):
    run(tmp_path, "out", format="nrrd", region=region, compress=compress)
    for name in HEADS:
        values = expected_of(tmp_path, name, region=region)
        found, header = nrrd.read(str(tmp_path / "out" / f"a_{name}.nrrd"), index_order="C")
        np.testing.assert_array_equal(found if len(values) > 1 else found[None], values.astype(found.dtype))
        np.testing.assert_allclose(header["space origin"], first_of(region)[::-1])
        np.testing.assert_allclose(np.diag(header["space directions"][:3]), SPACING[::-1])
        assert header["space units"] == ["nm"] * 3
        again = open_volume(tmp_path / "out" / f"a_{name}.nrrd")
        assert again.geometry.origin == pytest.approx(first_of(region))
        assert (again.spacing, again.unit, again.channels) == (SPACING, "nanometer", len(values))


@pytest.mark.parametrize("region", [None, REGION])
def test_a_scan_s_orientation_is_that_of_its_nrrd(tmp_path, region):
    affine = np.array([[0, 0.7, 0, -5], [-1.1, 0, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / "a.nii", IMAGE, affine)
    for output in ("p.nrrd", "q.nii"):
        run(tmp_path, output, image="a.nii", heads={"ink": HEADS["ink"]}, region=region)
    by_nrrd, by_nifti = open_volume(tmp_path / "p.nrrd"), open_volume(tmp_path / "q.nii")
    np.testing.assert_allclose(by_nrrd.affine, by_nifti.affine, atol=1e-5)
    assert by_nrrd.geometry.orientation == by_nifti.geometry.orientation


def opened(folder, level=0):
    """Open a scale by TensorStore, as (C, Z, Y, X)."""
    import tensorstore

    spec = {"driver": "neuroglancer_precomputed", "kvstore": f"file://{folder}/", "scale_index": level}
    return tensorstore.open(spec, read=True).result()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("region", [None, REGION])
@pytest.mark.parametrize("dtype", ["uint8", "labels"])
def test_precomputed_is_read_by_tensorstore(tmp_path, monkeypatch, sharded, region, dtype):
    pytest.importorskip("tensorstore")
    monkeypatch.setattr(precomputed, "CHUNK", 4)
    if sharded:
        monkeypatch.setattr(precomputed, "MOST_FILES", 2)
        monkeypatch.setattr(precomputed, "_MINISHARD", 2)
        monkeypatch.setattr(precomputed, "_SHARD", 1)
    run(tmp_path, "out", format="precomputed", region=region, dtype=dtype)
    start = [low for low, _ in region or ((0, 0),) * 3]
    for name in HEADS:
        values = expected_of(tmp_path, name, region=region, dtype=dtype)
        folder = tmp_path / "out" / f"a_{name}.precomputed"
        array = opened(folder)
        info = json.loads((folder / "info").read_text())
        labels = dtype == "labels" and name == "ink"
        assert info["type"] == ("segmentation" if labels else "image")
        assert len(info["scales"]) > 1
        assert ("sharding" in info["scales"][0]) == sharded
        assert list(array.domain.origin[:3]) == [30 + start[2], 20 + start[1], 5 + start[0]]
        assert next(iter(array.dimension_units)).multiplier == 4.0
        found = np.asarray(array.read().result()).transpose(3, 2, 1, 0)
        np.testing.assert_array_equal(found, values.astype(found.dtype))
        for level, scale in enumerate(info["scales"]):
            theirs = np.asarray(opened(folder, level).read().result()).transpose(3, 2, 1, 0)
            ours = open_precomputed(str(folder), level=level)
            whole = tuple(slice(0, n) for n in ours.shape)
            np.testing.assert_array_equal(ours.read(whole), theirs)
            coarse = expected_of(tmp_path, name, level, region=region, dtype=dtype)
            np.testing.assert_array_equal(theirs, coarse.astype(theirs.dtype))
            assert scale["size"] == list(ours.shape[::-1])
        assert open_precomputed(str(folder)).geometry.origin == pytest.approx(first_of(region))


def test_instances_are_64_bit_safe_labels_with_a_state_that_opens_all(tmp_path):
    pytest.importorskip("bioimage_cpp")
    from volumen.inference.rules import read_rules

    heads = {"ink": HEADS["ink"]}
    run(tmp_path, "out", format="precomputed", heads=heads, instances=read_rules("foreground=ink"))
    state = json.loads((tmp_path / "out" / "a.neuroglancer.json").read_text())
    kinds = {layer["name"]: layer["type"] for layer in state["layers"]}
    assert kinds == {"ink": "image", "ink_instances": "segmentation"}
    assert state["dimensions"] == {"x": [4e-9, "m"], "y": [4e-9, "m"], "z": [8e-9, "m"]}
    run(tmp_path, "b.precomputed", heads=heads)  # beside the image
    layers = json.loads((tmp_path / "b.neuroglancer.json").read_text())["layers"]
    assert [layer["source"] for layer in layers] == [
        "zarr://http://127.0.0.1:8000/a.zarr",
        "precomputed://http://127.0.0.1:8000/b.precomputed",
    ]


def test_names_of_classes_are_segment_properties(tmp_path):
    heads = {"tissue": (3, "softmax", "multiclass")}
    run(tmp_path, "p.precomputed", heads=heads, dtype="labels")
    info = json.loads((tmp_path / "p.precomputed" / "info").read_text())
    assert info["scales"][0]["encoding"] == "compressed_segmentation"
    inline = json.loads((tmp_path / "p.precomputed" / "properties" / "info").read_text())["inline"]
    assert inline["ids"] == ["1", "2"]


@pytest.mark.parametrize("region", [None, REGION])
@pytest.mark.parametrize("dtype", ["uint8", "labels"])
def test_a_webknossos_dataset_has_a_layer_per_target(tmp_path, monkeypatch, region, dtype):
    monkeypatch.setattr(webknossos, "CHUNK", 4)
    monkeypatch.setattr(webknossos, "SHARD", 8)
    heads = {name: HEADS[name] for name in ("ink", "depth")}
    run(tmp_path, "p.webknossos", heads=heads, region=region, dtype=dtype)
    content = json.loads((tmp_path / "p.webknossos" / "datasource-properties.json").read_text())
    assert content["scale"] == {"factor": [4.0, 4.0, 8.0], "unit": "nanometer"}
    start = [low for low, _ in region or ((0, 0),) * 3]
    for layer in content["dataLayers"]:
        name = layer["name"]
        labels = dtype == "labels" and name == "ink"
        assert layer["category"] == ("segmentation" if labels else "color")
        assert layer.get("largestSegmentId") == (1 if labels else None)
        assert layer["boundingBox"]["topLeft"] == [30 + start[2], 20 + start[1], 5 + start[0]]
        for level, mag in enumerate(layer["mags"]):
            values = expected_of(tmp_path, name, level, heads=heads, region=region, dtype=dtype)[0]
            array = zarr.open_array(tmp_path / "p.webknossos" / mag["path"], mode="r")
            assert array.metadata.dimension_names == ("c", "x", "y", "z")
            first = [low // m for low, m in zip(layer["boundingBox"]["topLeft"], mag["mag"])]
            found = array[(0, *(slice(a, None) for a in first))].transpose()
            np.testing.assert_array_equal(found, values.astype(found.dtype))
        volume = open_volume(tmp_path / "p.webknossos" / name)
        assert volume.geometry.origin == pytest.approx(first_of(region))
        assert volume.shape == expected_of(tmp_path, name, heads=heads, region=region, dtype=dtype)[0].shape
    with pytest.raises(VolumenError, match="found normals with 3 channels"):
        run(tmp_path, "q.webknossos")


def test_a_place_between_voxels_is_said(tmp_path, caplog):
    write_ome(tmp_path / "a.zarr", IMAGE, SPACING, translation=(41.0, 80.0, 120.0))
    run(tmp_path, "p.precomputed", heads={"ink": HEADS["ink"]})
    assert "p.precomputed: the place of its first voxel is rounded by up to 0.12 voxels" in caplog.text


@pytest.mark.parametrize("suffix", ["h5", "mrc", "nrrd", "precomputed", "webknossos"])
@pytest.mark.parametrize("unit", [None, "micrometer"])
def test_images_in_2d_are_written(tmp_path, suffix, unit):
    sizes = {"PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25} if unit else {}
    tifffile.imwrite(tmp_path / "flat.ome.tif", IMAGE[0], ome=True, metadata={"axes": "YX", **sizes})
    heads = {"ink": HEADS["ink"]}
    for output in (f"p.{suffix}", "p.zarr"):
        run(tmp_path, output, image="flat.ome.tif", heads=heads, shape=(24, 19))
    volume = open_volume(tmp_path / f"p.{suffix}")
    whole = tuple(slice(0, n) for n in volume.shape)
    expected = zarr.open_group(tmp_path / "p.zarr", mode="r")["ink/0"][...]
    np.testing.assert_array_equal(volume.read(whole)[0], expected)
    if unit is not None:
        assert volume.geometry.in_unit(unit).spacing == pytest.approx((0.5, 0.25))


def test_what_mrc_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(VolumenError, match="found normals with 3 channels; choose --format hdf5"):
        run(tmp_path, "out", format="mrc")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["h5", "mrc", "nrrd", "precomputed", "webknossos"])
def test_an_interrupted_export_goes_on_and_leaves_nothing_behind(tmp_path, monkeypatch, suffix):
    heads = {"ink": HEADS["ink"], "depth": HEADS["depth"]}
    replace_path, count = Path.replace, 0

    def stop(self, target):
        nonlocal count
        count += self.name.startswith(".partial-")
        if count == 2:
            raise KeyboardInterrupt
        return replace_path(self, target)

    kind = exports.SUFFIXES[f".{suffix}"]
    run(tmp_path, "whole", format=kind, heads=heads)
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "out", format=kind, heads=heads)
    monkeypatch.undo()
    request = run(tmp_path, "out", format=kind, heads=heads)
    names = {path.name for path in Path(request.output).iterdir()}
    state = {"a.neuroglancer.json"} if suffix == "precomputed" else set()
    files = {"a.webknossos"} if suffix == "webknossos" else {f"a_ink.{suffix}", f"a_depth.{suffix}"}
    assert names == files | {"a.volumen.json"} | state
    assert not list(Path(request.output).rglob(".partial-*"))
    for path in sorted(Path(request.output).rglob("*")):
        other = tmp_path / "whole" / path.relative_to(request.output)
        if path.is_file() and path.suffix != ".json":
            assert path.read_bytes() == other.read_bytes()
    again = replace(request, overlap=0.25)
    with pytest.raises(VolumenError, match="holds another prediction"):
        predict(again, predictor=make_predictor(3, (8, 8, 8), heads))
    predict(replace(again, overwrite=True), predictor=make_predictor(3, (8, 8, 8), heads))
    assert {path.name for path in Path(request.output).iterdir()} == names


@pytest.mark.parametrize(("kind", "package"), [("hdf5", "h5py"), ("mrc", "mrcfile")])
def test_a_missing_package_is_named_before_the_prediction(tmp_path, monkeypatch, kind, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VolumenError, match=rf"needs the package {package}.*volumen\[formats\]"):
        run(tmp_path, "out", format=kind, heads={"ink": HEADS["ink"]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hdf5", "mrc", "nrrd", "precomputed", "webknossos"])
def test_predictions_are_scored_as_those_in_zarr(tmp_path, kind):
    from volumen.evaluation.request import EvaluateRequest
    from volumen.evaluation.score import evaluate

    heads = {"ink": HEADS["ink"]}
    run(tmp_path, "zarrs", heads=heads, dtype="labels")
    run(tmp_path, "files", heads=heads, dtype="labels", format=kind)
    (tmp_path / "labels").mkdir()
    write_ome(tmp_path / "labels" / "a_ink.zarr", (IMAGE > 128).astype(np.uint8), SPACING, translation=PLACE)
    means = [
        evaluate(
            EvaluateRequest(str(tmp_path / name), str(tmp_path / "labels"), str(tmp_path / f"e{name}"))
        ).mean
        for name in ("zarrs", "files")
    ]
    assert means[0]["ink/dice"] == means[1]["ink/dice"] > 0


def test_like_takes_a_folder_of_another_format(tmp_path):
    from volumen.inference.record.reproduce import provenance_of

    run(tmp_path, "p.precomputed", heads={"ink": HEADS["ink"]}, overlap=0.25)
    assert provenance_of(tmp_path / "p.precomputed")["windows"]["overlap"] == 0.25
