"""What of stored volumes cannot be read is found in one pass, as finely as it is stored."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from data_folders import shells, write_tiff_folder

from volumen.cli.main import main
from volumen.data.damage import find_damage
from volumen.data.formats.opening import open_volume

ARRAY = np.random.default_rng(0).integers(0, 255, (40, 40, 50)).astype("u1")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shards", [None, (32, 32, 32)])
def test_exactly_the_damaged_chunks_are_found(tmp_path, threads, shards):
    """Broken, empty and missing ones, of several volumes: what is not stored is no damage."""
    for name in ("a", "b", "c"):
        zarr.create_array(tmp_path / name, data=ARRAY, chunks=(16, 16, 16), shards=shards)
    first, second = (1, 0, 2), (2, 2, 3)
    if shards is None:
        for name, chunk, content in (("a", second, b""), ("a", first, b"broken"), ("c", first, b"broken")):
            (tmp_path / name / "c" / "/".join(map(str, chunk))).write_bytes(content)
        (tmp_path / "b" / "c" / "0" / "0" / "0").unlink()
        expected = [("a", first), ("a", second), ("c", first)]
    else:
        # Of a shard the first chunk is cut into; its index, at the end, still tells where all of them lie.
        shard = tmp_path / "b" / "c" / "0" / "0" / "1"
        content = bytearray(shard.read_bytes())
        content[:40] = bytes(40)
        shard.write_bytes(content)
        expected = [("b", (0, 0, 2))]
    volumes = [open_volume(tmp_path / name) for name in ("a", "b", "c")]
    found = find_damage(volumes, num_threads=threads)
    assert [(Path(damage.path).name, damage.region) for damage in found] == [
        (name, tuple(slice(16 * i, min(16 * i + 16, n)) for i, n in zip(chunk, ARRAY.shape)))
        for name, chunk in expected
    ]
    assert all(str(damage).count(damage.path) == 1 and "\n" not in str(damage) for damage in found)


def test_pages_and_compressed_files(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", ARRAY, compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages[7].dataoffsets[0]
    with (tmp_path / "a.tif").open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff" * 20)
    nibabel.Nifti1Image(ARRAY, np.eye(4)).to_filename(tmp_path / "b.nii.gz")
    nibabel.Nifti1Image(ARRAY, np.eye(4)).to_filename(tmp_path / "c.nii.gz")
    whole = (tmp_path / "c.nii.gz").read_bytes()
    (tmp_path / "c.nii.gz").write_bytes(whole[: len(whole) // 2])
    volumes = [open_volume(tmp_path / name) for name in ("a.tif", "b.nii.gz", "c.nii.gz")]
    found = find_damage(volumes)
    assert Path(found[0].path).name == "a.tif"
    assert found[0].region[0] == slice(7, 8)
    assert {Path(damage.path).name for damage in found[1:]} == {"c.nii.gz"}


def test_the_command_lists_them_before_anything_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    root = write_tiff_folder(tmp_path / "data", {"a": {"ink": shells((24, 40, 48))}})
    words = ["inspect", str(root), "--check", "--set", "model_config.base_features=4"]
    assert main(words) == 0
    assert "all of its 2 images, labels and masks can be read" in capsys.readouterr().out
    image = root / "images" / "a.tif"
    image.unlink()
    zarr.create_array(image.with_suffix(".zarr"), data=shells((24, 40, 48)), chunks=(16, 16, 16))
    (image.with_suffix(".zarr") / "c" / "1" / "1" / "1").write_bytes(b"broken")
    assert main(words) == 2
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert "a.zarr/c/1/1/1" in line
    assert "1 of 2 volumes cannot be read whole (damaged parts: 1)" in said.err
