"""Zarr written by hand with the standard library, by TensorStore and by zarr-python, read by region."""

from __future__ import annotations

import dataclasses
import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import zarr

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Volume
from volumen.data.formats.zarr_arrays.chunks import chunk_reader
from volumen.utils.errors import VolumenError


def everything(volume: Volume) -> np.ndarray:
    return volume.read(tuple(slice(0, size) for size in volume.shape))


def assert_reads_like(volume: Volume, expected: np.ndarray, seed: int = 0) -> None:
    """Compare the whole and some regions with an array (channels, *space)."""
    assert (volume.channels, *volume.shape) == expected.shape
    np.testing.assert_array_equal(everything(volume), expected)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        bounds = [sorted(rng.integers(0, size + 1, 2)) for size in volume.shape]
        region = tuple(slice(int(low), int(high)) for low, high in bounds)
        block = volume.read(region)
        np.testing.assert_array_equal(block, expected[(slice(None), *region)])
        assert block.dtype == volume.dtype
        assert block.dtype.isnative


def random_array(shape=(13, 21, 34), dtype="u2", seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def padded_chunks(array, chunk):
    """Yield (index, chunk) of a regular grid, the last chunks filled up with zeros."""
    for index in product(*(range(-(-n // c)) for n, c in zip(array.shape, chunk))):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk))]
        yield index, np.pad(part, [(0, c - n) for c, n in zip(chunk, part.shape)])


def write_v2(folder, array, chunk, *, order="C", compressor=None, separator=".", attributes=None):
    """Write zarr v2 as its specification says, with nothing but NumPy and the standard library."""
    folder.mkdir(parents=True)
    encode = {None: bytes, "zlib": zlib.compress, "gzip": gzip.compress}[compressor]
    metadata = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": chunk,
        "dtype": array.dtype.str,
        "compressor": compressor and {"id": compressor, "level": 6},
        "fill_value": 0,
        "order": order,
        "filters": None,
        "dimension_separator": separator,
    }
    (folder / ".zarray").write_text(json.dumps(metadata))
    if attributes:
        (folder / ".zattrs").write_text(json.dumps(attributes))
    for index, part in padded_chunks(array, chunk):
        file = folder / separator.join(map(str, index))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(part.tobytes(order=order)))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720), bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def metadata_v3(array, chunk, codecs, **more) -> dict:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": {"u1": "uint8", "u2": "uint16", "i4": "int32", "f4": "float32"}[array.dtype.str[1:]],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": {},
        **more,
    }


def write_v3_sharded(folder, array, chunk, shard, *, location="end", skip=()):
    """Write zarr v3 with `sharding_indexed`, gzip inside, by its specification."""
    inner = [
        {"name": "bytes", "configuration": {"endian": "big"}},
        {"name": "gzip", "configuration": {"level": 1}},
    ]
    sharding = {
        "chunk_shape": chunk,
        "codecs": inner,
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": location,
    }
    folder.mkdir(parents=True)
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    (folder / "zarr.json").write_text(json.dumps(metadata_v3(array, shard, codecs)))
    count = np.prod([s // c for s, c in zip(shard, chunk)])
    for index, whole in padded_chunks(array, shard):
        body, table = b"", []
        start = 16 * count + 4 if location == "start" else 0
        for _, part in padded_chunks(whole, chunk):
            if not part.any():
                table += [2**64 - 1, 2**64 - 1]
                continue
            data = gzip.compress(part.astype(part.dtype.newbyteorder(">")).tobytes())
            table += [start + len(body), len(data)]
            body += data
        encoded = np.array(table, "<u8").tobytes()
        encoded += crc32c(encoded).to_bytes(4, "little")
        file = folder.joinpath("c", *map(str, index))
        file.parent.mkdir(parents=True, exist_ok=True)
        if index not in skip:
            file.write_bytes(encoded + body if location == "start" else body + encoded)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressor", [None, "zlib", "gzip"])
@pytest.mark.parametrize(("dtype", "separator"), [("<u2", "."), (">i4", "/"), ("|u1", "/"), (">f8", ".")])
def test_v2_written_by_hand(tmp_path, order, compressor, dtype, separator):
    array = random_array(dtype=dtype)
    write_v2(tmp_path / "a", array, (5, 8, 13), order=order, compressor=compressor, separator=separator)
    volume = open_volume(tmp_path / "a")
    assert volume.chunks == (5, 8, 13)
    assert_reads_like(volume, array[None])


@pytest.mark.parametrize("location", ["start", "end"])
def test_v3_shards_written_by_hand(tmp_path, location):
    array = random_array()
    array[:8, :8, :8] = 0
    write_v3_sharded(tmp_path / "a.zarr", array, (4, 4, 8), (8, 12, 16), location=location, skip=[(1, 1, 1)])
    array[8:16, 12:24, 16:32] = 0
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.chunks == (4, 4, 8)
    assert_reads_like(volume, array[None])


def test_v3_transposed_written_by_hand(tmp_path):
    array = random_array((8, 9, 10))
    codecs = [
        {"name": "transpose", "configuration": {"order": [2, 0, 1]}},
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ]
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    (folder / "zarr.json").write_text(json.dumps(metadata_v3(array, (4, 5, 6), codecs)))
    for index, part in padded_chunks(array, (4, 5, 6)):
        file = folder.joinpath("c", *map(str, index))
        file.parent.mkdir(parents=True, exist_ok=True)
        data = part.transpose(2, 0, 1).tobytes()
        file.write_bytes(data + crc32c(data).to_bytes(4, "little"))
    assert_reads_like(open_volume(folder), array[None])


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("codec", ["blosc", "zstd", "gzip", "sharded"])
def test_written_by_tensorstore(tmp_path, driver, codec):
    tensorstore = pytest.importorskip("tensorstore")
    array = random_array()
    named = {"blosc": {"cname": "lz4", "clevel": 5}, "zstd": {"level": 3}, "gzip": {"level": 5}}
    if driver == "zarr":
        if codec == "sharded":
            pytest.skip("zarr v2 has no shards")
        metadata = {
            "shape": array.shape,
            "chunks": [5, 8, 13],
            "dtype": "<u2",
            "compressor": {"id": codec, **named[codec], **({"shuffle": 1} if codec == "blosc" else {})},
        }
    else:
        codecs = [{"name": codec, "configuration": {**named.get(codec, {})}}]
        if codec == "blosc":
            codecs[0]["configuration"] |= {"shuffle": "bitshuffle", "typesize": 2}
        if codec == "sharded":
            codecs = [{"name": "sharding_indexed", "configuration": {"chunk_shape": [5, 4, 13]}}]
        chunk = [5, 8, 13]
        metadata = {
            "shape": array.shape,
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": codecs,
        }
    spec = {
        "driver": driver,
        "kvstore": {"driver": "file", "path": str(tmp_path / "a.zarr")},
        "metadata": metadata,
    }
    tensorstore.open(spec, create=True).result()[...] = array
    assert_reads_like(open_volume(tmp_path / "a.zarr"), array[None])


def zarr_cases():
    from numcodecs import LZ4, Blosc, Delta
    from zarr import codecs

    yield "v2 blosc", {"zarr_format": 2, "compressors": Blosc("zstd")}
    yield "v2 delta lz4", {"zarr_format": 2, "filters": [Delta("<u2")], "compressors": LZ4()}
    yield "v3 blosc", {"compressors": codecs.BloscCodec(cname="lz4hc", shuffle="bitshuffle")}
    yield "v3 zstd crc", {"compressors": [codecs.ZstdCodec(checksum=True), codecs.Crc32cCodec()]}
    yield "v3 none", {"compressors": None}
    yield "v3 nested key", {"chunk_key_encoding": {"name": "v2", "separator": "."}}
    yield "v3 shards", {"shards": (10, 16, 26)}
    yield "v3 transposed shards", {"shards": (10, 16, 26), "filters": codecs.TransposeCodec(order=(1, 2, 0))}


@pytest.mark.parametrize(
    ("name", "options"), zarr_cases(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_direct_reading_equals_zarr_python(tmp_path, name, options):
    array = random_array()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(5, 8, 13), **options)
    assert chunk_reader(zarr.open(tmp_path / "a.zarr", mode="r")) is not None
    assert_reads_like(open_volume(tmp_path / "a.zarr"), array[None])


# Without a cache, every read decodes its chunks


@pytest.fixture
def no_cache():
    """Store no decoded chunks."""
    bound = BLOCKS.max_bytes
    BLOCKS.resize(0)
    yield
    BLOCKS.resize(bound)


def uncached_cases():
    from numcodecs import Delta, Zstd
    from zarr import codecs

    inner = (48, 70, 60)
    yield "v3", {"chunks": inner}
    yield "v3 transposed", {"chunks": inner, "filters": codecs.TransposeCodec(order=(1, 2, 0))}
    yield "v3 shards", {"chunks": inner, "shards": (96, 70, 120)}
    yield "v3 big endian", {"chunks": inner, "serializer": codecs.BytesCodec(endian="big")}
    yield "v3 checksum", {"chunks": inner, "compressors": codecs.ZstdCodec(checksum=True)}
    yield "v2 F", {"zarr_format": 2, "chunks": inner, "compressors": Zstd(), "order": "F"}
    yield "v2 filter", {"zarr_format": 2, "chunks": inner, "compressors": Zstd(), "filters": [Delta("<u2")]}


@pytest.mark.parametrize(
    ("name", "options"), uncached_cases(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_patches_without_a_cache(tmp_path, no_cache, name, options):
    array = random_array((100, 75, 130))
    zarr.create_array(tmp_path / "a.zarr", data=array, **options)
    volume = open_volume(tmp_path / "a.zarr")
    assert_reads_like(volume, array[None])
    for corner in np.random.default_rng(1).integers(0, (90, 65, 120), (20, 3)):
        region = tuple(slice(int(start), int(start) + 10) for start in corner)
        np.testing.assert_array_equal(volume.read(region)[0], array[region])
        np.testing.assert_array_equal(
            volume.read((region[0], slice(0, 1), slice(0, 1)))[0, :, 0, 0], array[region[0], 0, 0]
        )


def test_a_chunk_of_uneven_zstandard_blocks(tmp_path):
    array = random_array((2, 300, 300), "u1")
    zarr.create_array(tmp_path / "a.zarr", data=np.zeros_like(array), chunks=array.shape, fill_value=7)
    raw = array.tobytes()
    blocks = [raw[:90_001], raw[90_001:]]
    headers = [(len(block) << 3 | last).to_bytes(3, "little") for last, block in enumerate(blocks)]
    frame = b"\x28\xb5\x2f\xfd\xa0" + len(raw).to_bytes(4, "little")
    frame += headers[0] + blocks[0] + headers[1] + blocks[1]
    (tmp_path / "a.zarr" / "c" / "0" / "0" / "0").write_bytes(frame)
    region = (slice(0, 1), slice(0, 300), slice(0, 300))
    np.testing.assert_array_equal(open_volume(tmp_path / "a.zarr", axes="zyx").read(region)[0], array[region])


def test_chunks_damaged_removed_and_written_again(tmp_path, no_cache):
    array = random_array((128, 64, 64), "u1")
    stored = zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(64, 64, 64), fill_value=9)
    file = tmp_path / "a.zarr" / "c" / "0" / "0" / "0"
    sound = file.read_bytes()
    volume = open_volume(tmp_path / "a.zarr")
    beginning = (slice(0, 3), slice(0, 64), slice(0, 64))
    for end in (0, 3, 7, 12, 1000, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:end])
        with pytest.raises(VolumenError, match=r"chunk \[0:64, 0:64, 0:64\] cannot be read"):
            volume.read(beginning)
    file.write_bytes(sound[:500] + b"\xff" * 500 + sound[1000:])
    with suppress(VolumenError):
        volume.read(beginning)
    file.unlink()
    np.testing.assert_array_equal(volume.read(beginning), np.full((1, 3, 64, 64), 9))
    stored[:64] = array[:64]
    np.testing.assert_array_equal(volume.read(beginning)[0], array[:3])
    zarr.create_array(tmp_path / "one.zarr", data=np.full((1, 1, 1), 5, "u1"), chunks=(1, 1, 1))
    assert everything(open_volume(tmp_path / "one.zarr")).tolist() == [[[[5]]]]


def test_many_threads_without_a_cache(tmp_path, no_cache):
    array = random_array((64, 128, 128), "u1")
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(64, 64, 64))
    volume = open_volume(tmp_path / "a.zarr")
    regions = [
        tuple(slice(int(o), int(o) + 30) for o in corner)
        for corner in np.random.default_rng(2).integers(0, (34, 98, 98), (60, 3))
    ]
    with ThreadPoolExecutor(6) as pool:
        for region, block in zip(regions, pool.map(volume.read, regions)):
            np.testing.assert_array_equal(block[0], array[region])


def test_codecs_are_known_by_the_names_of_the_specification(tmp_path):
    """Not by the names of zarr-python's classes, which another package may use or replace."""

    class Faster(zarr.codecs.ZstdCodec):
        pass

    class ZstdCodec(zarr.codecs.ZstdCodec):
        def to_dict(self):
            return {"name": "example.zstd", "configuration": {}}

    array = zarr.create_array(tmp_path / "a.zarr", data=random_array(), chunks=(5, 8, 13))
    for codec, known in ((Faster(), True), (ZstdCodec(), False)):
        metadata = dataclasses.replace(array.metadata, codecs=(zarr.codecs.BytesCodec(), codec))
        reader = chunk_reader(
            SimpleNamespace(store=array.store, path="", shape=array.shape, metadata=metadata)
        )
        assert (reader is not None) == known


@pytest.mark.parametrize("shards", [None, (10, 16, 26)])
def test_systems_without_pread(tmp_path, monkeypatch, no_cache, shards):
    """Windows has neither `os.pread` nor `os.preadv`."""
    array = random_array()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(5, 8, 13), shards=shards)
    for name in ("pread", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    assert_reads_like(open_volume(tmp_path / "a.zarr"), array[None])


def test_unknown_codec_is_left_to_zarr(tmp_path):
    from zarr.codecs import numcodecs

    array = random_array()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(5, 8, 13), compressors=numcodecs.LZ4())
    assert chunk_reader(zarr.open(tmp_path / "a.zarr", mode="r")) is None
    assert_reads_like(open_volume(tmp_path / "a.zarr"), array[None])


@pytest.mark.parametrize("shards", [None, (10, 16, 26)])
def test_missing_chunks_read_as_fill_value(tmp_path, shards):
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(13, 21, 34), dtype="i2", chunks=(5, 8, 13), shards=shards, fill_value=-7
    )
    array[:5, :8, :13] = 3
    expected = np.full((1, 13, 21, 34), -7, "i2")
    expected[:, :5, :8, :13] = 3
    assert_reads_like(open_volume(tmp_path / "a.zarr"), expected)


# OME-Zarr


def write_ome(folder, levels, *, version, axes, scales, whole=None, units=None, labels=()):
    """Write an OME-Zarr group: metadata by hand, arrays as v2 by hand (0.4) or v3 by zarr (0.5)."""
    units = units or {}
    entry = {
        "axes": [
            {
                "name": a,
                "type": {"c": "channel", "t": "time"}.get(a, "space"),
                **({"unit": units[a]} if a in units else {}),
            }
            for a in axes
        ],
        "datasets": [
            {"path": f"s{i}", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            for i, scale in enumerate(scales)
        ],
    }
    if whole:
        entry["coordinateTransformations"] = [{"type": "scale", "scale": whole}]
    folder.mkdir(parents=True)
    if version == "0.4":
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps({"multiscales": [{**entry, "version": "0.4"}]}))
        for i, level in enumerate(levels):
            write_v2(folder / f"s{i}", level, tuple(min(8, n) for n in level.shape), separator="/")
    else:
        ome = {"ome": {"version": "0.5", "multiscales": [entry]}}
        group = {"zarr_format": 3, "node_type": "group", "attributes": ome}
        (folder / "zarr.json").write_text(json.dumps(group))
        for i, level in enumerate(levels):
            zarr.create_array(folder / f"s{i}", data=level, chunks=tuple(min(8, n) for n in level.shape))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_levels_axes_and_scales(tmp_path, version):
    fine = random_array((1, 2, 12, 16, 20))
    coarse = fine[..., ::2, ::2]
    write_ome(
        tmp_path / "a.zarr",
        [fine, coarse],
        version=version,
        axes="tczyx",
        scales=[[1, 1, 4, 0.5, 0.5], [1, 1, 4, 1, 1]],
        whole=[1, 1, 10, 10, 10],
        units={"z": "nanometer", "y": "nanometer", "x": "nanometer"},
    )
    for level, array, spacing in ((0, fine, (40, 5, 5)), (1, coarse, (40, 10, 10))):
        volume = open_volume(tmp_path / "a.zarr", level=level)
        assert_reads_like(volume, array[0])
        assert (volume.spacing, volume.unit) == (spacing, "nanometer")
    with pytest.raises(VolumenError, match=r"expected level 2, found 2 levels .*ome_zarr_resolution"):
        open_volume(tmp_path / "a.zarr", level=2)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_channel_last_and_2d(tmp_path, version):
    image = random_array((16, 20, 3), "u1")
    write_ome(tmp_path / "a.zarr", [image], version=version, axes="yxc", scales=[[2.0, 3.0, 1.0]])
    volume = open_volume(tmp_path / "a.zarr")
    assert_reads_like(volume, np.moveaxis(image, -1, 0))
    assert volume.spacing == (2.0, 3.0)


def test_ome_0_1_without_axes(tmp_path):
    array = random_array((1, 1, 6, 16, 20))
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / ".zattrs").write_text(json.dumps({"multiscales": [{"datasets": [{"path": "0"}]}]}))
    write_v2(folder / "0", array, (1, 1, 3, 8, 8))
    assert_reads_like(open_volume(folder), array[0])
    assert open_volume(folder).spacing is None


def test_ome_0_3_axes_are_plain_letters(tmp_path):
    multiscale = {"version": "0.3", "axes": ["c", "y", "x"], "datasets": [{"path": "0"}]}
    group = zarr.open_group(
        tmp_path / "a.zarr", mode="w", zarr_format=2, attributes={"multiscales": [multiscale]}
    )
    array = random_array((3, 40, 50))
    group.create_array("0", data=array)
    assert_reads_like(open_volume(tmp_path / "a.zarr"), array)


def test_image_below_a_numbered_group(tmp_path):
    """The layout of bioformats2raw: the first image lies in the group "0"."""
    fine = random_array((12, 16, 20))
    zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2, attributes={"bioformats2raw.layout": 3})
    write_ome(tmp_path / "a.zarr" / "0", [fine], version="0.4", axes="zyx", scales=[[3, 1, 1]])
    volume = open_volume(tmp_path / "a.zarr")
    assert_reads_like(volume, fine[None])
    assert volume.spacing == (3.0, 1.0, 1.0)


def test_level_inside_a_group_by_its_own_path(tmp_path):
    fine = random_array((12, 16, 20))
    write_ome(tmp_path / "a.zarr", [fine], version="0.4", axes="zyx", scales=[[1, 1, 1]])
    assert_reads_like(open_volume(tmp_path / "a.zarr" / "s0"), fine[None])


def test_consolidated_metadata(tmp_path):
    array = random_array()
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("raw", data=array, chunks=(5, 8, 13))
    zarr.consolidate_metadata(tmp_path / "a.zarr")
    assert_reads_like(open_volume(tmp_path / "a.zarr"), array[None])


def test_dimension_names_and_voxel_size(tmp_path):
    array = random_array((3, 13, 21))
    zarr.create_array(
        tmp_path / "a.zarr",
        data=array,
        dimension_names=["z", "y", "x"],
        attributes={"voxel_size": [40, 4, 4]},
    )
    volume = open_volume(tmp_path / "a.zarr")
    assert_reads_like(volume, array[None])
    assert volume.spacing == (40.0, 4.0, 4.0)
    zarr.open(tmp_path / "a.zarr").attrs["voxel_size"] = [0, 4, 4]
    assert open_volume(tmp_path / "a.zarr").spacing is None


def test_groups_that_are_no_image(tmp_path):
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    with pytest.raises(
        VolumenError, match=r"empty\.zarr: expected an array, found a zarr group with no array"
    ):
        open_volume(tmp_path / "empty.zarr")
    group = zarr.open_group(tmp_path / "two.zarr", mode="w")
    for name in ("a", "b"):
        group.create_array(name, shape=(4, 4), dtype="u1")
    with pytest.raises(
        VolumenError,
        match=r"two\.zarr: expected one array .*, found 2 arrays: a, b; give the path of one",
    ):
        open_volume(tmp_path / "two.zarr")
    zarr.open_group(tmp_path / "plate.zarr", mode="w", attributes={"plate": {}})
    with pytest.raises(VolumenError, match=r"expected an image, found an OME-Zarr plate"):
        open_volume(tmp_path / "plate.zarr")
    (tmp_path / "hollow.zarr").mkdir()
    with pytest.raises(VolumenError, match=r"hollow\.zarr: no zarr array or group there"):
        open_volume(tmp_path / "hollow.zarr")
    with pytest.raises(VolumenError, match=r"absent\.zarr: no such file or folder"):
        open_volume(tmp_path / "absent.zarr")


def test_malformed_metadata(tmp_path):
    for name, text in (("a", "{"), ("b", '{"zarr_format": 3}'), ("c", "[]")):
        folder = tmp_path / f"{name}.zarr"
        folder.mkdir()
        (folder / "zarr.json").write_text(text)
        with pytest.raises(VolumenError, match=rf"{name}\.zarr: "):
            open_volume(folder)
    for number, multiscale in enumerate(
        ({"datasets": [{}]}, {"datasets": [{"path": "x"}], "axes": ["y", "x"]})
    ):
        group = tmp_path / f"g{number}.zarr"
        zarr.open_group(group, mode="w", attributes={"multiscales": [multiscale]})
        with pytest.raises(VolumenError, match=rf"g{number}\.zarr"):
            open_volume(group)


# Damage


@pytest.mark.parametrize("options", [{}, {"shards": (10, 16, 26)}, {"zarr_format": 2}], ids=str)
def test_truncated_chunk_is_named(tmp_path, options):
    array = random_array()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(5, 8, 13), **options)
    names = ["c/1/1/1", "1.1.1"]
    file = next(tmp_path / "a.zarr" / name for name in names if (tmp_path / "a.zarr" / name).exists())
    file.write_bytes(file.read_bytes()[:-30])
    volume = open_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(volume.read((slice(0, 5),) * 3), array[None, :5, :5, :5])
    start = "10:13, 16:21, 26:34" if "shards" in options else "5:10, 8:16, 13:26"
    with pytest.raises(
        VolumenError, match=rf"{file.name}: chunk \[{start}\] cannot be read .*; copy"
    ) as caught:
        everything(volume)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_corrupt_chunk_read_by_zarr_is_named(tmp_path):
    from zarr.codecs import numcodecs

    array = random_array()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(5, 8, 13), compressors=numcodecs.LZ4())
    file = tmp_path / "a.zarr" / "c" / "1" / "1" / "1"
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(VolumenError, match=r"a\.zarr: chunk \[5:10, 8:16, 13:26\] cannot be read"):
        everything(open_volume(tmp_path / "a.zarr"))


def test_rewritten_chunks_are_read_anew(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", data=np.zeros((8, 8, 8), "u1"), chunks=(4, 4, 4))
    volume = open_volume(tmp_path / "a.zarr")
    before = volume.fingerprint()
    assert everything(volume).sum() == 0
    array[:4, :4, :4] = np.random.default_rng(0).integers(0, 99, (4, 4, 4))
    np.testing.assert_array_equal(everything(volume)[0], array[:])
    assert volume.fingerprint() != before
    assert open_volume(tmp_path / "a.zarr").fingerprint() == volume.fingerprint()


# Processes, threads, URLs


def test_pickled_and_threaded_reads(tmp_path):
    array = random_array((32, 32, 32))
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(8, 8, 8))
    volume = pickle.loads(pickle.dumps(open_volume(tmp_path / "a.zarr")))
    regions = [tuple(slice(int(o), int(o) + 12) for o in corner) for corner in np.ndindex(3, 3, 3)]
    with ThreadPoolExecutor(8) as pool:
        for region, block in zip(regions * 3, pool.map(volume.read, regions * 3)):
            np.testing.assert_array_equal(block, array[None][(slice(None), *region)])


def _sum_in_child(volume, queue):
    queue.put(int(everything(volume).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_read_in_another_process(tmp_path, method):
    array = random_array()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(5, 8, 13))
    volume = open_volume(tmp_path / "a.zarr")
    everything(volume)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(volume, queue))
    child.start()
    assert queue.get(timeout=60) == int(array.sum())
    child.join()


@pytest.mark.parametrize("codec", ["zstd", "blosc", "left to zarr", "sharded"])
def test_a_forked_process_decodes_after_its_parent_did(tmp_path, codec):
    """As the workers of a data loader do, whose parent has read the labels."""
    from zarr.codecs import BloscCodec, ZstdCodec, numcodecs

    array = random_array((64, 64, 128))
    compressors = {"blosc": BloscCodec(cname="lz4"), "left to zarr": numcodecs.LZ4()}.get(codec, ZstdCodec())
    shards = (64, 64, 128) if codec == "sharded" else None
    zarr.create_array(
        tmp_path / "a.zarr", data=array, chunks=(64, 64, 64), compressors=compressors, shards=shards
    )
    volume = open_volume(tmp_path / "a.zarr")
    everything(volume)
    BLOCKS.clear()  # the child would find its parent's chunks
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(volume, queue))
    child.start()
    assert queue.get(timeout=60) == int(array.sum())
    child.join()
    assert child.exitcode == 0


def test_cache_is_bounded(tmp_path):
    array = random_array((64, 64, 64), "u1")
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(16, 16, 16))
    bound = BLOCKS.max_bytes
    try:
        BLOCKS.resize(10 * 4096)
        assert_reads_like(open_volume(tmp_path / "a.zarr"), array[None])
        assert 0 < BLOCKS.nbytes <= 10 * 4096
    finally:
        BLOCKS.resize(bound)


def test_memory_url():
    array = random_array()
    zarr.create_array("memory://volumes/a.zarr", data=array, chunks=(5, 8, 13), overwrite=True)
    volume = open_volume("memory://volumes/a.zarr")
    assert_reads_like(volume, array[None])
    assert volume.fingerprint() == open_volume("memory://volumes/a.zarr").fingerprint()
    zarr.create_array("memory://volumes/twin.zarr", data=array, chunks=(5, 8, 13), overwrite=True)
    assert open_volume("memory://volumes/twin.zarr").fingerprint() != volume.fingerprint()
    bound = BLOCKS.max_bytes
    try:
        BLOCKS.resize(0)
        assert_reads_like(volume, array[None])
    finally:
        BLOCKS.resize(bound)
    with pytest.raises(VolumenError, match=r"memory://volumes/b\.zarr: no zarr array or group there"):
        open_volume("memory://volumes/b.zarr")


@pytest.fixture
def http_root(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_http_url(tmp_path, http_root):
    array = random_array((12, 16, 20))
    write_ome(tmp_path / "a.zarr", [array], version="0.4", axes="zyx", scales=[[4, 1, 1]])
    volume = open_volume(f"{http_root}/a.zarr")
    assert_reads_like(volume, array[None])
    assert volume.spacing == (4.0, 1.0, 1.0)
    with pytest.raises(VolumenError, match=r"b\.zarr: "):
        open_volume(f"{http_root}/b.zarr")
    shutil.rmtree(tmp_path / "a.zarr")
    assert_reads_like(volume, array[None])  # by now every chunk is kept


def test_corrupt_chunk_at_a_url_is_named():
    import fsspec

    zarr.create_array("memory://volumes/c.zarr", data=random_array(), chunks=(5, 8, 13), overwrite=True)
    fsspec.filesystem("memory").pipe("/volumes/c.zarr/c/1/1/1", b"\xff" * 9)
    with pytest.raises(VolumenError, match=r"c\.zarr: chunk \[5:10, 8:16, 13:26\] cannot be read"):
        everything(open_volume("memory://volumes/c.zarr"))


def test_region_must_lie_inside(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=random_array())
    volume = open_volume(tmp_path / "a.zarr")
    for region in ((slice(0, 2),), (slice(0, 14),) * 3, (slice(-1, 2),) * 3, (slice(0, 4, 2),) * 3):
        with pytest.raises(ValueError, match="region must"):
            volume.read(region)


@pytest.mark.parametrize("by_zarr", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_a_volume_that_vanishes_is_not_taken_for_an_empty_one(tmp_path, monkeypatch, version, by_zarr):
    """A folder that is deleted or a disk that is unmounted while training reads from it."""
    if by_zarr:
        monkeypatch.setattr("volumen.data.formats.zarr_arrays.volume.chunk_reader", lambda array: None)
    path = tmp_path / "a.zarr"
    stored = zarr.create_array(str(path), shape=(8, 8), chunks=(4, 4), dtype="u1", zarr_format=version)
    stored[:4] = 7
    volume = open_volume(path)
    assert (volume.read((slice(0, 4), slice(0, 4))) == 7).all()
    assert not volume.read((slice(4, 8), slice(0, 4))).any()  # a chunk that was never stored
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(
        VolumenError, match=r"a\.zarr: the volume has vanished while it was in use; bring it back"
    ):
        volume.read((slice(0, 4), slice(4, 8)))
    (tmp_path / "elsewhere").rename(path)
    assert (volume.read((slice(0, 4), slice(4, 8))) == 7).all()
