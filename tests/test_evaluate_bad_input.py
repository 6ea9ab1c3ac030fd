"""What cannot be scored is one line and a non-zero exit, in every format."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import zarr
from test_error_places import write

from volumen.cli.main import main

SPACING = (2.0, 1.0, 1.0)
TWO = np.zeros((8, 20, 24), np.uint8)
TWO[2:5, 4:12, 4:12] = TWO[2:5, 14:18, 4:12] = 1
"""A class of two pieces."""
NUMBERED = TWO.copy()
NUMBERED[2:5, 14:18] *= 2
CLASSES = TWO.copy()
CLASSES[2:5, :, 8:] *= 2
"""Two classes of two pieces each."""
MANY = (np.arange(TWO.size).reshape(TWO.shape) // 4).astype(np.uint16)


def move(path):
    """Move a volume by 20 mm along z."""
    if path.name.endswith(".zarr"):
        group = zarr.open_group(str(path), mode="a")
        scales = group.attrs["multiscales"]
        steps = scales[0]["datasets"][0]["coordinateTransformations"]
        steps.append({"type": "translation", "translation": [20.0, 0.0, 0.0]})
        group.attrs["multiscales"] = scales
    else:
        image = nibabel.load(path)
        affine = image.affine.copy()
        affine[2, 3] += 20
        values = np.array(image.dataobj)
        moved = nibabel.Nifti1Image(values, affine)
        moved.header.set_xyzt_units("mm")
        nibabel.save(moved, path)


def run(folder, ending, pred, truth, *flags, sizes=(SPACING, SPACING), moved=False):
    """Return the exit status and the log of `volumen evaluate`."""
    found, label = folder / "found" / f"a_ink.{ending}", folder / "data" / "labels" / f"a_ink.{ending}"
    write(found, pred, sizes[0])
    write(label, truth, sizes[1])
    if moved:
        move(label)
    command = ["evaluate", "-p", str(folder / "found"), "-l", str(folder / "data"), "-o", str(folder / "out")]
    return main([*command, "--quiet", "--worst", "0", *flags])


FORMATS = ("zarr", "tif", "nii")
CASES = {
    "shape": (TWO[:, :-1], TWO, (), "expected shape (8, 19, 24), as the prediction's image, found (8, 20, 24)"),
    "instances against a class": (
        NUMBERED, TWO, ("--instances", "ink"),
        "expected numbers of instances, as the prediction has, found the value 1 alone in 2 pieces",
    ),
    "a class against instances": (
        TWO, NUMBERED, ("--instances", "ink"),
        "expected numbers of instances, as the label has, found the value 1 alone in 2 pieces",
    ),
    "classes against many instances": (CLASSES, MANY, (), "expected classes 0 to 254, found 959"),
    "empty": (0 * TWO, 0 * TWO, (), "nothing to score: prediction and label of it are empty"),
    "a score of directions": (TWO, TWO, ("--metrics", "angular_error"), "expected scores of ink (labels)"),
    "a score of values": (TWO, TWO, ("--metrics", "dice,mae"), "expected scores of ink (labels)"),
    "a score of labels for instances": (
        NUMBERED, NUMBERED, ("--metrics", "dice", "--instances", "ink"), "expected scores of ink (instances)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_scored_is_one_line(tmp_path, capsys, name, ending):
    pred, truth, flags, words = CASES[name]
    assert run(tmp_path, ending, pred, truth, *flags) not in (0, None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert words in line
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("ending", FORMATS)
def test_another_voxel_size_is_refused_unless_one_is_given(tmp_path, capsys, ending):
    other = (3.0, 1.0, 1.0)
    assert run(tmp_path, ending, TWO, TWO, sizes=(SPACING, other)) not in (0, None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "has voxels of 3 x 1 x 1 millimeter" in line
    assert "give --spacing" in line
    assert run(tmp_path, ending, TWO, TWO, "--spacing", "2,1,1", sizes=(SPACING, other)) in (0, None)


@pytest.mark.parametrize("ending", ["zarr", "nii"])
def test_another_place_is_refused_unless_a_voxel_size_is_given(tmp_path, capsys, ending):
    """A TIFF states no place."""
    assert run(tmp_path, ending, TWO, TWO, moved=True) not in (0, None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "lies elsewhere in space than" in line
    assert "10, 0, 0 voxels (z, y, x) away; correct its translation or affine" in line
    assert run(tmp_path, ending, TWO, TWO, "--spacing", "2,1,1", moved=True) in (0, None)


@pytest.mark.parametrize("ending", ["zarr", "nii"])
def test_a_volume_without_voxels_is_one_line(tmp_path, capsys, ending):
    assert run(tmp_path, ending, TWO[:0], TWO[:0]) not in (0, None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "shape" in line


def test_a_volume_that_is_masked_out_is_one_line(tmp_path, capsys):
    write(tmp_path / "data" / "masks" / "a.tif", 0 * TWO, SPACING)
    assert run(tmp_path, "tif", TWO, TWO) not in (0, None)
    assert "nothing to score: every voxel of it is masked out or ignored" in capsys.readouterr().err


def test_a_single_object_is_scored_against_several(tmp_path, capsys):
    one = np.zeros_like(TWO)
    one[2:5, 4:18, 4:12] = 1
    assert run(tmp_path, "tif", NUMBERED, one, "--instances", "ink") in (0, None)
    assert "the value 1 alone where the other side numbers 2 instances" in capsys.readouterr().err
