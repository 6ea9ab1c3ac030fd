"""Voxel size, unit, orientation and thin volumes: each format through training, prediction and evaluation."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from data_folders import SHORT
from prediction import save_checkpoint
from test_placement import write_ome

from volumen.cli.main import main
from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases

FORMATS = ("zarr", "ome.tif", "nii.gz")
SPACING = (3.0, 2.0, 1.5)
SHAPE = (12, 20, 16)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[4:9, 5:15, 3:12] = 1
IMAGE = (LABEL * 100 + np.random.default_rng(0).integers(0, 60, SHAPE)).astype(np.uint8)
TINY = ["--patch-size", "8,8,8", *SHORT]
TINY += ["--device", "cpu", "--quiet", "--set", "model_config.features_per_stage=[4,8]"]


UNITS = {"micrometer": ("µm", "micron"), "millimeter": ("mm", "mm")}


def write(path, array, spacing=SPACING, unit="micrometer", start=(0.0, 0.0, 0.0)):
    """Write a volume (Z, Y, X) of the given voxel size, unit and place, in the format that the name ends with."""
    if path.name.endswith(".zarr"):
        write_ome(path, array, spacing, (unit,) * 3, start)
    elif path.name.endswith(".tif"):
        sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", spacing)}
        units = {f"PhysicalSize{axis}Unit": UNITS[unit][0] for axis in "ZYX"}
        tifffile.imwrite(path, array, metadata={"axes": "ZYX", **sizes, **units})
    else:
        affine = np.diag([*spacing[::-1], 1])
        affine[:3, 3] = start[::-1]
        image = nibabel.Nifti1Image(array.T, affine)
        image.header.set_xyzt_units(UNITS[unit][1])
        image.to_filename(path)
    return path


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOLUMEN_CACHE", "off")
    return tmp_path


@pytest.mark.parametrize("form", FORMATS)
def test_training_records_size_and_unit(flat, form):
    for part, array in (("images", IMAGE), ("labels", LABEL)):
        (flat / "data" / part).mkdir(parents=True)
        for name in ("a", "b"):
            write(flat / "data" / part / f"{name}{'_cell' if part == 'labels' else ''}.{form}", array)
    assert main(["train", "-i", "data", "-o", "out", *TINY]) == 0
    state = torch.load("out/model/model_1.pth", weights_only=True)
    known = state["config"]["dataset_config"]
    assert known["trained_spacing"] == pytest.approx(SPACING)
    assert known["trained_unit"] == "micrometer"


@pytest.mark.parametrize("into", FORMATS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_prediction_has_size_and_unit_of_its_image_in_every_format(flat, form, into):
    write(flat / f"image.{form}", IMAGE)
    save_checkpoint(flat / "m.pth")
    flags = ["--device", "cpu", "--amp", "off", "--quiet", "--targets", "ink"]
    assert main(["predict", "-i", f"image.{form}", "-m", "m.pth", "-o", f"p.{into}", *flags]) == 0
    found = open_volume(
        flat / "p.zarr" / "ink" if into == "zarr" else next(flat.glob(f"p*.{into.split('.')[-1]}"))
    )
    assert found.shape == SHAPE
    assert found.geometry.spacing == pytest.approx(SPACING, rel=1e-6)
    assert found.geometry.unit == "micrometer"


@pytest.mark.parametrize("truth", FORMATS)
@pytest.mark.parametrize("form", FORMATS)
def test_evaluation_measures_in_the_unit_of_the_files(flat, form, truth, capsys):
    grown = LABEL.copy()
    grown[9] = LABEL[8]  # one slice too thick: 3 micrometers
    write(flat / f"p.{form}", grown * 255)
    write(flat / f"l.{truth}", LABEL)
    flags = ["--metrics", "dice,hd95,surface_dice", "--tolerance", "2.9", "--quiet"]
    assert main(["evaluate", "-p", f"p.{form}", "-l", f"l.{truth}", "-o", "r", *flags]) == 0
    mean = json.loads((flat / "r" / "metrics.json").read_text())["mean"]
    assert mean["label/hd95"] == pytest.approx(3.0, rel=1e-6)
    assert mean["label/dice"] == pytest.approx(2 * 5 / 11)
    assert mean["label/surface_dice"] < 1
    assert "µm" in (flat / "r" / "report.html").read_text()


@pytest.mark.parametrize("form", FORMATS)
def test_volumes_in_several_units_are_trained_and_scored_in_one(flat, form):
    grown = LABEL.copy()
    grown[9] = LABEL[8]
    for part, suffix, array in (
        ("data/images", "", IMAGE),
        ("data/labels", "_cell", LABEL),
        ("p", "_cell", grown),
    ):
        (flat / part).mkdir(parents=True)
        write(flat / part / f"a{suffix}.{form}", array)
        write(flat / part / f"b{suffix}.{form}", array, [size / 1000 for size in SPACING], "millimeter")
    cases = open_cases(discover(flat / "data"))
    assert [case.unit for case in cases] == ["micrometer"] * 2
    assert [case.spacing for case in cases] == [pytest.approx(SPACING, rel=1e-5)] * 2
    flags = ["--metrics", "hd95", "--quiet"]
    assert main(["evaluate", "-p", "p", "-l", "data/labels", "-o", "r", *flags]) == 0
    found = json.loads((flat / "r" / "metrics.json").read_text())["cases"]
    assert [case["cell/hd95"] for case in found.values()] == [pytest.approx(3.0, rel=1e-5)] * 2


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "ome.tif"])
def test_evaluation_says_that_a_label_lies_elsewhere(flat, form, capfd):
    write(flat / f"p.{form}", LABEL * 255, start=(30, 20, 15))
    for name, start in (("here", (30, 20, 15)), ("there", (30, 20, 45))):
        write(flat / f"{name}.{form}", LABEL, start=start)
        words = ["-p", f"p.{form}", "-l", f"{name}.{form}", "-o", f"r_{name}", "--metrics", "dice"]
        assert main(["evaluate", *words, "--quiet"]) == (2 if name == "there" else 0)
        assert ("elsewhere" in capfd.readouterr().err) is (name == "there")


@pytest.mark.parametrize("size", [0.0, float("nan"), -3.0])
def test_a_size_that_cannot_be_is_said_in_prediction_and_refused_in_evaluation(flat, size, capfd):
    write(flat / "a.zarr", LABEL * 255, (size, 2.0, 1.5))
    write(flat / "l.zarr", LABEL)
    save_checkpoint(flat / "m.pth")
    flags = ["--device", "cpu", "--amp", "off", "--quiet", "--targets", "ink"]
    assert main(["predict", "-i", "a.zarr", "-m", "m.pth", "-o", "p.zarr", *flags]) == 0
    assert (
        f"a.zarr: states a voxel size of {size:g} x 2 x 1.5, which counts as unknown"
        in capfd.readouterr().err
    )
    words = ["-p", "a.zarr", "-l", "l.zarr", "-o", "r", "--metrics", "hd95", "--quiet"]
    assert main(["evaluate", *words]) == 2
    assert (
        f"a.zarr: expected voxel sizes above 0, found a voxel size of {size:g} x 2" in capfd.readouterr().err
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
def test_volumes_thinner_than_the_window_are_predicted_in_every_format(flat, form, depth):
    write(flat / f"image.{form}", IMAGE[:depth])
    save_checkpoint(flat / "m.pth")
    # A plane may be of a volume or not, and a small axis channels: the user says it.
    flags = ["--device", "cpu", "--amp", "off", "--quiet", "--targets", "ink", "--axes", "zyx"]
    assert main(["predict", "-i", f"image.{form}", "-m", "m.pth", "-o", "p.zarr", *flags]) == 0
    found = open_volume(flat / "p.zarr" / "ink")
    assert found.shape == (depth, *SHAPE[1:])
    assert found.geometry.spacing == pytest.approx(SPACING, rel=1e-6)
    # The values do not depend on the file that the image came from.
    write(flat / "plain.zarr", IMAGE[:depth])
    assert main(["predict", "-i", "plain.zarr", "-m", "m.pth", "-o", "q.zarr", *flags]) == 0
    other = open_volume(flat / "q.zarr" / "ink")
    box = tuple(slice(0, size) for size in found.shape)
    np.testing.assert_array_equal(found.read(box), other.read(box))


@pytest.mark.parametrize("truth", FORMATS)
def test_a_label_of_one_slice_is_scored_against_a_prediction_of_one_slice(flat, truth):
    write_ome(flat / "p.zarr", LABEL[5:6] * 255, SPACING, ("micrometer",) * 3)
    write(flat / f"l.{truth}", LABEL[5:6])
    assert (
        main(["evaluate", "-p", "p.zarr", "-l", f"l.{truth}", "-o", "r", "--metrics", "dice", "--quiet"]) == 0
    )
    assert json.loads((flat / "r" / "metrics.json").read_text())["mean"]["label/dice"] == 1


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_plane_is_a_volume_of_one_slice_by_its_axes(flat, compression, channels):
    stored = np.random.default_rng(1).integers(0, 255, (20, 16, 3)[: 2 + (channels > 1)], np.uint8)
    tifffile.imwrite(
        flat / "a.tif", stored, compression=compression, photometric="rgb" if channels > 1 else None
    )
    volume = open_volume(flat / "a.tif", axes="zyx" if channels == 1 else "zyxc")
    assert (volume.shape, volume.channels) == ((1, 20, 16), channels)
    expected = stored[None, None] if channels == 1 else np.moveaxis(stored, -1, 0)[:, None]
    np.testing.assert_array_equal(
        volume.read((slice(0, 1), slice(3, 20), slice(0, 9))), expected[:, :, 3:, :9]
    )
    assert open_volume(flat / "a.tif").shape == (20, 16)
