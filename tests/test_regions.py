"""Validation blocks cover the regions once, keep to what is labelled, and predict as one window would."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.data import DataLoader
from monai.transforms import Compose

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.patch_index import PatchLocation
from volumen.data.index.patches import find_valid_patches
from volumen.data.layout import OpenCase
from volumen.data.sampling.dataset import PatchDataset
from volumen.data.sampling.regions import RegionDataset, block_size, cut, is_labelled, window_count
from volumen.inference.windows.plan import PredictPlan
from volumen.utils.errors import VolumenError


def case(label: np.ndarray, mask: np.ndarray | None = None) -> OpenCase:
    volumes = {"ink": ArrayVolume(label)}
    masks = {} if mask is None else {"ink": ArrayVolume(mask)}
    return OpenCase("a", ArrayVolume(label), volumes, masks, (1.0,) * label.ndim)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 90)), min_size=2, max_size=3),
    st.lists(st.integers(1, 40), min_size=3, max_size=3),
)
def test_blocks_cover_a_box_once_and_none_is_too_large(spans, largest):
    box = tuple((start, start + extent) for start, extent in spans)
    shape = [stop for _, stop in box]
    covered = np.zeros(shape, dtype=int)
    for block in cut(box, largest[: len(box)]):
        covered[tuple(slice(a, b) for a, b in block)] += 1
        assert all(b - a <= most for (a, b), most in zip(block, largest))
    inside = tuple(slice(a, b) for a, b in box)
    assert (covered[inside] == 1).all()
    assert covered.sum() == math.prod(extent for _, extent in spans)


@pytest.mark.parametrize(
    ("patch", "block"), [((64,) * 3, (128,) * 3), ((192,) * 3, (192,) * 3), ((256, 256), (512, 512))]
)
def test_a_block_is_as_large_as_memory_allows(patch, block):
    assert block_size(patch) == block


@given(st.tuples(*[st.integers(1, 70)] * 3), st.tuples(*[st.integers(1, 24)] * 3))
def test_windows_are_counted_as_they_are_planned(size, patch):
    assert window_count(size, patch) == len(PredictPlan(size, patch, 0.5))


def regions_of(opened: OpenCase, transform) -> RegionDataset:
    boxes = {opened.name: [tuple((0, size) for size in opened.image.shape)]}
    return RegionDataset([opened], boxes, transform, patch_size=(8, 8), targets=["ink"])


def of_zeros(dataset: str, opened: OpenCase) -> RegionDataset | PatchDataset:
    """The regions or the patches of a case, whatever is in them 0."""
    if dataset == "regions":
        return regions_of(opened, lambda sample: 0)
    index = find_valid_patches([opened], {"a": [((0, 8), (0, 8))]}, (8, 8), targets=["ink"])
    return PatchDataset([opened], index, lambda sample: 0, seed=0)


@pytest.mark.parametrize("dataset", ["regions", "patches"])
def test_a_loader_does_not_look_for_transforms_inside_open_files(dataset):
    opened = case(np.ones((8, 8), np.uint8))
    # An open TIFF has attributes that lead back to it.
    opened.image.loop = opened.image
    assert list(DataLoader(of_zeros(dataset, opened), num_workers=0)) == [0]


@pytest.mark.parametrize(
    ("dataset", "module"), [("regions", "sampling.regions"), ("patches", "sampling.dataset")]
)
def test_workers_are_asked_to_keep_memory_at_every_sample(monkeypatch, dataset, module):
    asked = []
    monkeypatch.setattr(f"volumen.data.{module}.keep_in_worker", lambda: asked.append(True))
    found = of_zeros(dataset, case(np.ones((8, 8), np.uint8)))
    assert [found[0], found[0]] == [0, 0]
    assert len(asked) == 2


def test_a_region_that_fails_tells_the_cause_and_not_the_transform():
    def fail(sample):
        raise VolumenError("label 'ink' of a", expected="classes 0 to 1", found=7)

    found = regions_of(case(np.ones((8, 8), np.uint8)), Compose([fail]))
    with pytest.raises(VolumenError, match=r"the region at \(0, 0\) .* failed \(label 'ink' .* found 7\)"):
        found[0]


def test_only_labelled_blocks_are_kept():
    label = np.zeros((32, 64), np.uint8)
    label[:8, :8] = 1
    label[20:, 60:] = 9
    boxes = {"a": [((0, 32), (0, 64))]}
    found = RegionDataset(
        [case(label)], boxes, lambda s: s, patch_size=(8, 8), targets=["ink"], ignore_labels={"ink": 9}
    )
    assert [location.start for location in found.locations] == [(0, 0)]
    mask = np.zeros_like(label)
    mask[20:, 40:] = 1
    found = RegionDataset([case(label, mask)], boxes, lambda s: s, patch_size=(8, 8), targets=["ink"])
    assert {location.start for location in found.locations} == {(16, 32), (16, 48)}


def test_the_limit_keeps_at_least_one_block_and_is_fixed_by_the_seed():
    label = np.ones((64, 64), np.uint8)
    boxes = {"a": [((0, 64), (0, 64))]}

    def starts(most, seed=0):
        data = RegionDataset(
            [case(label)],
            boxes,
            lambda s: s,
            patch_size=(8, 8),
            targets=["ink"],
            most_windows=most,
            seed=seed,
        )
        return [location.start for location in data.locations]

    assert len(starts(1)) == 1
    assert len(starts(18)) == 2
    assert starts(18) == starts(18)
    assert len({tuple(starts(18, seed)) for seed in range(5)}) > 1
    assert len(starts(None)) == 16


def test_masked_background_counts_unless_the_loss_counts_on_objects_alone():
    label = np.zeros((8, 16), np.uint8)
    label[2, 3] = 1
    opened = case(label, np.ones_like(label))
    left, right = (PatchLocation(0, (0, start), (8, 8), ((0, 8), (0, 16))) for start in (0, 8))
    assert is_labelled(opened, right, "ink", None)
    assert not is_labelled(opened, right, "ink", None, objects_only=True)
    assert is_labelled(opened, left, "ink", None, objects_only=True)
    assert not is_labelled(opened, left, "ink", 1, objects_only=True)
