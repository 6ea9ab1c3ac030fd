"""The distinct values of a label."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import zarr

from volumen.data.caching import index_cache
from volumen.data.caching.index_cache import default_cache_dir, prune, store_arrays
from volumen.data.caching.records import Records
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index import label_values as module
from volumen.data.index.label_values import label_values


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i8", "u8"])
def test_values_are_those_of_numpy(dtype, threads, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_VOXELS", 500)
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    few = rng.choice([limits.min, limits.max, 0, 5, 100], (9, 10, 11)).astype(dtype)
    for label in (few, np.abs(few % 7), np.full((4, 5), limits.max, dtype)):
        found = label_values(ArrayVolume(label), num_threads=threads)
        assert found == tuple(int(value) for value in np.unique(label))


def test_reading_stops_once_there_are_too_many(tmp_path):
    array = zarr.create_array(str(tmp_path / "l.zarr"), shape=(4096, 4096), chunks=(512, 512), dtype="u4")
    array[:] = np.arange(4096 * 4096, dtype=np.uint32).reshape(4096, 4096) // 512
    assert 64 < len(label_values(open_volume(tmp_path / "l.zarr"), most=64)) <= 4096 * 4096 // 512 // 4


def sparse_label(path):
    array = zarr.create_array(str(path), shape=(64, 4096, 4096), chunks=(32, 64, 64), dtype="u2")
    array[32:40, 640:700, 64:70] = 3
    array[:4, :10, :10] = 1
    return open_volume(path)


def test_chunks_that_are_not_stored_are_not_read(tmp_path, monkeypatch):
    label = sparse_label(tmp_path / "l.zarr")
    read = []
    inner = type(label).read
    monkeypatch.setattr(type(label), "read", lambda self, region: read.append(region) or inner(self, region))
    assert label_values(label) == (0, 1, 3)
    voxels = sum(np.prod([part.stop - part.start for part in region]) for region in read)
    assert voxels <= 3 * module._BLOCK_VOXELS


def kept_values(folder, *labels):
    with Records.of(folder / "cache", "label values", labels) as records:
        return [label_values(label, records=records) for label in labels]


def test_values_are_kept_until_the_label_changes(tmp_path, monkeypatch):
    label = sparse_label(tmp_path / "l.zarr")
    assert kept_values(tmp_path, label) == [(0, 1, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(type(label), "read", lambda self, region: pytest.fail("read again"))
        assert kept_values(tmp_path, label, label) == [(0, 1, 3)] * 2
    zarr.open_array(str(tmp_path / "l.zarr"))[0, 0, 0] = 9
    assert kept_values(tmp_path, open_volume(tmp_path / "l.zarr")) == [(0, 1, 3, 9)]


def test_negative_values_are_kept_too(tmp_path):
    label = ArrayVolume(np.array([[-1, 0, 2]], np.int16))
    assert [kept_values(tmp_path, label) for _ in range(2)] == [[(-1, 0, 2)]] * 2


def test_what_was_not_used_for_longest_is_removed_first(tmp_path):
    paths = []
    for number in range(5):
        store_arrays(tmp_path, {"number": number}, {"a": np.zeros(1000, np.uint8)})
        new = set(tmp_path.glob("*.npz")) - set(paths)
        paths += new
        os.utime(paths[-1], (number, number))
    os.utime(paths[0])  # used again
    (tmp_path / "notes.txt").write_text("stays")
    prune(tmp_path, max_files=2)
    assert {path.name for path in tmp_path.glob("*.npz")} == {paths[0].name, paths[4].name}
    prune(tmp_path, max_bytes=10, keep=paths[4])
    assert [path.name for path in tmp_path.glob("*.npz")] == [paths[4].name]
    assert (tmp_path / "notes.txt").exists()


def test_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    old, new = (tmp_path / f".valid_patches_{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    prune(tmp_path)
    assert new.exists()
    assert not old.exists()


def test_the_cache_can_be_moved_and_switched_off(tmp_path, monkeypatch):
    monkeypatch.delenv("VOLUMEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "volumen" / "patches"
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("VOLUMEN_CACHE", "off")
    assert default_cache_dir() is None


@pytest.mark.parametrize("name", ["HOME", "VOLUMEN_CACHE"])
def test_a_user_without_a_home_folder_is_warned_once(monkeypatch, caplog, name):
    for variable in ("HOME", "XDG_CACHE_HOME", "VOLUMEN_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    if name == "VOLUMEN_CACHE":
        monkeypatch.setenv(name, "~/volumen")

    def nobody(path):  # what os.path.expanduser does for a user id that the system does not know
        return path

    monkeypatch.setattr("os.path.expanduser", nobody)
    index_cache._warn_once.cache_clear()
    assert [default_cache_dir() for _ in range(3)] == [None] * 3
    assert caplog.text.count("no home folder") == 1


def test_a_folder_that_cannot_be_written_to_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the folder's place")
    index_cache._warn_once.cache_clear()
    for number in range(3):
        store_arrays(tmp_path / "file" / "cache", {"number": number}, {"a": np.zeros(3)})
    assert caplog.text.count("nothing is cached there") == 1


def test_many_labels_share_one_file_and_survive_each_other(tmp_path, monkeypatch):
    labels = [ArrayVolume(np.full((3, 4), value, np.uint8), path=f"d/{value}") for value in range(1, 31)]
    everything = [(value,) for value in range(1, 31)]
    assert kept_values(tmp_path, *labels) == everything
    assert len(list((tmp_path / "cache").iterdir())) == 1
    new = ArrayVolume(np.full((3, 4), 99, np.uint8), path="d/99")
    assert kept_values(tmp_path, labels[0], new) == [(1,), (99,)]  # the others stay in the file
    monkeypatch.setattr(ArrayVolume, "read", lambda *_: pytest.fail("read again"))
    assert kept_values(tmp_path, *labels, new) == [*everything, (99,)]


def test_what_was_found_before_an_error_is_kept(tmp_path, monkeypatch):
    label = ArrayVolume(np.ones((3, 4), np.uint8))

    def stopped():
        with Records.of(tmp_path, "label values", [label]) as records:
            label_values(label, records=records)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    monkeypatch.setattr(ArrayVolume, "read", lambda *_: pytest.fail("read again"))
    with Records.of(tmp_path, "label values", [label]) as records:
        assert label_values(label, records=records) == (1,)


def test_records_of_all_shapes_come_back(tmp_path):
    written = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "b": np.zeros(0, np.uint8),
        "c": np.array(2.5),
    }
    with Records(tmp_path, {"of": "test"}) as records:
        records.put({"x": 1}, written)
        records.put({"x": 2}, {"a": np.array([True, False])})
    with Records(tmp_path, {"of": "test"}) as records:
        found = records.get({"x": 1})
        assert records.get({"x": 3}) is None
    for name, array in written.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)


def test_no_file_of_the_cache_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda *_: pytest.fail("waits for the disk"))
    store_arrays(tmp_path, {"number": 1}, {"a": np.zeros(3)})
