"""DICOM series, written by pydicom: order, values and place, and what is no regular grid."""

from __future__ import annotations

import numpy as np
import pytest
from test_more_formats import check

from volumen.data.formats.detection import detect_format
from volumen.data.formats.opening import open_volume
from volumen.inference.jobs import image_paths, volume_items
from volumen.utils.errors import VolumenError

pydicom = pytest.importorskip("pydicom")
SHAPE = (6, 7, 5)
STORED = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
"""Directions of a row and of a column."""


def write_slice(path, pixels, position, axes=(1, 0, 0, 0, 1, 0), series="1.2.3", **tags):
    """Write one slice."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.SeriesInstanceUID, dataset.Modality = series, "CT"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelSpacing, dataset.SliceThickness = [0.7, 0.4], 5.0
    if position is not None:
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position), list(axes)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def whole(path):
    volume = open_volume(path)
    return volume.read(tuple(slice(0, n) for n in volume.shape))


def normal_of(axes):
    return np.cross(axes[:3], axes[3:])


def write_series(folder, stored=STORED, axes=(1, 0, 0, 0, 1, 0), step=2.5, first=(10, 20, 30), **tags):
    """Write a series whose file names have another order than its slices."""
    for number, pixels in enumerate(stored):
        position = np.array(first) + number * step * normal_of(axes)
        write_slice(folder / f"IM{(number * 7 + 3) % 23:04d}", pixels, position, axes, **tags)
    return folder


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), OBLIQUE, (0, 1, 0, 0, 0, -1)])
def test_slices_are_sorted_by_position_and_placed(tmp_path, axes):
    folder = write_series(tmp_path / "ct", axes=axes)
    (folder / "notes.txt").write_text("x")
    assert detect_format(folder) == "dicom"
    volume = open_volume(folder)
    check(volume, STORED[None])
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.4))
    assert volume.unit == "millimeter"
    for voxel in ((0, 0, 0), (4, 3, 2)):
        z, y, x = voxel
        lps = (
            np.array([10, 20, 30])
            + z * 2.5 * normal_of(axes)
            + y * 0.7 * np.array(axes[3:])
            + x * 0.4 * np.array(axes[:3])
        )
        ras = lps * [-1, -1, 1]
        np.testing.assert_allclose((volume.affine @ [x, y, z, 1])[:3], ras, atol=1e-9)
        np.testing.assert_allclose((volume.geometry.matrix() @ [z, y, x, 1])[:3][::-1], ras, atol=1e-9)
    assert volume.dtype == np.uint16
    assert image_paths(str(folder)) == [str(folder)]


def test_it_lies_where_simple_itk_says(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    folder = write_series(tmp_path / "ct", axes=OBLIQUE, RescaleSlope=2, RescaleIntercept=-1024)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    volume = open_volume(folder)
    check(volume, sitk.GetArrayFromImage(image)[None].astype(volume.dtype))
    for voxel in ((0, 0, 0), (4, 3, 2)):
        lps = np.array(image.TransformIndexToPhysicalPoint(voxel))
        np.testing.assert_allclose((volume.affine @ [*voxel, 1])[:3], lps * [-1, -1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("slope", "intercept", "stored", "dtype"),
    [
        (1, -1024, STORED & 4095, np.int32),  # 16 stored bits reach 64511
        (1, -1024, (STORED & 255).astype(np.uint8), np.int16),
        (1, 0, STORED.astype(np.int16) - 1000, np.int16),
        (2, 0, STORED, np.int32),
        (0.5, 1, STORED, np.float32),
    ],
)
def test_slope_and_intercept_are_applied(tmp_path, slope, intercept, stored, dtype):
    folder = write_series(tmp_path / "ct", stored, RescaleSlope=slope, RescaleIntercept=intercept)
    volume = open_volume(folder)
    check(volume, (stored[None] * float(slope) + intercept).astype(dtype))
    assert volume.dtype == dtype


def test_each_slice_has_its_own_slope(tmp_path):
    for number, pixels in enumerate(STORED):
        write_slice(tmp_path / "pet" / f"{number}.dcm", pixels, (0, 0, number), RescaleSlope=number + 0.5,
                    RescaleIntercept=0)  # fmt: skip
    expected = STORED * (np.arange(6)[:, None, None] + 0.5)
    check(open_volume(tmp_path / "pet"), expected[None].astype(np.float32))


def test_frames_of_one_file_are_a_volume(tmp_path):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def group(**entries):
        item = Dataset()
        for name, value in entries.items():
            setattr(item, name, value)
        return Sequence([item])

    shared = Dataset()
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = group(PixelSpacing=[0.7, 0.4], SliceThickness=9.0)
    shared.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=-7)
    frames = []
    for number in (2, 0, 1):
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[1, 2, 3 + 2.5 * number])
        frames.append(frame)
    write_slice(
        tmp_path / "a.dcm", STORED[[2, 0, 1]], None, NumberOfFrames=3,
        SharedFunctionalGroupsSequence=Sequence([shared]), PerFrameFunctionalGroupsSequence=Sequence(frames),
    )  # fmt: skip
    volume = open_volume(tmp_path / "a.dcm")
    check(volume, STORED[None, :3].astype(np.int32) - 7)
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.4))
    np.testing.assert_allclose(volume.affine[:3, 3], [-1, -2, 3])


def test_a_single_file_is_an_image_in_2d(tmp_path):
    write_slice(tmp_path / "a.dcm", STORED[0], None, PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.3])
    volume = open_volume(tmp_path / "a.dcm")
    check(volume, STORED[:1])
    assert volume.spacing == (0.2, 0.3)
    assert open_volume(tmp_path / "a.dcm", ndim=3).shape == (1, 7, 5)


def test_a_folder_of_single_images_is_many_images_for_a_network_in_2d(tmp_path):
    for number in range(3):
        write_slice(tmp_path / "xr" / f"{number}.dcm", STORED[number], None, series=f"1.2.{number}")
    assert len(volume_items(str(tmp_path / "xr"), ndim=2)) == 3
    assert len(volume_items(str(tmp_path / "xr"), ndim=3)) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "missing",
            r"expected a slice every 2\.5 mm, found 5 mm between .*: 1 missing; copy the series again",
        ),
        ("irregular", r"found 3 mm between .*; resample"),
        (
            "series",
            r"expected the files of one series, found 2 series: '1\.2\.3' \(6 files\), 'T2' \(1 files\)",
        ),
        ("repeated", r"expected one slice per position, found two at \(10, 20, 35\): IM"),
        ("tilt", r"found a tilted gantry \(16\.7 degrees\)"),
        ("skew", r"expected rows and columns at right angles"),
        ("localizer", r"expected the orientation of the other slices"),
        ("size", r"expected 7 x 5 pixels, as in the other slices, found 6 x 5"),
        ("spacing", r"expected pixels of \(0\.7, 0\.4\) mm"),
        ("positions", r"expected slices with a position and an orientation"),
        ("colour", r"expected grey values, found RGB"),
        ("truncated", r"cannot be read"),
        ("nothing", r"expected a series of images, found no image"),
    ],
)
def test_what_is_no_regular_grid_is_one_line(tmp_path, kind, words):
    folder = tmp_path / "ct"
    if kind == "tilt":
        for number, pixels in enumerate(STORED):
            write_slice(folder / f"{number}.dcm", pixels, (0, 0.75 * number, 2.5 * number))
    elif kind == "positions":
        for number, pixels in enumerate(STORED):
            write_slice(folder / f"{number}.dcm", pixels, None)
    elif kind == "nothing":
        write_slice(folder / "a.dcm", STORED[0], None, Rows=None)
    else:
        axes = (1, 0.1, 0, 0, 0.995, 0) if kind == "skew" else (1, 0, 0, 0, 1, 0)
        write_series(folder, axes=axes, **({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}
                                           if kind == "colour" else {}))  # fmt: skip
    extra, place = folder / "X", (10, 20, 45)
    if kind == "missing":
        (folder / f"IM{(3 * 7 + 3) % 23:04d}").unlink()
    elif kind == "irregular":
        write_slice(extra, STORED[0], (10, 20, 45.5))
    elif kind == "series":
        write_slice(extra, STORED[0], place, series="9", SeriesDescription="T2")
    elif kind == "repeated":
        write_slice(extra, STORED[0], (10, 20, 35))
    elif kind == "localizer":
        write_slice(extra, STORED[0], place, axes=(0, 1, 0, 0, 0, -1))
    elif kind == "size":
        write_slice(extra, STORED[0, :6], place)
    elif kind == "spacing":
        write_slice(extra, STORED[0], place, PixelSpacing=[0.7, 0.5])
    elif kind == "truncated":
        path = folder / "IM0003"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(VolumenError, match=words) as caught:
        whole(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    folder = write_series(tmp_path / "ct")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(VolumenError, match=r"needs the package pydicom.*volumen\[formats\]"):
        open_volume(folder)
