"""TIFF files written by tifffile and by Pillow (libtiff), against tifffile's own whole-file reading."""

from __future__ import annotations

import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from PIL import Image

from volumen.data.caching.block_cache import BlockCache
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Volume
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
        assert block.dtype == volume.dtype == volume.dtype.newbyteorder("=")


def random_stack(shape, dtype="u2", seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


STACK_OPTIONS = [
    {},
    {"bigtiff": True},
    {"byteorder": ">"},
    {"tile": (16, 32)},
    {"tile": (16, 32), "compression": "zlib", "predictor": True},
    {"compression": "lzw"},
    {"compression": "zstd", "rowsperstrip": 7},
    {"compression": "zlib", "byteorder": ">"},
    {"rowsperstrip": 5},
    {"contiguous": False, "metadata": None},
]


@pytest.mark.parametrize("options", STACK_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4"])
def test_stack_reads_like_tifffile(tmp_path, options, dtype):
    stack = random_stack((9, 41, 70), dtype)
    if options.get("predictor") and dtype == "f4":
        options = {**options, "predictor": 3}
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    assert_reads_like(open_volume(tmp_path / "a.tif"), stack[None])


def test_pages_written_one_by_one_are_slices(tmp_path):
    stack = random_stack((6, 20, 30))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in stack:
            writer.write(page, contiguous=False, metadata=None)
    assert_reads_like(open_volume(tmp_path / "a.tif"), stack[None])


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_stack_written_by_libtiff(tmp_path, compression):
    stack = random_stack((7, 33, 50), "u1")
    pages = [Image.fromarray(page) for page in stack]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression)
    assert_reads_like(open_volume(tmp_path / "a.tif"), stack[None])


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16", "1"])
def test_image_written_by_libtiff(tmp_path, mode, compression):
    channels = {"RGB": (3,), "RGBA": (4,)}.get(mode, ())
    image = random_stack((33, 50, *channels), {"I;16": "u2"}.get(mode, "u1"))
    if mode == "1":
        image = image > 100
    Image.fromarray(image).save(tmp_path / "a.tif", compression=compression)
    volume = open_volume(tmp_path / "a.tif")
    assert_reads_like(volume, np.moveaxis(image, -1, 0) if channels else image[None])


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}], ids=str)
def test_rgb_image_and_stack(tmp_path, planarconfig, options):
    for shape in ((3, 40, 50), (6, 3, 40, 50)):
        planes = random_stack(shape, "u1")
        stored = planes if planarconfig == "separate" else np.moveaxis(planes, -3, -1)
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planarconfig, **options)
        assert_reads_like(
            open_volume(tmp_path / "a.tif"), planes if len(shape) == 3 else planes.swapaxes(0, 1)
        )


@pytest.mark.parametrize("axes", ["ZYX", "CYX", "ZCYX", "TZCYX", "YX"])
def test_imagej_hyperstack(tmp_path, axes):
    sizes = {"T": 1, "Z": 4, "C": 3, "Y": 20, "X": 30}
    stack = random_stack([sizes[axis] for axis in axes])
    tifffile.imwrite(
        tmp_path / "a.tif",
        stack,
        imagej=True,
        resolution=(2.0, 4.0),
        metadata={"axes": axes, "spacing": 3.0, "unit": "um"},
    )
    volume = open_volume(tmp_path / "a.tif")
    plain = stack[0] if "T" in axes else stack
    expected = np.moveaxis(plain, 1, 0) if axes.endswith("ZCYX") else plain if axes == "CYX" else plain[None]
    assert_reads_like(volume, expected)
    assert volume.spacing == pytest.approx((3.0, 0.25, 0.5)[-len(volume.shape) :])
    assert volume.unit == "micrometer"


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=str)
def test_ome_tiff(tmp_path, options):
    stack = random_stack((2, 5, 40, 50))
    sizes = {"PhysicalSizeX": 4.6, "PhysicalSizeY": 4.6, "PhysicalSizeZ": 0.045}
    units = {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm", "PhysicalSizeZUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata={"axes": "CZYX", **sizes, **units}, **options)
    volume = open_volume(tmp_path / "a.ome.tif")
    assert_reads_like(volume, stack)
    assert volume.spacing == pytest.approx((0.045, 0.0046, 0.0046))
    assert volume.unit == "micrometer"


@pytest.mark.parametrize(("unit", "sizes", "name"), [
    ("Å", (300.0, 80.0, 80.0), "angstrom"), ("nm", (0.03, 0.008, 0.008), "micrometer"),
])  # fmt: skip
def test_ome_tiff_in_angstroms(tmp_path, unit, sizes, name):
    known = {
        f"PhysicalSize{axis}": size
        for axis, size in zip("ZYX", (30.0 if unit == "nm" else 300.0, 80.0, 80.0))
    }
    units = {"PhysicalSizeZUnit": unit, "PhysicalSizeYUnit": "Å", "PhysicalSizeXUnit": "Å"}
    tifffile.imwrite(
        tmp_path / "a.ome.tif", random_stack((5, 40, 50)), metadata={"axes": "ZYX", **known, **units}
    )
    volume = open_volume(tmp_path / "a.ome.tif")
    assert volume.spacing == pytest.approx(sizes)
    assert volume.unit == name


def test_pyramid_gives_its_finest_level(tmp_path):
    image = random_stack((64, 96), "u1")
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        writer.write(image, subifds=1, tile=(16, 16), metadata={"axes": "YX"})
        writer.write(image[::2, ::2], subfiletype=1, tile=(16, 16))
    assert_reads_like(open_volume(tmp_path / "a.ome.tif"), image[None])


def test_sparse_tiles_read_as_zero(tmp_path):
    """Tiles of no bytes hold nothing (GDAL writes them)."""
    tifffile.imwrite(tmp_path / "a.tif", np.ones((32, 32), "u1"), tile=(16, 16))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        counts = tiff.pages[0].tags["TileByteCounts"]
        offsets = tiff.pages[0].tags["TileOffsets"]
        counts.overwrite((0, *counts.value[1:]))
        offsets.overwrite((0, *offsets.value[1:]))
    whole = everything(open_volume(tmp_path / "a.tif"))
    assert whole[0, :16, :16].sum() == 0
    assert whole.sum() == 3 * 256


@pytest.mark.parametrize("ndim", [2, 3])
def test_one_voxel(tmp_path, ndim):
    tifffile.imwrite(tmp_path / "a.tif", np.full((1,) * ndim, 7, "u1"))
    volume = open_volume(tmp_path / "a.tif")
    assert volume.shape == (1,) * ndim
    assert everything(volume).ravel().tolist() == [7]


@pytest.mark.parametrize(("axes", "ndim"), [("cyx", 2), ("zyx", 3)])
def test_axes_decide_an_ambiguous_shape(tmp_path, axes, ndim):
    tifffile.imwrite(tmp_path / "a.tif", random_stack((3, 40, 50)), photometric="minisblack")
    with pytest.raises(
        VolumenError,
        match=r"a\.tif: shape \(3, 40, 50\) .*--axes of volumen predict: zyx, cyx or yxc",
    ):
        open_volume(tmp_path / "a.tif")
    assert len(open_volume(tmp_path / "a.tif", axes=axes).shape) == ndim
    assert len(open_volume(tmp_path / "a.tif", ndim=ndim).shape) == ndim


def test_time_series_is_refused_unless_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", random_stack((9, 20, 30)), imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(VolumenError, match=r"found 'tyx' with t=9; set dataset_config\.axes"):
        open_volume(tmp_path / "a.tif")
    assert open_volume(tmp_path / "a.tif", axes="zyx").shape == (9, 20, 30)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}], ids=str)
def test_truncated_file(tmp_path, options):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, random_stack((6, 64, 64)), photometric="minisblack", **options)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(VolumenError, match=r"a\.tif: .*copy"):
        everything(open_volume(file))


def test_tags_that_promise_more_than_the_file_holds(tmp_path):
    file = tmp_path / "a.tif"
    for options in ({"metadata": None}, {"metadata": None, "compression": "zlib"}):
        tifffile.imwrite(file, random_stack((64, 64), "u1"), **options)
        with tifffile.TiffFile(file, mode="r+") as tiff:
            tiff.pages[0].tags["ImageLength"].overwrite(60000)
            tiff.pages[0].tags["RowsPerStrip"].overwrite(60000)
        with pytest.raises(VolumenError, match=r"a\.tif: .*; copy"):
            everything(open_volume(file))


def test_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, random_stack((6, 64, 64)), photometric="minisblack")
    volume = open_volume(file)
    everything(volume)
    with file.open("r+b") as handle:
        handle.truncate(5000)
    with pytest.raises(VolumenError, match=r"a\.tif: is shorter than its header says"):
        everything(volume)


def test_corrupt_strip_is_named(tmp_path):
    file = tmp_path / "a.tif"
    stack = random_stack((5, 64, 64))
    tifffile.imwrite(file, stack, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(file) as tiff:
        offset = tiff.pages[2].dataoffsets[0]
    content = bytearray(file.read_bytes())
    content[offset : offset + 50] = bytes(50)
    file.write_bytes(content)
    volume = open_volume(file)
    np.testing.assert_array_equal(
        volume.read((slice(0, 2), slice(0, 9), slice(0, 9))), stack[None, :2, :9, :9]
    )
    with pytest.raises(VolumenError, match=r"a\.tif: strip 0 of page 2 cannot be read .*; copy it again"):
        everything(volume)


def test_damaged_tags(tmp_path):
    file = tmp_path / "a.tif"
    file.write_bytes(b"II*\0" + struct.pack("<I", 8) + b"\xff" * 30)
    with pytest.raises(VolumenError, match=r"a\.tif: .*copy it again"):
        open_volume(file)


def test_pickled_and_threaded_reads(tmp_path):
    stack = random_stack((16, 64, 64))
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", compression="zlib")
    volume = pickle.loads(pickle.dumps(open_volume(tmp_path / "a.tif")))
    bounds = list(pairwise(range(0, 17, 2)))

    def read(part):
        return volume.read((slice(*part), slice(3, 50), slice(5, 60)))

    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(read, bounds * 4))
    for part, block in zip(bounds * 4, blocks):
        np.testing.assert_array_equal(block, stack[None, slice(*part), 3:50, 5:60])


def test_what_is_read_may_be_changed(tmp_path):
    stack = random_stack((5, 32, 32))
    for options in ({}, {"compression": "zlib"}):
        tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
        volume = open_volume(tmp_path / "a.tif")
        everything(volume)[...] = 0
        np.testing.assert_array_equal(everything(volume), stack[None])


def test_fingerprint_follows_content(tmp_path):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, random_stack((9, 20, 30)))
    first = open_volume(file).fingerprint()
    assert open_volume(file).fingerprint() == first
    file.rename(tmp_path / "b.tif")
    assert open_volume(tmp_path / "b.tif").fingerprint() == first
    tifffile.imwrite(file, random_stack((9, 20, 30), seed=1))
    assert open_volume(file).fingerprint() != first


def test_huge_stack_is_read_in_constant_memory(tmp_path):
    """A 5 GB stack, in a sparse file that takes no disk: reading all over it keeps the peak memory low."""
    import resource

    file = tmp_path / "a.tif"
    shape = (1250, 2048, 2048)
    tifffile.memmap(file, shape=shape, dtype="u1", bigtiff=True, metadata={"axes": "ZYX"})
    volume = open_volume(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    for _ in range(60):
        corner = [int(rng.integers(0, size - 64)) for size in shape]
        block = volume.read(tuple(slice(start, start + 64) for start in corner))
        assert block.shape == (1, 64, 64, 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize(
    ("name", "shape", "channels"),
    [
        ("fib25/images/medulla.tif", (120, 250, 250), 1),
        ("vnc/images/stack1.tif", (13, 1024, 1024), 1),
        ("drive/images/21.tif", (584, 565), 3),
    ],
)
def test_real_images(real_data, name, shape, channels):
    folder, rest = name.split("/", 1)
    file = real_data(folder) / rest
    volume = open_volume(file)
    assert (volume.shape, volume.channels, volume.dtype) == (shape, channels, np.uint8)
    whole = tifffile.imread(file)
    assert_reads_like(volume, np.moveaxis(whole, -1, 0) if channels == 3 else whole[None])


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}], ids=str)
def test_files_are_dropped_while_others_read(tmp_path, monkeypatch, options):
    """Many threads over more files than may be open: each read keeps the file that it uses."""
    from volumen.data.formats import open_handles

    monkeypatch.setattr(open_handles.HANDLES, "limit", 2)
    monkeypatch.setattr("volumen.data.formats.tiff.volume.BLOCKS", BlockCache(0))
    stacks = [random_stack((8, 32, 32), seed=seed) for seed in range(6)]
    for number, stack in enumerate(stacks):
        tifffile.imwrite(tmp_path / f"{number}.tif", stack, photometric="minisblack", **options)
    volumes = [open_volume(tmp_path / f"{number}.tif") for number in range(6)]
    order = np.random.default_rng(0).integers(0, 6, 300)
    with ThreadPoolExecutor(8) as pool:
        for number, block in zip(order, pool.map(lambda n: everything(volumes[n]), order)):
            np.testing.assert_array_equal(block[0], stacks[number])
