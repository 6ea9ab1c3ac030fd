"""Fingerprints change with content, and with nothing else."""

from __future__ import annotations

import os
import shutil

import numpy as np

from volumen.data.caching.fingerprints import array_fingerprint, digest, file_fingerprint, folder_fingerprint


def test_file(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 100)
    first = file_fingerprint(file, "detail")
    assert file_fingerprint(file, "other") != first
    moved = file.rename(tmp_path / "b")
    assert file_fingerprint(moved, "detail") == first
    times = moved.stat()
    moved.write_bytes(b"y" * 100)
    os.utime(moved, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_fingerprint(moved, "detail") != first


def test_folder(tmp_path):
    folder = tmp_path / "a"
    (folder / "c").mkdir(parents=True)
    for name in ("zarr.json", "c/0", "c/1"):
        (folder / name).write_text(name)
    first = folder_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "b")
    assert folder_fingerprint(tmp_path / "b") == first
    (folder / "c/1").write_text("longer than before")
    changed = folder_fingerprint(folder)
    (folder / "c/1").unlink()
    assert len({first, changed, folder_fingerprint(folder)}) == 3


def test_array():
    array = np.arange(60).reshape(3, 4, 5)
    first = array_fingerprint(array)
    assert array_fingerprint(array.copy()) == first
    assert array_fingerprint(np.asfortranarray(array)) == first
    assert array_fingerprint(array.astype("i4")) != first
    assert array_fingerprint(array.reshape(3, 5, 4)) != first
    array[2, 3, 4] += 1
    assert array_fingerprint(array) != first


def test_lazy_array_without_a_token_is_never_the_same():
    class Lazy:
        shape, dtype = (2, 2), np.dtype("u1")

    assert array_fingerprint(Lazy()) != array_fingerprint(Lazy())


def test_digest_is_stable():
    assert digest([1, "a"]) == digest([1, "a"]) != digest(["a", 1])


def test_a_data_set_is_known_again_after_copying_and_told_from_another(tmp_path):
    from data_folders import shells, write_tiff_folder

    from volumen.config.manager import ConfigManager

    label = shells((24, 24, 32))
    first, copy, other = (
        write_tiff_folder(tmp_path / name, {"a": {"ink": array}})
        for name, array in (("first", label), ("copy", label), ("other", 1 - label))
    )
    os.utime(copy / "images" / "a.tif", (1, 1))
    digests = [ConfigManager(dataset_dir=str(folder)).fingerprint for folder in (first, copy, other)]
    assert digests[0] == digests[1] != digests[2]
