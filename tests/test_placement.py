"""Labels, masks and volumes in space: what fits is used, what is turned is turned back, what lies elsewhere is said."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases, warn_of_differing_sizes
from volumen.data.turned import TurnedVolume
from volumen.utils.errors import VolumenError

SHAPE = (6, 8, 10)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, SHAPE).astype(np.uint8)
LABEL = (RNG.random(SHAPE) > 0.5).astype(np.uint8)
AFFINE = np.array([[-2.0, 0, 0, 5], [0, 1.5, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])


def write_ome(path, array, scale, units=("nanometer",) * 3, translation=None, version="0.4", whole=None):
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("0", data=array, chunks=array.shape)
    steps = [{"type": "scale", "scale": list(scale)}]
    if translation is not None:
        steps.append({"type": "translation", "translation": list(translation)})
    axes = [{"name": n, "type": "space", **({"unit": u} if u else {})} for n, u in zip("zyx", units)]
    entry = {
        "version": version,
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": steps}],
    }
    if whole is not None:
        entry["coordinateTransformations"] = whole
    group.attrs["multiscales"] = [entry]


def write_nifti(path, array, affine=AFFINE, unit="mm"):
    """Store an array (Z, Y, X) as NIfTI (X, Y, Z)."""
    image = nibabel.Nifti1Image(array.T, affine)
    image.header.set_xyzt_units(unit)
    image.to_filename(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "labels", "masks"):
        (tmp_path / name).mkdir()
    return tmp_path


def cases_of(folder, **options):
    return open_cases(discover(folder), **options)


def whole(volume):
    return volume.read((slice(None),) * 3)[0]


def test_units_per_axis_of_ome_zarr_are_converted(tmp_path):
    write_ome(
        tmp_path / "a.zarr",
        IMAGE,
        (0.04, 4, 4),
        ("micrometer", "nanometer", "nanometer"),
        (0.4, 80, 80),
    )
    geometry = open_volume(tmp_path / "a.zarr").geometry
    assert (geometry.spacing, geometry.unit) == (pytest.approx((0.04, 0.004, 0.004)), "micrometer")
    assert geometry.origin == pytest.approx((0.4, 0.08, 0.08))


def test_transformations_of_the_whole_come_after_those_of_the_level(tmp_path):
    write_ome(
        tmp_path / "a.zarr", IMAGE, (2, 1, 1), translation=(3, 4, 5),
        whole=[{"type": "scale", "scale": [10, 10, 20]}, {"type": "translation", "translation": [1, 1, 1]}],
    )  # fmt: skip
    geometry = open_volume(tmp_path / "a.zarr").geometry
    assert geometry.spacing == (20, 10, 20)
    assert geometry.origin == (31, 41, 101)


def test_plain_zarr_attributes_of_other_tools(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", data=IMAGE, chunks=SHAPE)
    array.attrs.update({"resolution": [40, 4, 4], "offset": [400, 8, 8], "units": ["nm", "nm", "nm"]})
    geometry = open_volume(tmp_path / "a.zarr").geometry
    assert (geometry.spacing, geometry.unit, geometry.origin) == ((40, 4, 4), "nanometer", (400, 8, 8))


@pytest.mark.parametrize(
    ("translation", "units", "warns"),
    [
        ((40, 80, 80), ("nanometer",) * 3, False),
        ((0.04, 0.08, 0.08), ("micrometer",) * 3, False),  # the same place, in another unit
        ((41.9, 80, 80), ("nanometer",) * 3, False),  # less than half a voxel
        ((440, 80, 80), ("nanometer",) * 3, True),
        (None, ("nanometer",) * 3, True),
    ],
)
def test_a_label_at_another_translation_than_its_image_is_said(folder, caplog, translation, units, warns):
    write_ome(folder / "images/a.zarr", IMAGE, (4, 4, 4), translation=(40, 80, 80))
    size = 0.004 if units[0] == "micrometer" else 4
    write_ome(folder / "labels/a_cell.zarr", LABEL, (size,) * 3, units, translation)
    cases_of(folder)
    assert ("lies elsewhere in space" in caplog.text) is warns


def test_a_mask_elsewhere_is_said_too(folder, caplog):
    write_ome(folder / "images/a.zarr", IMAGE, (4, 4, 4))
    write_ome(folder / "labels/a_cell.zarr", LABEL, (4, 4, 4))
    write_ome(folder / "masks/a_cell.zarr", LABEL, (4, 4, 4), translation=(0, 0, 40))
    cases_of(folder)
    assert "masks/a_cell.zarr lies elsewhere in space" in caplog.text
    assert "it begins 0, 0, 10 voxels (z, y, x) away" in caplog.text


def reoriented(array, affine, codes):
    """Return array (Z, Y, X) and affine of the same image stored with axes X, Y, Z that run to `codes`."""
    source = nibabel.Nifti1Image(array.T, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
    )
    turned = source.as_reoriented(turn)
    return np.asarray(turned.dataobj).T, turned.affine


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_a_label_stored_in_another_orientation_is_turned_to_its_image(folder, caplog, codes):
    write_nifti(folder / "images/a.nii", IMAGE)
    write_nifti(folder / "labels/a_cell.nii", *reoriented(LABEL, AFFINE, codes))
    (case,) = cases_of(folder)
    np.testing.assert_array_equal(whole(case.labels["cell"]), LABEL)
    assert "elsewhere" not in caplog.text


def test_a_flip_that_would_leave_the_place_is_said_and_not_done(folder, caplog):
    """As where a program drops the affine: the arrays fit voxel by voxel, though the file says otherwise."""
    write_nifti(folder / "images/a.nii", IMAGE)
    write_nifti(folder / "labels/a_cell.nii", LABEL, np.diag([2.0, 1.5, 3.0, 1.0]))
    (case,) = cases_of(folder)
    np.testing.assert_array_equal(whole(case.labels["cell"]), LABEL)
    assert "a_cell.nii lies elsewhere in space than" in caplog.text
    assert "(SAR, not SAL)" in caplog.text


def test_a_rotation_that_is_no_quarter_turn_is_said(folder, caplog):
    write_nifti(folder / "images/a.nii", IMAGE)
    angle = np.radians(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    write_nifti(folder / "labels/a_cell.nii", LABEL, turn @ AFFINE)
    cases_of(folder)
    assert "lies elsewhere in space" in caplog.text
    assert "turned by 20.0 degrees" in caplog.text


def test_training_volumes_are_turned_to_the_first(folder, caplog):
    write_nifti(folder / "images/a.nii", IMAGE)
    write_nifti(folder / "labels/a_cell.nii", LABEL)
    write_nifti(folder / "images/b.nii", *reoriented(IMAGE, AFFINE, "PIR"))
    write_nifti(folder / "labels/b_cell.nii", *reoriented(LABEL, AFFINE, "PIR"))
    first, second = cases_of(folder)
    assert isinstance(second.image, TurnedVolume)
    np.testing.assert_array_equal(whole(second.image), whole(first.image))
    np.testing.assert_array_equal(whole(second.labels["cell"]), LABEL)
    assert first.spacing == second.spacing == (3, 1.5, 2)
    assert "b.nii: the axes run to RIP, and are turned to SAL" in caplog.text


def test_an_inclined_scan_is_taken_and_a_tilted_one_said(folder, caplog):
    for name, degrees in (("a", 0), ("b", 5), ("c", 30)):
        angle = np.radians(degrees)
        turn = np.eye(4)
        turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        write_nifti(folder / f"images/{name}.nii", IMAGE, turn @ AFFINE)
        write_nifti(folder / f"labels/{name}_cell.nii", LABEL, turn @ AFFINE)
    cases_of(folder)
    assert "c.nii is turned by 30 degrees" in caplog.text
    assert "b.nii" not in caplog.text


def test_volumes_in_different_units_are_brought_to_one(folder):
    write_ome(folder / "images/a.zarr", IMAGE, (40, 4, 4))
    write_ome(folder / "labels/a_cell.zarr", LABEL, (40, 4, 4))
    write_ome(folder / "images/b.zarr", IMAGE, (0.04, 0.004, 0.004), ("micrometer",) * 3)
    write_ome(folder / "labels/b_cell.zarr", LABEL, (0.04, 0.004, 0.004), ("micrometer",) * 3)
    for case in cases_of(folder):
        assert case.spacing == pytest.approx((40, 4, 4))
        assert case.unit == "nanometer"


def test_a_volume_without_a_size_takes_that_of_the_others_and_says_so(folder, caplog):
    for name in "ab":
        write_ome(folder / f"images/{name}.zarr", IMAGE, (40, 4, 4))
        write_ome(folder / f"labels/{name}_cell.zarr", LABEL, (40, 4, 4))
    for path in ("images/c.zarr", "labels/c_cell.zarr"):
        zarr.create_array(folder / path, data=LABEL, chunks=SHAPE)
    assert [case.spacing for case in cases_of(folder)] == [(40, 4, 4)] * 3
    assert "c.zarr: states no voxel size" in caplog.text
    assert "Set dataset_config.spacing" in caplog.text


def test_voxels_of_very_different_sizes_in_one_folder_are_said(folder, caplog):
    for name, size in (("a", 4), ("b", 40)):
        write_ome(folder / f"images/{name}.zarr", IMAGE, (size,) * 3)
        write_ome(folder / f"labels/{name}_cell.zarr", LABEL, (size,) * 3)
    warn_of_differing_sizes(cases_of(folder))
    assert "b.zarr: the voxels have another size than in" in caplog.text


def write_sized(path, array, form, sizes):
    """Store an array with a voxel size (Z, Y, X) in micrometers, whatever it is."""
    if form == "ome.tif":
        known = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", sizes)}
        tifffile.imwrite(f"{path}.ome.tif", array, ome=True, metadata={"axes": "ZYX", **known})
    elif form == "tif":
        tifffile.imwrite(
            f"{path}.tif", array, imagej=True, resolution=(1 / sizes[2], 1 / sizes[1]),
            metadata={"axes": "ZYX", "spacing": sizes[0], "unit": "um"},
        )  # fmt: skip
    elif form == "nii":
        # Past nibabel, which writes no such header.
        nibabel.Nifti1Image(array.T, np.diag([sizes[2], sizes[1], 1, 1])).to_filename(f"{path}.nii")
        content = bytearray(Path(f"{path}.nii").read_bytes())
        content[252:256] = struct.pack("<2h", 0, 1)  # qform_code, sform_code
        content[80:92] = struct.pack("<3f", *sizes[::-1])  # pixdim
        content[312:328] = struct.pack("<4f", 0, 0, sizes[0], 0)  # srow_z
        Path(f"{path}.nii").write_bytes(content)
    else:
        write_ome(f"{path}.zarr", array, sizes, ("micrometer",) * 3)


@pytest.mark.parametrize("form", ["ome.tif", "tif", "nii", "zarr"])
@pytest.mark.parametrize("bad", [0.0, float("nan"), -2.0, float("inf")])
@pytest.mark.parametrize("others", [False, True])
def test_an_impossible_voxel_size_is_one_line_with_the_file(folder, form, bad, others):
    names = ("a", "b") if others else ("b",)
    for name in names:
        sizes = (bad if name == "b" else 2.0, 0.5, 0.5)
        if form == "nii" and bad == -2.0:
            pytest.skip("a negative column is a flip")
        write_sized(folder / "images" / name, IMAGE, form, sizes)
        write_sized(folder / "labels" / f"{name}_cell", LABEL, form, (2.0, 0.5, 0.5))
    with pytest.raises(VolumenError) as caught:
        cases_of(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"images/b.{form}: expected voxel sizes above 0, found a voxel size of " in message
    assert "dataset_config.spacing" in message
    assert [case.spacing for case in cases_of(folder, spacing=(4, 1, 1))] == [(4, 1, 1)] * len(names)


def test_imagej_units_per_axis(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", IMAGE, imagej=True, resolution=(2.0, 4.0),
        metadata={"axes": "ZYX", "spacing": 1500.0, "unit": "um", "zunit": "nm"},
    )  # fmt: skip
    volume = open_volume(tmp_path / "a.tif")
    assert (volume.spacing, volume.unit) == (pytest.approx((1.5, 0.25, 0.5)), "micrometer")


@pytest.mark.parametrize(
    ("resolution", "unit", "spacing"),
    [
        ((20000.0, 10000.0), "CENTIMETER", (1.0, 0.5)),
        ((50800.0, 50800.0), "INCH", (0.5, 0.5)),
        ((300.0, 300.0), "INCH", None),  # a printer's
        ((28.35, 28.35), "CENTIMETER", None),  # 72 pixels per inch
        ((7.0, 7.0), "NONE", None),
    ],
)
def test_resolution_tags_in_2d_are_sizes_unless_they_are_of_print(tmp_path, resolution, unit, spacing):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE[0], resolution=resolution, resolutionunit=unit)
    volume = open_volume(tmp_path / "a.tif")
    assert volume.spacing == (None if spacing is None else pytest.approx(spacing))
    assert volume.unit == (None if spacing is None else "micrometer")


def test_an_ome_tiff_without_the_distance_of_slices_says_so(tmp_path, caplog):
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(tmp_path / "a.ome.tif", IMAGE, ome=True, metadata={"axes": "ZYX", **sizes})
    assert open_volume(tmp_path / "a.ome.tif").spacing is None
    assert "a.ome.tif: states no voxel size along z" in caplog.text


def test_nifti_sizes_come_from_the_affine_and_a_contradiction_is_said(tmp_path, caplog):
    image = nibabel.Nifti1Image(IMAGE.T, None)
    angle = np.radians(30)
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    affine[:2, :2] = (
        np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ affine[:2, :2]
    )
    image.header.set_sform(affine, code=1)
    image.header["pixdim"][1:4] = [1, 1, 1]
    image.to_filename(tmp_path / "a.nii")
    assert open_volume(tmp_path / "a.nii").spacing == pytest.approx((3, 1.5, 2))
    assert "its affine states voxels of 3 x 1.5 x 2, its header (pixdim) 1 x 1 x 1" in caplog.text


def test_a_nifti_without_an_affine_states_its_size_alone(tmp_path):
    image = nibabel.Nifti1Image(IMAGE.T, None)
    image.header["pixdim"][1:4] = [2, 1.5, 3]
    image.to_filename(tmp_path / "a.nii")
    geometry = open_volume(tmp_path / "a.nii").geometry
    assert geometry.spacing == (3, 1.5, 2)
    assert not geometry.is_placed


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("bad", [0.0, -2.0, float("nan")])
def test_sizes_that_nibabel_repairs_in_silence_are_refused(folder, suffix, bad, caplog):
    image = nibabel.Nifti1Image(IMAGE.T, None)
    image.to_filename(folder / "images/a.nii")
    content = bytearray((folder / "images/a.nii").read_bytes())
    content[80:92] = struct.pack("<3f", bad, 1.5, 3)
    (folder / "images/a.nii").unlink()
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(folder / f"images/a{suffix}", "wb") as file:
        file.write(content)
    nibabel.Nifti1Image(LABEL.T, None).to_filename(folder / "labels/a_cell.nii")
    with pytest.raises(VolumenError, match=r"images/a\.nii.*found a voxel size of 3 x 1\.5 x "):
        cases_of(folder)
    assert "setting" not in caplog.text


def test_qform_and_sform_that_run_otherwise_are_said(tmp_path, caplog):
    image = nibabel.Nifti1Image(IMAGE.T, AFFINE)
    image.header.set_qform(np.diag([2.0, 1.5, 3.0, 1.0]), code=1)
    image.to_filename(tmp_path / "a.nii")
    assert open_volume(tmp_path / "a.nii").geometry.orientation == "SAL"
    assert "a.nii: its sform runs to SAL, its qform to SAR; the sform counts" in caplog.text
