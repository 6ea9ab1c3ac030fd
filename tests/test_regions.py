"""Validation blocks cover the regions once, background too; a draw of them estimates the whole without bias."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.data import DataLoader
from monai.transforms import Compose

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.patches import find_valid_patches
from volumen.data.layout import OpenCase
from volumen.data.sampling.dataset import PatchDataset
from volumen.data.sampling.regions import BLOCK_WEIGHT, RegionDataset
from volumen.data.sampling.validation_blocks import (
    MIN_DRAWN_BLOCKS,
    block_size,
    cut,
    draw_blocks,
    find_blocks,
    part_windows,
    window_count,
)
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


def test_background_counts_and_what_is_unknown_is_left_out(caplog):
    label = np.zeros((32, 64), np.uint8)
    label[:8, :8] = 1
    label[16:, 48:] = 9
    boxes = {"a": [((0, 32), (0, 64))]}

    def starts(opened, **options):
        found = RegionDataset([opened], boxes, lambda s: s, patch_size=(8, 8), targets=["ink"], **options)
        return {location.start for location in found.locations}

    every = {(y, x) for y in (0, 16) for x in (0, 16, 32, 48)}
    assert starts(case(label)) == every
    with caplog.at_level("INFO"):
        assert starts(case(label), ignore_labels={"ink": 9}) == every - {(16, 48)}
    assert "validation: 7 blocks, all of the validation part; 1 more hold no known voxel" in caplog.text
    mask = np.full(label.shape, -1, np.int8)
    mask[20:, 40:] = 1
    assert starts(case(label, mask)) == {(16, 32), (16, 48)}
    assert starts(case(label, mask), objects_only=True) == {(16, 48)}
    assert starts(case(label), objects_only=True, ignore_labels={"ink": 9}) == {(0, 0)}


def test_the_first_block_is_a_labelled_one_for_the_preview():
    label = np.zeros((32, 64), np.uint8)
    label[20, 40] = 1
    boxes = {"a": [((0, 32), (0, 64))]}
    for most in (None, 20):
        found = RegionDataset(
            [case(label)], boxes, lambda s: s, patch_size=(8, 8), targets=["ink"], most_windows=most
        )
        start, size = found.locations[0].start, found.locations[0].size
        assert all(s <= at < s + n for s, at, n in zip(start, (20, 40), size))


def test_a_region_without_any_label_is_told(caplog):
    boxes = {"a": [((0, 8), (0, 8))]}
    RegionDataset([case(np.zeros((8, 8), np.uint8))], boxes, lambda s: s, patch_size=(8, 8), targets=["ink"])
    assert "is all background, so no Dice can be above 0" in caplog.text
    RegionDataset(
        [case(np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8))],
        boxes,
        lambda s: s,
        patch_size=(8, 8),
        targets=["ink"],
    )
    assert "no voxel of the validation part is known" in caplog.text


def counts_by_reading(opened: OpenCase, box, ignore) -> tuple[int, int]:
    """Known and labelled voxels of a block, voxel by voxel."""
    label, mask = opened.labels["ink"].volume_array, opened.masks.get("ink")
    known = labelled = 0
    for place in np.ndindex(*(b - a for a, b in box)):
        at = tuple(p + a for p, (a, _) in zip(place, box))
        if (mask is None or mask.volume_array[at] > 0) and label[at] != ignore:
            known += 1
            labelled += label[at] != 0
    return known, labelled


@pytest.mark.parametrize("ignore", [None, 2, 0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(13, 22), (7, 9, 11)])
def test_blocks_are_counted_as_voxel_by_voxel(shape, masked, ignore):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    mask = rng.integers(-1, 2, shape).astype(np.int8) if masked else None
    opened = case(label, mask)
    opened.labels["ink"].volume_array = label
    if masked:
        opened.masks["ink"].volume_array = mask
    box = ((1, shape[0]), *((0, n - 2) for n in shape[1:]))
    largest = (4,) * len(shape)
    (table,) = find_blocks([opened], {"a": [box]}, [largest], ["ink"], ignore_labels={"ink": ignore})
    _, starts, sizes = table.places(np.arange(len(table)))
    for row, block in enumerate(cut(box, largest)):
        assert tuple(starts[row]) == tuple(a for a, _ in block)
        assert tuple(sizes[row]) == tuple(b - a for a, b in block)
        assert (table.known[row, 0], table.labelled[row, 0]) == counts_by_reading(opened, block, ignore)
    windows = part_windows({"a": [box]}, (3,) * len(shape), largest)
    assert windows.tolist() == [window_count(size, (3,) * len(shape)) for size in sizes]


def sparse_table(seed: int):
    """Three volumes with a label in a corner each, cut into blocks of 4 x 4."""
    rng = np.random.default_rng(seed)
    opened = []
    for number in range(3):
        label = np.zeros((24, 40), np.uint8)
        label[2 : 8 + number, 1:9] = rng.random((6 + number, 8)) < 0.5
        opened.append(OpenCase(str(number), ArrayVolume(label), {"ink": ArrayVolume(label)}, {}, (1.0, 1.0)))
    boxes = {one.name: [((0, 24), (0, 40))] for one in opened}
    return find_blocks(opened, boxes, [(4, 4)], ["ink"])[0]


@pytest.mark.parametrize("most", [1, 7, 20, 60])
def test_a_draw_estimates_the_sums_of_the_drawn_volumes_without_bias(most):
    table = sparse_table(0)
    windows = table.windows((4, 4))
    value = np.random.default_rng(3).random(len(table))  # such as the false alarms of each block
    totals = {number: value[table.cases() == number].sum() for number in range(3)}
    labels = {number: int(table.labelled[table.cases() == number].sum()) for number in range(3)}
    errors, seen = [], []
    for seed in range(400):
        draw = draw_blocks(table, windows, most, seed)
        assert len(set(draw.rows.tolist())) == len(draw)
        volumes = set(table.cases()[draw.rows].tolist())
        seen.append(len(volumes))
        for number in volumes:
            inside = table.cases()[draw.rows] == number
            rows, weights = draw.rows[inside], draw.weights[inside]
            # Both groups are met, and the weights say how many blocks there are.
            assert weights.sum() == pytest.approx(60)
            assert table.labelled[rows].any()
            assert not table.labelled[rows].all()
            errors.append((weights * value[rows]).sum() / totals[number] - 1)
    spread = np.std(errors) / np.sqrt(len(errors))
    assert abs(np.mean(errors)) < 4 * spread + 1e-9
    assert max(seen) == (1 if most == 1 else 3)
    assert labels[0]


def test_volumes_are_drawn_alike_where_not_all_fit():
    table = sparse_table(1)
    windows = table.windows((4, 4))
    first = [int(table.cases()[draw_blocks(table, windows, 1, seed).rows[0]]) for seed in range(600)]
    assert np.bincount(first, minlength=3) == pytest.approx(200, abs=60)


def test_the_limit_is_kept_fixed_by_the_seed_and_said(caplog):
    label = np.zeros((64, 64), np.uint8)
    label[:32] = 1
    boxes = {"a": [((0, 64), (0, 64))]}

    def data(most, seed=0):
        return RegionDataset(
            [case(label)],
            boxes,
            lambda s: dict(s),
            patch_size=(8, 8),
            targets=["ink"],
            most_windows=most,
            seed=seed,
        )

    def starts(most, seed=0):
        return [location.start for location in data(most, seed).locations]

    assert len(starts(None)) == 16
    assert len(starts(1)) == 2  # one labelled, one of background
    for most in (40, 60, 100):
        windows = [window_count(location.size, (8, 8)) for location in data(most).locations]
        assert most <= sum(windows) < most + max(windows)
        assert len(windows) >= MIN_DRAWN_BLOCKS
    assert starts(18) == starts(18)
    assert len({tuple(starts(18, seed)) for seed in range(5)}) > 1
    caplog.clear()
    with caplog.at_level("INFO"):
        drawn = data(40)
    assert "validation: 5 of 16 blocks, 38 % of the labelled voxels" in caplog.text
    assert drawn.is_drawn
    assert [float(drawn[i][BLOCK_WEIGHT]) for i in range(5)] == [8 / 3, 4.0, 8 / 3, 4.0, 8 / 3]
    drawn.final = True
    assert len(drawn) == 16
    assert drawn.describe() == "16 blocks, all of the validation part"
    assert {float(drawn[i][BLOCK_WEIGHT]) for i in range(16)} == {1.0}
    assert not data(None).is_drawn
    assert not data(10**6).is_drawn


@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(1, 500))
def test_blocks_are_small_enough_that_a_draw_holds_some(patch, most):
    size = block_size(patch, most)
    assert all(one in (extent, 2 * extent) for one, extent in zip(size, patch))
    assert size == tuple(patch) or MIN_DRAWN_BLOCKS * window_count(size, patch) <= most
    assert block_size(patch, 10**9) == block_size(patch)
