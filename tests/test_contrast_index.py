"""The index of patches for pretraining: empty space is left out by the images' own statistics."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import pytest
import zarr

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.contrast import find_patches_with_contrast
from volumen.data.index.patch_index import PatchIndex
from volumen.utils.boxes import whole_box
from volumen.utils.errors import VolumenError


@dataclass
class Case:
    """An opened image."""

    name: str
    image: object


def case_of(array: np.ndarray, axes: str | None = None, name: str = "a") -> Case:
    array = array if array.ndim == len(axes or "zyx") else array[None]
    axes = axes or "zyx"
    return Case(name, ArrayVolume(array if "c" in axes else array[None], axes="c" + axes.replace("c", "")))


def found_in(cases, patch, **options) -> PatchIndex:
    boxes = {case.name: [whole_box(case.image.shape)] for case in cases}
    return find_patches_with_contrast(cases, boxes, patch, progress=False, **options)


def starts(index) -> list[tuple[int, ...]]:
    return [tuple(row) for row in index.foreground.start.tolist()]


def noise(shape, scale=20.0, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, scale, shape).astype(np.float32)


def test_faint_noise_beside_an_object_is_empty():
    image = noise((16, 32, 64), 1.0)
    image[..., 32:] = noise((16, 32, 32), 30.0)
    index = found_in([case_of(image)], (16, 16, 16))
    assert starts(index) == [(0, y, x) for y in (0, 8, 16) for x in (24, 32, 40, 48)]
    # Noise alone is what there is to learn from.
    assert len(found_in([case_of(noise((16, 32, 64), 1.0))], (16, 16, 16))) == 21
    assert len(found_in([case_of(image)], (16, 16, 16), empty_below=0.0)) == 21


def test_parts_cover_the_volume_once_and_contrast_is_that_of_their_voxels():
    image = noise((11, 23, 37))
    index = found_in([case_of(image)], (8, 8, 16), empty_below=0.0)
    sides = [
        [0, *((a + b + size) // 2 for a, b in itertools.pairwise(axis)), length]
        for axis, size, length in zip(([0, 3], [0, 4, 8, 12, 15], [0, 8, 16, 21]), (8, 8, 16), image.shape)
    ]
    expected = np.array(
        [
            image[tuple(slice(side[i], side[i + 1]) for side, i in zip(sides, cell))].std(dtype=np.float64)
            for cell in np.ndindex(*(len(side) - 1 for side in sides))
        ]
    )
    assert len(index) == len(expected) == 2 * 5 * 4
    np.testing.assert_allclose(index.foreground.share, expected / np.percentile(expected, 99), rtol=1e-5)


def test_patches_are_moved_within_their_region_only():
    index = found_in([case_of(noise((8, 20, 20)))], (8, 8, 8))
    rng = np.random.default_rng(0)
    places = {index.random_location(row, rng).start for row in range(len(index)) for _ in range(20)}
    assert len(places) > 100
    assert all(a == 0 and 0 <= b <= 12 and 0 <= c <= 12 for a, b, c in places)


def test_volumes_thinner_than_the_patch_have_a_patch():
    index = found_in([case_of(noise((3, 40, 10)))], (8, 16, 16))
    assert starts(index) == [(0, y, 0) for y in (0, 8, 16, 24)]
    assert index.grid_location(0).bounds == ((0, 3), (0, 40), (0, 10))


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_constant_volumes_are_left_out_and_constant_data_refused(fill, caplog):
    caplog.set_level(logging.INFO)
    constant, full = case_of(np.full((8, 8, 8), fill, np.float32), name="b"), case_of(noise((8, 8, 8)))
    index = found_in([constant, full], (8, 8, 8))
    assert [index.grid_location(row).case for row in range(len(index))] == [1]
    assert "left out, the same value everywhere" in caplog.text
    with pytest.raises(VolumenError, match="expected images with contrast, found the same value everywhere"):
        found_in([constant], (8, 8, 8))


def test_values_that_are_not_finite_do_not_count():
    image = noise((8, 8, 32))
    image[..., :16] = 5.0
    image[2, 3, 4], image[2, 3, 5] = np.nan, np.inf
    assert starts(found_in([case_of(image)], (8, 8, 8))) == [(0, 0, x) for x in (12, 16, 20, 24)]


def test_one_channel_with_contrast_is_enough():
    image = np.stack([np.full((16, 32), 7.0), noise((16, 32))]).astype(np.float32)
    image[1, :, :16] = 0
    case = Case("a", ArrayVolume(image, axes="cyx"))
    assert starts(found_in([case], (16, 8))) == [(0, 12), (0, 16), (0, 20), (0, 24)]


def test_unstored_chunks_are_not_read(tmp_path, monkeypatch):
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(64, 64, 64), chunks=(16, 16, 16), dtype="u1", fill_value=0
    )
    array[16:32, 16:32, 16:32] = np.random.default_rng(0).integers(0, 255, (16, 16, 16))
    volume = open_volume(str(tmp_path / "a.zarr"), axes="zyx")
    regions = []
    read = type(volume).read
    monkeypatch.setattr(
        type(volume), "read", lambda self, region: regions.append(region) or read(self, region)
    )
    index = found_in([Case("a", volume)], (16, 16, 16))
    assert 0 < len(regions) <= 27
    assert starts(index)
    assert all(abs(a - 16) <= 8 for start in starts(index) for a in start)


def test_many_places_are_sampled_the_same_by_every_run():
    case = case_of(noise((16, 64, 64)))
    some = found_in([case], (4, 4, 4), most=50)
    assert len(some) <= 50
    assert len(some) > 40
    assert starts(some) == sorted(set(starts(some)))
    assert starts(found_in([case], (4, 4, 4), most=50)) == starts(some)
    assert starts(found_in([case], (4, 4, 4), most=50, seed=1)) != starts(some)


def test_the_index_is_cached_by_content(tmp_path):
    def image(seed):
        case = case_of(noise((8, 16, 16), seed=seed))
        reads = []
        read = case.image.read
        case.image.read = lambda region: reads.append(region) or read(region)
        return case, reads

    case, reads = image(0)
    first = found_in([case], (8, 8, 8), cache_dir=tmp_path)
    count = len(reads)
    again = found_in([case], (8, 8, 8), cache_dir=tmp_path)
    assert len(reads) == count
    assert starts(again) == starts(first)
    np.testing.assert_array_equal(again.foreground.share, first.foreground.share)
    other, reads = image(1)
    found_in([other], (8, 8, 8), cache_dir=tmp_path)
    assert reads


def test_every_place_needs_no_reading():
    case = case_of(np.zeros((8, 16, 16), np.float32))
    case.image.read = None
    assert len(found_in([case], (8, 8, 8), every_place=True)) == 9
