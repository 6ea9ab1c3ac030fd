"""Folders of numbered TIFF slices as volumes."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import tifffile

from volumen.data.formats.detection import stack_files
from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.utils.errors import VolumenError

RNG = np.random.default_rng(0)


def write_stack(folder, array, name="s_{:d}.tif", **options):
    folder.mkdir(parents=True)
    for number, plane in enumerate(array):
        tifffile.imwrite(folder / name.format(number), plane, **options)
    return folder


def whole(volume):
    return volume.read(tuple(slice(0, size) for size in volume.shape))


@pytest.mark.parametrize(("axes", "order"), [(None, (0, 1, 2)), ("zyx", (0, 1, 2)), ("xyz", (0, 2, 1))])
def test_named_axes_tell_how_a_slice_lies(tmp_path, axes, order):
    array = RNG.integers(0, 200, (5, 6, 7)).astype("u1")
    np.testing.assert_array_equal(
        whole(open_volume(write_stack(tmp_path / "a", array), axes=axes))[0], array.transpose(order)
    )


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}])
@pytest.mark.parametrize("dtype", ["u1", ">u2", "f4"])
def test_slices_are_read_in_the_order_of_their_numbers(tmp_path, dtype, options):
    array = RNG.integers(0, 200, (12, 20, 30)).astype(dtype)
    # Ten comes after nine, though "s_10" sorts before "s_9".
    folder = write_stack(tmp_path / "a", array, **options)
    (folder / "notes.txt").write_text("of the microscope")
    volume = open_volume(folder)
    assert (volume.shape, volume.channels, volume.dtype) == (
        (12, 20, 30),
        1,
        np.dtype(dtype).newbyteorder("="),
    )
    np.testing.assert_array_equal(whole(volume)[0], array)
    region = (slice(3, 11), slice(5, 9), slice(0, 30))
    for read in (volume, pickle.loads(pickle.dumps(volume))):
        np.testing.assert_array_equal(read.read(region)[0], array[region])


def test_colours_are_channels(tmp_path):
    array = RNG.integers(0, 200, (4, 20, 30, 3)).astype("u1")
    volume = open_volume(write_stack(tmp_path / "a", array, photometric="rgb"))
    assert (volume.shape, volume.channels) == ((4, 20, 30), 3)
    np.testing.assert_array_equal(whole(volume), array.transpose(3, 0, 1, 2))


def test_only_the_slices_of_a_region_are_opened(tmp_path):
    folder = write_stack(tmp_path / "a", np.ones((6, 8, 9), "u1"))
    volume = open_volume(folder)
    (folder / "s_5.tif").write_bytes(b"not a TIFF")
    assert volume.read((slice(0, 5), slice(0, 8), slice(0, 9))).all()
    with pytest.raises(VolumenError, match=r"s_5\.tif: .*cannot be read"):
        volume.read((slice(4, 6), slice(0, 8), slice(0, 9)))


def test_a_slice_of_another_shape_is_named(tmp_path):
    folder = write_stack(tmp_path / "a", np.ones((3, 8, 9), "u1"))
    tifffile.imwrite(folder / "s_1.tif", np.ones((8, 10), "u1"))
    with pytest.raises(VolumenError, match=r"s_1\.tif: expected shape \(8, 9\).*found \(8, 10\)"):
        whole(open_volume(folder))


def test_a_missing_slice_is_told(tmp_path, caplog):
    folder = write_stack(tmp_path / "a", np.ones((6, 8, 9), "u1"), "{:04d}.tif")
    (folder / "0003.tif").unlink()
    with caplog.at_level(logging.WARNING):
        assert open_volume(folder).shape == (5, 8, 9)
    assert "slices seem to be missing, the first after 0002.tif" in caplog.text


def test_the_fingerprint_changes_with_a_slice(tmp_path):
    folder = write_stack(tmp_path / "a", np.ones((3, 8, 9), "u1"))
    before = open_volume(folder).fingerprint()
    assert open_volume(folder).fingerprint() == before
    tifffile.imwrite(folder / "s_1.tif", np.zeros((8, 9), "u1"), compression="zlib")
    assert open_volume(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["scan2_z10.tif", "scan2_z9.tif"], ("scan2_z9.tif", "scan2_z10.tif")),
        (["cat.tif", "dog.tif"], ()),
        (["a1_z1.tif", "a2_z2.tif"], ()),
        (["only.tif"], ()),
        (["1.tif", "1.txt", ".2.tif"], ("1.tif",)),
    ],
)
def test_one_number_makes_a_series(tmp_path, names, found):
    for name in names:
        (tmp_path / name).touch()
    assert stack_files(tmp_path) == found


def test_images_labels_and_masks_may_be_folders_of_slices(tmp_path):
    array = RNG.integers(0, 200, (5, 16, 17)).astype("u1")
    write_stack(tmp_path / "images" / "roll.v2", array)
    write_stack(tmp_path / "labels" / "roll.v2_ink", (array > 100).astype("u1"), "{:04d}.tif")
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "masks" / "roll.v2_ink.tif", np.ones_like(array))
    layout = discover(tmp_path)
    assert [case.name for case in layout.cases] == ["roll.v2"]
    (case,) = open_cases(layout)
    np.testing.assert_array_equal(whole(case.labels["ink"])[0], array > 100)
    assert case.masks["ink"].shape == case.image.shape == (5, 16, 17)
