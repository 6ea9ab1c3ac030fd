"""Chunks that a prediction writes are those of zarr, and are there whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from volumen.inference.output.chunk_files import ChunkFiles, numcodec, zarr_codec


def make(folder, shape, chunks, dtype, compress):
    array = zarr.create_array(
        folder, shape=shape, chunks=chunks, dtype=dtype, compressors=zarr_codec(compress, np.dtype(dtype)), fill_value=0
    )  # fmt: skip
    return array, ChunkFiles(folder, shape, chunks, np.dtype(dtype), numcodec(compress, np.dtype(dtype)))


@pytest.mark.parametrize("compress", ["zstd", "lz4", "gzip", "none"])
@pytest.mark.parametrize(
    ("shape", "chunks", "dtype"),
    [
        ((13, 21), (8, 8), "uint8"),
        ((3, 9, 10, 17), (3, 4, 8, 8), "float16"),
        ((9, 9, 9), (9, 9, 9), "uint32"),
    ],
)
def test_zarr_reads_what_is_written_and_the_reverse(tmp_path, compress, shape, chunks, dtype):
    rng = np.random.default_rng(0)
    array, files = make(tmp_path / "a", shape, chunks, dtype, compress)
    expected = np.zeros(shape, dtype)
    for _ in range(6):  # regions that lie across chunks, one on the other
        low = [int(rng.integers(0, n)) for n in shape]
        region = tuple(slice(a, int(rng.integers(a + 1, n + 1))) for a, n in zip(low, shape))
        values = rng.integers(0, 200, expected[region].shape).astype(dtype)
        files.write(region, values)
        expected[region] = values
    np.testing.assert_array_equal(array[...], expected)
    np.testing.assert_array_equal(files.read(tuple(slice(0, n) for n in shape)), expected)
    assert files.read(tuple(slice(0, 1) for _ in shape)).dtype == np.dtype(dtype)
    array[...] = expected + np.asarray(1, dtype)
    part = tuple(slice(n // 3, n - 1) for n in shape)
    np.testing.assert_array_equal(files.read(part), expected[part] + np.asarray(1, dtype))


def test_a_chunk_of_zeros_has_no_file_and_takes_an_earlier_one_away(tmp_path):
    _, files = make(tmp_path / "a", (8, 16), (8, 8), "uint8", "zstd")
    files.write((slice(0, 8), slice(0, 16)), np.ones((8, 16), np.uint8))
    files.write((slice(0, 8), slice(0, 8)), np.zeros((8, 8), np.uint8))
    assert [path.name for path in (tmp_path / "a" / "c" / "0").iterdir()] == ["1"]


def test_a_chunk_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    array, files = make(tmp_path / "a", (8, 8), (8, 8), "uint8", "zstd")
    whole = (slice(0, 8), slice(0, 8))
    files.write(whole, np.ones((8, 8), np.uint8))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("volumen.inference.output.chunk_files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write(whole, np.full((8, 8), 2, np.uint8))
    assert (array[...] == 1).all()
    assert [path.name for path in (tmp_path / "a" / "c" / "0").iterdir()] == ["0"]
