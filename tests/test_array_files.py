"""NumPy's array files in threads: equal arrays, and one header at a time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from volumen.utils.files.arrays import read_array, read_arrays


def test_arrays_are_those_that_were_saved(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    np.savez_compressed(tmp_path / "x.npz", a=array, b=np.arange(3))
    assert np.array_equal(read_array(tmp_path / "x.npy"), array)
    assert isinstance(read_array(tmp_path / "x.npy"), np.memmap)
    assert sorted(read_arrays(tmp_path / "x.npz")) == ["a", "b"]
    assert list(read_arrays(tmp_path / "x.npz", "b")) == ["b"]
    with pytest.raises(KeyError):
        read_arrays(tmp_path / "x.npz", "c")
    with pytest.raises(FileNotFoundError):
        read_array(tmp_path / "y.npy")


def test_objects_are_refused(tmp_path):
    """Unpickling them would run code of whoever wrote the file."""
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"[Pp]ickle|Python objects"):
        read_array(tmp_path / "x.npy")


def test_one_thread_at_a_time_parses_a_header(tmp_path, monkeypatch):
    """Python's parser counts its depth for all threads together and may fail where two parse at once."""
    np.save(tmp_path / "x.npy", np.arange(5))
    np.savez(tmp_path / "x.npz", a=np.arange(5))
    load, inside, most, lock = np.load, [], [], threading.Lock()

    def watched(*args, **options):
        with lock:
            inside.append(1)
            most.append(len(inside))
        time.sleep(0.002)
        found = load(*args, **options)
        with lock:
            inside.pop()
        return found

    monkeypatch.setattr(np, "load", watched)
    paths = [tmp_path / "x.npy", tmp_path / "x.npz"] * 12
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda path: read_array(path) if path.suffix == ".npy" else read_arrays(path)["a"], paths
            )
        )
    assert max(most) == 1
    assert all(np.array_equal(array, np.arange(5)) for array in found)
