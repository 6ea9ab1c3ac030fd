"""A prediction bears the name of its image, in whatever way that is stored, and is found by it again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import zarr
from prediction import save_checkpoint

from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.inference.jobs import volume_name
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest

SHAPE = (9, 12, 14)


def write_ome(path, array):
    """Write an OME-Zarr 0.5 image with a second level of half the size."""
    levels = [array, np.ascontiguousarray(array[::2, ::2, ::2])]
    datasets = [
        {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [2.0**n] * 3}]}
        for n in range(len(levels))
    ]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    for number, level in enumerate(levels):
        group.create_array(str(number), data=level, chunks=(8, 8, 8))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for name, ending in (("a", ".zarr"), ("b", ".ome.zarr"), ("c", ""), ("d", ".tif")):
        image = rng.integers(0, 256, SHAPE, dtype=np.uint8)
        path = tmp_path / "data" / "images" / f"{name}{ending}"
        if ending == ".tif":
            tifffile.imwrite(path, image, metadata={"axes": "ZYX"})
        else:
            write_ome(path, image)
        write_ome(tmp_path / "data" / "labels" / f"{name}_ink.zarr", image // 128)
    save_checkpoint(tmp_path / "m.pth")
    return tmp_path


def test_a_folder_of_images_gives_a_prediction_of_each_by_name(folder):
    request = PredictRequest(
        str(folder / "data"), str(folder / "m.pth"), str(folder / "found"), targets=("ink",), device="cpu"
    )
    report = predict(request)
    assert sorted(volume_name(volume.output) for volume in report.volumes) == ["a", "b", "c", "d"]
    assert sorted(path.name for path in (folder / "found").iterdir()) == [
        "a.zarr",
        "b.zarr",
        "c.zarr",
        "d.zarr",
    ]
    evaluate(EvaluateRequest(str(folder / "found"), str(folder / "data"), str(folder / "report")))
    assert set(json.loads((folder / "report" / "metrics.json").read_text())["cases"]) == {"a", "b", "c", "d"}


def test_a_prediction_of_a_level_is_repeated_from_its_record(folder):
    image = str(folder / "data" / "images" / "b.ome.zarr")
    first = PredictRequest(
        image, str(folder / "m.pth"), str(folder / "half.zarr"), targets=("ink",), level=1, device="cpu"
    )
    predict(first)
    recipe = zarr.open_group(folder / "half.zarr", mode="r").attrs["volumen"]["recipe"]
    assert (recipe["input"]["path"], recipe["input"]["level"]) == (image, 1)
    from volumen.cli.main import main

    assert (
        main(["predict", "--like", str(folder / "half.zarr"), "-o", str(folder / "again.zarr"), "--quiet"])
        == 0
    )
    old, new = (zarr.open_group(folder / name, mode="r")["ink/0"][:] for name in ("half.zarr", "again.zarr"))
    assert old.shape == (5, 6, 7)
    np.testing.assert_array_equal(old, new)


def predict_folder(folder, source, ndim):
    checkpoint = save_checkpoint(folder / f"m{ndim}.pth", ndim, (8,) * ndim)
    request = PredictRequest(
        str(source), str(checkpoint), str(folder / "out"), targets=("ink",), device="cpu", dtype="float32"
    )
    return {volume_name(volume.output): volume.output for volume in predict(request).volumes}


def test_a_folder_of_slices_is_one_image_in_3d_and_many_in_2d(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    slices = tmp_path / "scan"
    slices.mkdir()
    for number, plane in enumerate(image, start=5):
        tifffile.imwrite(slices / f"scan_{number:03}.tif", plane)
    zarr.create_array(tmp_path / "whole.zarr", data=image, chunks=(8, 8, 8))
    one = predict_folder(tmp_path, slices, 3)
    assert list(one) == ["scan"]
    expected = predict_folder(tmp_path, tmp_path / "whole.zarr", 3)["whole"]
    found, wanted = (zarr.open_group(path, mode="r")["ink/0"][...] for path in (one["scan"], expected))
    assert np.array_equal(found, wanted)
    assert sorted(predict_folder(tmp_path, slices, 2)) == [f"scan_{n:03}" for n in range(5, 5 + SHAPE[0])]


def test_numbered_volumes_are_an_image_each(tmp_path):
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    for number in range(2):
        tifffile.imwrite(volumes / f"v{number}.tif", np.zeros(SHAPE, np.uint8), metadata={"axes": "ZYX"})
    assert sorted(predict_folder(tmp_path, volumes, 3)) == ["v0", "v1"]
