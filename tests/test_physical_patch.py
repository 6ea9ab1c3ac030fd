"""A patch stated in lengths: converted by the voxel size of the data, in settings and in the flag."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from data_folders import SHORT, ball, image_of, write_tiff_folder

from volumen.cli.main import main
from volumen.cli.train import parse_patch_size
from volumen.config.manager import ConfigManager
from volumen.data.space.units import parse_length
from volumen.utils.errors import VolumenError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def save(path, array, spacing, unit):
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("0", data=array, chunks=array.shape)
    axes = [
        {"name": name, "type": "space", **({"unit": unit} if unit else {})} for name in "zyx"[-array.ndim :]
    ]
    scale = [{"type": "scale", "scale": list(spacing)}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]


def folder(root, *spacings, shape=(24, 48, 48), unit="micrometer"):
    """Write one OME-Zarr volume per voxel size."""
    for number, spacing in enumerate(spacings):
        label = ball(shape)
        save(root / "images" / f"v{number}.zarr", image_of(label), spacing, unit)
        save(root / "labels" / f"v{number}_ink.zarr", label, spacing, unit)
    return str(root)


def config(root, patch, **data):
    return ConfigManager(dataset_dir=root, tr_config={"patch_size": patch}, dataset_config=data, device="cpu")


@pytest.mark.parametrize(
    ("unit", "patch"),
    [
        ("micrometer", ["20um", "8um", "8 µm"]),
        ("micrometer", ["0.02mm", "8000nm", "8μm"]),
        ("nanometer", ["20nm", "80angstrom", "8nm"]),
        ("millimeter", ["2cm", "8mm", "0.008m"]),
        ("micrometer", [10, "8um", 16]),
    ],
)
def test_lengths_are_divided_by_the_voxel_size(tmp_path, unit, patch):
    root = folder(tmp_path, (2.0, 0.5, 0.5), unit=unit)
    found = config(root, patch)
    assert found.requested_patch_size == (10, 16, 16)
    assert all(size % step == 0 for size, step in zip(found.patch_size, np.prod(found.plan.strides, axis=0)))
    assert all(size >= n for size, n in zip(found.patch_size, (10, 16, 16)))
    in_voxels = config(root, [10, 16, 16])
    assert found.plan == in_voxels.plan
    assert found.snapshot()["tr_config"]["patch_size"] == list(found.patch_size)


def test_one_length_is_that_of_every_axis(tmp_path):
    assert config(folder(tmp_path, (2.0, 0.5, 0.5)), "16um").requested_patch_size == (8, 32, 32)


def test_two_dimensions(tmp_path):
    root = folder(tmp_path, (0.25, 0.5), shape=(64, 96))
    assert config(root, "12um").requested_patch_size == (48, 24)
    assert config(root, ["8um", "0.012mm"]).requested_patch_size == (32, 24)
    with pytest.raises(VolumenError, match=r"expected 2 numbers, as .* is 2D, found"):
        _ = config(root, ["8um"] * 3).patch_size


def test_the_target_spacing_is_the_voxel_size_of_the_patch(tmp_path):
    root = folder(tmp_path, (2.0, 0.5, 0.5), (1.0, 0.5, 0.5), (4.0, 0.5, 0.5))
    assert config(root, "16um").requested_patch_size == (8, 32, 32)  # the median
    assert config(root, "16um", target_spacing=[1.0, 1.0, 1.0]).requested_patch_size == (16, 16, 16)


def test_strides_of_the_settings_enlarge_the_patch(tmp_path):
    found = ConfigManager(
        dataset_dir=folder(tmp_path, (1.0, 1.0, 1.0)),
        tr_setup={"autoconfigure": False},
        tr_config={"patch_size": "13um"},
        model_config={"strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]], "features_per_stage": [4, 8, 8],
                      "kernel_sizes": [[3, 3, 3]] * 3, "n_blocks_per_stage": [1, 1, 1]},
        device="cpu",
    )  # fmt: skip
    assert found.patch_size == (14, 16, 16)
    assert (
        found.patch_line
        == "patch 13um: 13x13x13 voxels, enlarged to 14x16x16 for the strides, which is 14x16x16 µm"
    )


def test_a_time_budget_and_the_memory_leave_the_patch_as_it_is(tmp_path):
    from volumen.time_budget.candidates import candidates

    found = config(folder(tmp_path, (2.0, 0.5, 0.5)), ["20um", "8um", "8um"])
    assert {one.patch_size for one in candidates(found)} == {found.patch_size}


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("20", "expected a length with its unit, such as 20um or 0.5mm, found '20'"),
        ("20 parsec", "found '20 parsec'"),
        ("0um", "found '0um'"),
        ("-5um", "found '-5um'"),
        (["5um", "x", "5um"], "expected a length with its unit"),
        (["5um", 0, "5um"], "expected a number of at least 1, found 0"),
        ([["5um"], "5um", "5um"], "expected"),
        (["5um", "5um"], "expected 3 numbers, as .* is 3D"),
        ("20mm", "expected lengths that suit images of up to 24 voxels .* found 20mm, 1e\\+04 voxels; check the unit"),
        ("20pm", "check the unit"),
    ],
)  # fmt: skip
def test_lengths_that_are_none(tmp_path, patch, words):
    with pytest.raises(VolumenError, match=words) as caught:
        _ = config(folder(tmp_path, (2.0, 0.5, 0.5)), patch).patch_size
    assert "\n" not in str(caught.value)
    assert "tr_config.patch_size" in str(caught.value)


@pytest.mark.parametrize("unit", [None, "furlong"])
def test_an_image_without_a_unit_of_length_is_refused(tmp_path, unit):
    with pytest.raises(
        VolumenError, match=f"for a patch of 5um, found a voxel size in {unit or 'no unit'}; give"
    ):
        _ = config(folder(tmp_path, (2.0, 0.5, 0.5), unit=unit), "5um").patch_size


def test_an_image_without_a_voxel_size_is_refused(tmp_path):
    root = write_tiff_folder(tmp_path, {"a": {"ink": ball((16, 16, 16))}})
    with pytest.raises(
        VolumenError, match=r"a\.tif, for a patch of 5um, found none; give the patch in voxels"
    ):
        _ = config(str(root), "5um").patch_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64,64,32", [64, 64, 32]),
        ("64x64", [64, 64]),
        ("[64 64 32]", [64, 64, 32]),
        ("20um", "20um"),
        ("20um,5um,5um", ["20um", "5um", "5um"]),
        ("20 um x 5um x 0.5 mm", ["20um", "5um", "0.5mm"]),
        ("16,5um,5um", [16, "5um", "5um"]),
    ],
)
def test_the_flag(text, size):
    assert parse_patch_size(text) == size


@pytest.mark.parametrize(
    "text", ["64", "64,0,64", "5um,5um,5um,5um", "20parsec", "um", "", "64,64.5,64", "-5um"]
)
def test_a_flag_that_is_no_patch(text):
    with pytest.raises(VolumenError, match="--patch-size: expected two or three positive numbers such as"):
        parse_patch_size(text)


def test_a_length_is_a_number_and_a_unit():
    assert parse_length(" 1.5 mm ") == (1.5, "millimeter")
    assert parse_length("3 microns") == (3.0, "micrometer")
    assert parse_length("2Å") == (2.0, "angstrom")
    for text in ("", "um", "5", "5 px", "5 voxels", "1e3um", "5um5um", "nan um"):
        assert parse_length(text) is None


def test_commands(tmp_path, capsys):
    root = folder(tmp_path / "data", (2.0, 1.0, 1.0))
    small = ["--set", "model_config.features_per_stage=[4, 8]", "--device", "cpu", "--batch-size", "1"]
    line = "patch 20um x 20um x 20um: 10x20x20 voxels"
    assert main(["inspect", root, "--patch-size", "20um,20um,20um"]) == 0
    assert line in capsys.readouterr().out
    train = ["train", "-i", root, "-o", str(tmp_path / "out"), *SHORT, *small]
    assert main([*train, "--patch-size", "20um,20um,20um"]) == 0
    assert line in capsys.readouterr().err
    assert main([*train, "--patch-size", "20um", "--model-name", "one"]) == 0
    assert "patch 20um: 10x20x20 voxels" in capsys.readouterr().err
