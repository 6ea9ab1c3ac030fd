"""NIfTI written by nibabel and by hand, turned to (Z, Y, X)."""

from __future__ import annotations

import gzip
import pickle
import struct

import nibabel
import numpy as np
import pytest

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.opening import open_volume
from volumen.utils.errors import VolumenError


def random_array(shape=(9, 11, 13), dtype="i2", seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def write_by_hand(path, array, *, slope=0.0, inter=0.0, endian="<", spacing=(2.0, 3.0, 4.0)):
    """Write a NIfTI-1 file of 352 header bytes by the standard's struct; `array` is (X, Y, Z[, ...])."""
    code, bits = {"u1": (2, 8), "i2": (4, 16), "i4": (8, 32), "f4": (16, 32), "u2": (512, 16)}[
        array.dtype.str[1:]
    ]
    header = bytearray(352)
    struct.pack_into(endian + "i", header, 0, 348)
    dims = [array.ndim, *array.shape] + [1] * (7 - array.ndim)
    struct.pack_into(endian + "8h", header, 40, *dims)
    struct.pack_into(endian + "2h", header, 70, code, bits)
    struct.pack_into(endian + "8f", header, 76, 1.0, *spacing, *[1.0] * (7 - len(spacing)))
    struct.pack_into(endian + "3f", header, 108, 352.0, slope, inter)
    header[123] = 2  # xyzt_units: millimeters
    header[344:348] = b"n+1\0"
    data = bytes(header) + array.astype(array.dtype.newbyteorder(endian)).tobytes(order="F")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def assert_reads_like(volume, expected, seed=0):
    assert (volume.channels, *volume.shape) == expected.shape
    rng = np.random.default_rng(seed)
    regions = [tuple(slice(0, size) for size in volume.shape)]
    for _ in range(10):
        bounds = [sorted(rng.integers(0, size + 1, 2)) for size in volume.shape]
        regions.append(tuple(slice(int(low), int(high)) for low, high in bounds))
    for region in regions:
        block = volume.read(region)
        np.testing.assert_array_equal(block, expected[(slice(None), *region)])
        assert block.dtype == volume.dtype
        assert block.dtype.isnative


@pytest.fixture(params=["kept", "streamed"])
def cached(request):
    """Run with decompressed volumes kept in memory, and with none kept."""
    bound = BLOCKS.max_bytes
    BLOCKS.resize(bound if request.param == "kept" else 0)
    yield request.param
    BLOCKS.resize(bound)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("dtype", "endian"), [("u1", "<"), ("i2", ">"), ("f4", "<"), ("u2", "<")])
def test_written_by_hand(tmp_path, ending, dtype, endian, cached):
    array = random_array(dtype=dtype)
    write_by_hand(tmp_path / f"a{ending}", array, endian=endian)
    volume = open_volume(tmp_path / f"a{ending}")
    assert_reads_like(volume, array.T[None])
    assert volume.dtype == np.dtype(dtype)
    assert (volume.spacing, volume.unit) == ((4.0, 3.0, 2.0), "millimeter")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_scaled_values(tmp_path, ending, cached):
    array = random_array()
    write_by_hand(tmp_path / f"a{ending}", array, slope=0.5, inter=-10.0)
    volume = open_volume(tmp_path / f"a{ending}")
    assert volume.dtype == np.float32
    assert_reads_like(volume, (array.T[None] * 0.5 - 10).astype("f4"))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_channels_in_the_fourth_axis(tmp_path, ending, cached):
    array = random_array((5, 6, 7, 4))
    nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / f"a{ending}")
    assert_reads_like(open_volume(tmp_path / f"a{ending}"), np.moveaxis(array, -1, 0).swapaxes(1, 3))


def test_channels_in_the_fifth_axis(tmp_path):
    array = random_array((5, 6, 7, 1, 3))
    nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii")
    assert_reads_like(open_volume(tmp_path / "a.nii"), np.moveaxis(array[..., 0, :], -1, 0).swapaxes(1, 3))


def test_two_dimensions_and_one_slice(tmp_path):
    array = random_array((9, 11))
    nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii")
    assert_reads_like(open_volume(tmp_path / "a.nii"), array.T[None])
    nibabel.Nifti1Image(array[..., None], np.eye(4)).to_filename(tmp_path / "b.nii")
    assert open_volume(tmp_path / "b.nii").shape == (1, 11, 9)
    assert_reads_like(open_volume(tmp_path / "b.nii", ndim=2), array.T[None])


def test_nifti_2_and_affine(tmp_path):
    array = random_array()
    affine = np.array([[0, -2, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], float)
    nibabel.Nifti2Image(array, affine).to_filename(tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    assert_reads_like(volume, array.T[None])
    np.testing.assert_allclose(volume.affine, affine)
    assert volume.spacing == (3.0, 2.0, 1.5)


def test_damage(tmp_path, cached):
    array = random_array((40, 40, 40))
    write_by_hand(tmp_path / "a.nii", array)
    write_by_hand(tmp_path / "b.nii.gz", array)
    for name in ("a.nii", "b.nii.gz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(VolumenError, match=r"a\.nii: is shorter than its header says, expected 128352 bytes"):
        open_volume(tmp_path / "a.nii")
    volume = open_volume(tmp_path / "b.nii.gz")
    with pytest.raises(VolumenError, match=r"b\.nii\.gz: is truncated or corrupt .*; copy it again"):
        volume.read((slice(0, 40),) * 3)
    (tmp_path / "c.nii.gz").write_bytes(b"\x1f\x8b" + bytes(40))
    with pytest.raises(VolumenError, match=r"c\.nii\.gz: its NIfTI header cannot be read"):
        open_volume(tmp_path / "c.nii.gz")


def test_more_than_space_and_channels(tmp_path):
    nibabel.Nifti1Image(random_array((4, 5, 6, 2, 3)), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(
        VolumenError, match=r"expected \(X, Y\[, Z\]\[, channels\]\), found shape \(4, 5, 6, 2, 3\)"
    ):
        open_volume(tmp_path / "a.nii")


def test_pickled_and_fingerprinted(tmp_path):
    write_by_hand(tmp_path / "a.nii.gz", random_array())
    volume = open_volume(tmp_path / "a.nii.gz")
    region = (slice(1, 5),) * 3
    again = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(again.read(region), volume.read(region))
    before = volume.fingerprint()
    assert again.fingerprint() == before
    write_by_hand(tmp_path / "a.nii.gz", random_array(seed=1))
    assert open_volume(tmp_path / "a.nii.gz").fingerprint() != before


def test_real_images(real_data):
    folder = real_data("hippocampus")
    for file in sorted((folder / "images").iterdir())[:3]:
        image = nibabel.load(file)
        volume = open_volume(file)
        assert_reads_like(volume, np.asarray(image.dataobj).T[None])
        np.testing.assert_array_equal(volume.affine, image.affine)
