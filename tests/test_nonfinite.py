"""NaN and infinite values are counted as NumPy counts them, in one pass and once per content."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from volumen.data.caching.records import Records
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.nonfinite import Nonfinite, count_nonfinite


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunks", [(1, 4, 8, 8), (2, 16, 16, 16)])
def test_as_numpy_counts(tmp_path, monkeypatch, threads, chunks):
    rng = np.random.default_rng(0)
    image = rng.random((2, 16, 16, 16)).astype(np.float32)
    places = np.where(rng.random(image.shape) < 0.01)
    image[places] = rng.choice([np.nan, np.inf, -np.inf], len(places[0]))
    zarr.create_array(tmp_path / "a.zarr", data=image, chunks=chunks)
    monkeypatch.setattr("volumen.data.index.label_values._BLOCK_VOXELS", 200)
    volume = open_volume(tmp_path / "a.zarr", axes="czyx")
    with Records.of(tmp_path / "cache", "nonfinite values", [volume]) as records:
        found = count_nonfinite(volume, num_threads=threads, records=records)
    assert found.total == len(places[0])
    assert found.first == tuple(np.argwhere(~np.isfinite(image).all(axis=0))[0])
    monkeypatch.setattr(type(volume), "read", lambda *_: pytest.fail("read again"))
    with Records.of(tmp_path / "cache", "nonfinite values", [volume]) as records:
        assert count_nonfinite(volume, records=records) == found


def test_whole_numbers_are_not_read(monkeypatch):
    volume = ArrayVolume(np.zeros((4, 4, 4), np.uint16))
    monkeypatch.setattr(volume, "read", lambda *_: pytest.fail("read"))
    assert count_nonfinite(volume) == Nonfinite(0)


def test_all_finite():
    assert count_nonfinite(ArrayVolume(np.ones((7, 8, 9)))) == Nonfinite(0, ())


def test_what_is_not_stored_counts_by_the_fill_value(tmp_path):
    options = {"shape": (8, 8, 8), "chunks": (4, 4, 4), "dtype": "f4"}
    for name, fill, total in (("a", np.nan, 7 * 64), ("b", 0.0, 0)):
        array = zarr.create_array(tmp_path / name, fill_value=fill, **options)
        array[:4, :4, :4] = 1
        assert count_nonfinite(open_volume(tmp_path / name)).total == total
