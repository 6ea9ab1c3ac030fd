"""Errors while a file is read: what is a program's mistake is never said to be the file's."""

from __future__ import annotations

import errno
import zipfile
from types import SimpleNamespace

import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from volumen.cli.running.execution import EXIT_DEFECT, EXIT_USER_ERROR, explain
from volumen.data.formats.opening import open_volume
from volumen.data.formats.zarr_arrays import chunks as zarr_chunks
from volumen.data.sampling.dataset import SampleError
from volumen.data.sampling.regions import RegionDataset
from volumen.utils.errors import VolumenError, file_fault, is_defect

ARRAY = np.random.default_rng(0).integers(0, 255, (12, 20, 20)).astype("u1")


def write(path):
    """Write a small volume in the format of the path's suffix."""
    name = path.name
    if name.endswith(".tif"):
        tifffile.imwrite(path, ARRAY, compression="zlib", photometric="minisblack")
    elif name.endswith((".nii", ".nii.gz")):
        nibabel.Nifti1Image(ARRAY, np.eye(4)).to_filename(path)
    elif name.endswith(".png"):
        path.write_bytes(imagecodecs.png_encode(ARRAY[0]))
    else:
        zarr.create_array(path, data=ARRAY, chunks=(4, 10, 10))
    return path


def read(path):
    volume = open_volume(path)
    return volume.read(tuple(slice(0, size) for size in volume.shape))


def test_a_missing_name_of_tifffile_is_not_a_damaged_file(tmp_path, monkeypatch):
    """As tifffile 2026.11 took `TiffPageSeries.get_shape` away."""
    path = write(tmp_path / "a.tif")
    monkeypatch.delattr(tifffile.TiffPageSeries, "dataoffset")
    with pytest.raises(AttributeError, match="dataoffset") as caught:
        open_volume(path)
    code, line = explain(caught.value)
    assert code == EXIT_DEFECT
    assert "may be a defect" in line


def test_a_missing_name_of_nibabel_is_not_a_damaged_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz")
    volume = open_volume(path)
    monkeypatch.delattr(nibabel.arrayproxy.ArrayProxy, "get_unscaled")
    with pytest.raises(AttributeError, match="get_unscaled"):
        volume.read((slice(0, 20), slice(0, 20), slice(0, 12)))


def test_a_changed_call_of_imagecodecs_is_not_a_damaged_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png")
    monkeypatch.setattr(imagecodecs, "png_decode", lambda: None)
    with pytest.raises(TypeError, match="positional"):
        read(path)


def test_a_changed_call_of_zarr_is_not_a_damaged_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.zarr")
    monkeypatch.setattr(zarr, "open", lambda path: None)
    with pytest.raises(TypeError, match="mode"):
        read(path)


def test_a_changed_call_while_a_chunk_is_read_is_not_a_damaged_chunk(tmp_path, monkeypatch):
    volume = open_volume(write(tmp_path / "a.zarr"))
    monkeypatch.setattr(zarr_chunks, "read_at", lambda descriptor, length: b"")
    monkeypatch.setattr(zarr_chunks, "read_at", lambda descriptor, length: b"")
    with pytest.raises(TypeError, match="positional"):
        volume.read(tuple(slice(0, size) for size in volume.shape))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("bad tag"), "cannot be read (ValueError: bad tag); copy it again"),
        (
            MemoryError(),
            "free some memory or use a smaller patch; if only this file needs so much, copy it again",
        ),
        (PermissionError(13, "no"), "chmod u+r"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (ModuleNotFoundError("No module named 'x'"), "install the package"),
        (zipfile.BadZipFile("cut"), "copy it again"),
    ],
)
def test_the_remedy_fits_the_error(error, said):
    fault = file_fault(error, "a.tif", "cannot be read", remedy="copy it again")
    assert said in str(fault)
    assert type(error).__name__ in str(fault)
    assert explain(fault)[0] == EXIT_USER_ERROR


def test_what_a_library_raises_inside_itself_blames_nobody_for_sure(tmp_path):
    """zarr asks a list for `get` where the metadata is no mapping: the metadata is at fault, but who knows."""
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("[]")
    with pytest.raises(VolumenError, match=r"a\.zarr: its zarr metadata cannot be read") as caught:
        open_volume(tmp_path / "a.zarr")
    if "AttributeError" in str(caught.value):
        assert "report this" in str(caught.value)


def test_a_type_error_counts_by_who_raised_it():
    with pytest.raises(TypeError) as caught:
        np.zeros("x")
    assert not is_defect(caught.value)
    assert is_defect(NameError("x"))
    assert is_defect(UnboundLocalError("x"))
    assert not is_defect(KeyError("x"))


def test_metadata_without_a_key_is_not_an_absent_array(tmp_path):
    path = write(tmp_path / "a.zarr")
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"fill_value"', '"full_value"'))
    with pytest.raises(VolumenError, match="its zarr metadata cannot be read") as caught:
        open_volume(path)
    assert "check the path" not in str(caught.value)


def test_nifti_header_with_a_negative_size(tmp_path):
    path = write(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[42:44] = (-5).to_bytes(2, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(VolumenError, match=r"a\.nii: its NIfTI header"):
        open_volume(path)


def test_nifti_header_with_an_unknown_unit(tmp_path, caplog):
    path = write(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[123] = 7
    path.write_bytes(content)
    volume = open_volume(path)
    assert volume.unit is None
    assert "unit number 7" in caplog.text
    np.testing.assert_array_equal(read(path)[0], ARRAY.transpose())


def test_tiff_page_with_too_few_strips(tmp_path):
    """The middle page of a stack lists one strip less than its shape needs."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, ARRAY, compression="zlib", rowsperstrip=5, metadata=None)
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[1].tags["StripByteCounts"]
        offset = tag.offset
    content = bytearray(path.read_bytes())
    assert int.from_bytes(content[offset + 4 : offset + 8], "little") == 4
    content[offset + 4 : offset + 8] = (3).to_bytes(4, "little")
    path.write_bytes(content)
    volume = open_volume(path)
    with pytest.raises(VolumenError, match="at least 4 strips or tiles in page 1"):
        volume.read((slice(0, 12), slice(0, 20), slice(0, 20)))


@pytest.mark.parametrize("error", [ValueError("odd"), NameError("name 'x' is not defined")])
def test_a_sample_is_at_fault_unless_the_code_is(tmp_path, error):
    class Case:
        name = "a"
        image = open_volume(write(tmp_path / "a.tif"))

    def transform(sample):
        raise error

    class OneBlock(RegionDataset):
        _chosen = SimpleNamespace(rows=[0])

        def __init__(self):
            self.cases, self.transform = [Case()], transform

        def _location(self, row):
            return SimpleNamespace(case=0, start=(0, 0, 0), size=(12, 20, 20))

    blocks = OneBlock()
    with pytest.raises(SampleError if isinstance(error, ValueError) else NameError):
        blocks[0]
