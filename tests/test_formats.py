"""Formats by name and by content."""

from __future__ import annotations

import pytest

from volumen.data.formats.detection import detect_format, split_suffix
from volumen.data.formats.urls import is_url, local_path
from volumen.utils.errors import VolumenError


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.zarr", ("a", "zarr")),
        ("a.ome.zarr", ("a", "zarr")),
        ("a.b.OME.TIFF", ("a.b", "tif")),
        ("a.tf8", ("a", "tif")),
        ("a.nii.gz", ("a", "nifti")),
        ("a.gz", ("a.gz", None)),
        (".zarr", (".zarr", None)),
        ("a.png", ("a", "png")),
        ("a.jpg", ("a.jpg", None)),
    ],
)
def test_split_suffix(name, parts):
    assert split_suffix(name) == parts


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"II+\0", "tif"),
        (b"MM\0+", "tif"),
        (bytes(344) + b"n+1\0", "nifti"),
    ],
)
def test_content_decides(tmp_path, head, kind):
    (tmp_path / "anything.dat").write_bytes(head)
    assert detect_format(tmp_path / "anything.dat") == kind


def test_urls():
    assert is_url("https://host/a.zarr")
    assert is_url("simplecache::https://host/a.zarr")
    assert not is_url("/data/a.zarr")
    assert local_path("file:///data/a%20b.tif") == "/data/a b.tif"


def test_folder_without_zarr(tmp_path):
    with pytest.raises(
        VolumenError,
        match="expected a volume, or a folder of numbered TIFF or PNG slices, found a folder without zarr",
    ):
        detect_format(tmp_path)
