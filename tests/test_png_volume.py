"""PNG images and folders of PNG slices, written by Pillow and by hand, as volumes."""

from __future__ import annotations

import logging
import pickle
import struct
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tifffile
from PIL import Image

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.detection import stack_files
from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.inference.jobs import image_paths, volume_name
from volumen.utils.errors import VolumenError

RNG = np.random.default_rng(0)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_by_hand(path, array, colour, interlaced=False):
    """Write what Pillow cannot, 16 bits in colours, as the PNG specification says, without filters."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    big = array.astype(array.dtype.newbyteorder(">"))
    header = struct.pack(">IIBBBBB", width, height, 8 * array.itemsize, colour, 0, 0, interlaced)
    parts = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    passes = [big[y::dy, x::dx] for y, dy, x, dx in parts] if interlaced else [big]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


def whole(volume):
    return volume.read(tuple(slice(0, size) for size in volume.shape))


def random_image(*shape, dtype="u1"):
    return RNG.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((20, 31), "u1"), ((20, 31), "u2"), ((20, 31, 3), "u1"), ((20, 31, 4), "u1"), ((1, 1), "u1")],
)
def test_images_of_pillow(tmp_path, shape, dtype, kept):
    array = random_image(*shape, dtype=dtype)
    volume = open_volume(write(tmp_path / "a.png", array))
    channels = shape[2] if len(shape) == 3 else 1
    assert (volume.shape, volume.channels, volume.dtype) == (shape[:2], channels, np.dtype(dtype))
    assert volume.spacing is None
    expected = np.moveaxis(array.reshape(*shape[:2], channels), -1, 0)
    bound = BLOCKS.max_bytes
    try:
        BLOCKS.resize(bound if kept else 0)
        for read in (volume, pickle.loads(pickle.dumps(volume))):
            np.testing.assert_array_equal(whole(read), expected)
            region = (slice(0, shape[0] // 2), slice(shape[1] // 3, shape[1]))
            block = read.read(region)
            np.testing.assert_array_equal(block, expected[(slice(None), *region)])
            block[...] = 0  # memory of its own
            np.testing.assert_array_equal(whole(read), expected)
    finally:
        BLOCKS.resize(bound)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_images_by_hand(tmp_path, dtype, colour, channels, interlaced):
    array = random_image(13, 17, channels, dtype=dtype)
    volume = open_volume(write_by_hand(tmp_path / "a.png", array, colour, interlaced))
    np.testing.assert_array_equal(whole(volume), array.transpose(2, 0, 1))


@pytest.mark.parametrize(("shape", "transparent"), [((8, 9), 3), ((8, 9, 3), (1, 2, 3))])
def test_a_transparent_colour_is_no_channel(tmp_path, shape, transparent):
    array = random_image(*shape)
    volume = open_volume(write(tmp_path / "a.png", array, transparency=transparent))
    np.testing.assert_array_equal(whole(volume), array[None] if len(shape) == 2 else array.transpose(2, 0, 1))


def test_palettes_and_single_bits_are_refused(tmp_path):
    palette = Image.fromarray(random_image(8, 9, 3)).convert("P")
    palette.save(tmp_path / "p.png")
    with pytest.raises(
        VolumenError, match=r"p\.png: expected grey or RGB values, found a PNG with a palette.*convert"
    ):
        open_volume(tmp_path / "p.png")
    write(tmp_path / "b.png", random_image(8, 9) > 99)
    with pytest.raises(VolumenError, match=r"b\.png: expected 8 or 16 bits, found a PNG of 1"):
        open_volume(tmp_path / "b.png")
    write(tmp_path / "c.png", random_image(8, 9))
    with pytest.raises(VolumenError, match="expected 3 spatial axes"):
        open_volume(tmp_path / "c.png", ndim=3)


def test_damage_is_told_in_one_line(tmp_path):
    array = random_image(40, 50)
    sound = write(tmp_path / "a.png", array).read_bytes()
    for number in range(60):
        damaged = bytearray(sound)
        if number % 2:
            damaged = damaged[: RNG.integers(8, len(sound) - 12)]
        else:
            damaged[RNG.integers(8, 60)] ^= 1 << RNG.integers(0, 8)
        file = tmp_path / f"{number}.png"
        file.write_bytes(damaged)
        try:
            found = whole(open_volume(file))
        except VolumenError as error:
            message = str(error)
        else:
            message = ""
            np.testing.assert_array_equal(found[0], array)
        assert "\n" not in message
        assert number % 2 == 0 or f"{number}.png" in message


def test_a_file_that_changed_its_shape_is_told(tmp_path):
    volume = open_volume(write(tmp_path / "a.png", random_image(8, 9)))
    before = volume.fingerprint()
    write(tmp_path / "a.png", random_image(9, 9))
    with pytest.raises(VolumenError, match=r"expected shape \(8, 9\).*found \(9, 9\)"):
        whole(volume)
    assert open_volume(tmp_path / "a.png").fingerprint() != before


@pytest.mark.parametrize(("dtype", "colours"), [("u1", ()), ("u2", ()), ("u1", (3,))])
def test_folders_of_slices(tmp_path, caplog, dtype, colours):
    array = random_image(11, 12, 13, *colours, dtype=dtype)
    for number, plane in enumerate(array):
        write(tmp_path / "roll" / f"s_{number}.png", plane)
    volume = open_volume(tmp_path / "roll")
    expected = np.moveaxis(array, -1, 0) if colours else array[None]
    assert (volume.shape, volume.channels, volume.dtype) == ((11, 12, 13), len(expected), np.dtype(dtype))
    np.testing.assert_array_equal(whole(volume), expected)
    region = (slice(3, 10), slice(5, 9), slice(0, 13))
    np.testing.assert_array_equal(volume.read(region), expected[(slice(None), *region)])
    (tmp_path / "roll" / "s_10.png").write_bytes(b"no PNG")
    assert open_volume(tmp_path / "roll").read((slice(0, 10), slice(0, 2), slice(0, 2))).size
    with pytest.raises(VolumenError, match=r"s_10\.png: its PNG header is damaged"):
        whole(open_volume(tmp_path / "roll"))
    (tmp_path / "roll" / "s_4.png").unlink()
    with caplog.at_level(logging.WARNING):
        open_volume(tmp_path / "roll")
    assert "slices seem to be missing, the first after s_3.png" in caplog.text


def test_slices_of_a_tiff_stack_come_before_pictures_of_them(tmp_path):
    for number in range(3):
        tifffile.imwrite(tmp_path / f"{number}.tif", random_image(8, 9))
        write(tmp_path / f"{number}.png", random_image(4, 5))
    assert stack_files(tmp_path) == ("0.tif", "1.tif", "2.tif")
    assert open_volume(tmp_path).shape == (3, 8, 9)


def test_slices_of_different_kinds_are_named(tmp_path):
    write(tmp_path / "1.png", random_image(8, 9))
    write(tmp_path / "2.png", random_image(8, 9, 3))
    with pytest.raises(VolumenError, match=r"2\.png: expected channels 1, as the first slice has, found 3"):
        whole(open_volume(tmp_path))


def test_data_folders(tmp_path):
    images = {name: random_image(16, 17) for name in ("0001", "0002")}
    for name, image in images.items():
        write(tmp_path / "images" / f"{name}.png", image)
        write(tmp_path / "labels" / f"{name}_ink.png", (image > 100).astype("u1"))
    layout = discover(tmp_path)
    assert ([case.name for case in layout.cases], layout.format) == (["0001", "0002"], "png")
    for case in open_cases(layout, spacing=(2.0, 3.0)):
        assert case.spacing == (2.0, 3.0)
        np.testing.assert_array_equal(whole(case.image)[0], images[case.name])
        np.testing.assert_array_equal(whole(case.labels["ink"])[0], images[case.name] > 100)
    assert [volume_name(path) for path in image_paths(str(tmp_path))] == ["0001", "0002"]


def test_pictures_beside_volumes_are_passed_over(tmp_path):
    tifffile.imwrite(
        write(tmp_path / "images" / "a.png", random_image(4, 5)).with_suffix(".tif"), random_image(6, 7)
    )
    tifffile.imwrite(
        write(tmp_path / "labels" / "look.png", random_image(4, 5)).with_name("a_ink.tif"),
        random_image(6, 7) > 9,
    )
    layout = discover(tmp_path)
    assert (layout.format, [case.name for case in layout.cases], layout.targets) == ("tif", ["a"], ("ink",))
    assert [volume_name(path) for path in image_paths(str(tmp_path))] == ["a"]
    (tmp_path / "labels" / "a_ink.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())
    (tmp_path / "labels" / "a_ink.tif").unlink()
    assert discover(tmp_path, format="png").cases[0].image.endswith("a.png")


def test_slices_at_a_url(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    array = random_image(3, 8, 9)
    for number, plane in enumerate(array):
        write(tmp_path / "web" / "images" / "roll" / f"{number}.png", plane)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/images/roll"
        np.testing.assert_array_equal(whole(open_volume(url))[0], array)
        np.testing.assert_array_equal(whole(open_volume(f"{url}/1.png"))[0], array[1])
    finally:
        server.shutdown()


def test_named_axes_tell_what_a_picture_s_axes_are(tmp_path):
    array = RNG.integers(0, 200, (4, 6, 3)).astype("u1")
    path = write(tmp_path / "a.png", array)
    for axes, channels, shape in (
        (None, 3, (4, 6)),
        ("yxc", 3, (4, 6)),
        ("zyx", 1, (4, 6, 3)),
        ("xyz", 1, (3, 6, 4)),
    ):
        volume = open_volume(path, axes=axes)
        assert (volume.channels, volume.shape) == (channels, shape)
