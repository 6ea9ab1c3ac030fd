"""Cleaning of label maps: blockwise results are those of the whole, by SciPy's components."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from volumen.inference.postprocess.blocks import block_box, block_counts
from volumen.inference.postprocess.components import (
    background,
    clean_array,
    combine,
    fill_chosen,
    keep_chosen,
    kept_components,
    small_holes,
    survey_block,
)
from volumen.inference.rules import CleaningRules
from volumen.utils.connected import roots_of
from volumen.utils.errors import VolumenError


def boxes_of(shape, block):
    counts = block_counts(shape, block)
    return counts, [block_box(number, shape, block) for number in range(np.prod(counts))]


def find_components(values, block):
    counts, boxes = boxes_of(values.shape, block)
    surveys = [survey_block(values[box], box, values.shape) for box in boxes]
    return combine(lambda number, *names: {name: surveys[number][name] for name in names}, counts)


def choose(function, values, block, chosen, offsets):
    result = np.empty_like(values)
    for number, box in enumerate(boxes_of(values.shape, block)[1]):
        result[box] = function(values[box], chosen[offsets[number] + 1 : offsets[number + 1] + 1])
    return result


def clean(values, block, rules):
    found = find_components(values, block)
    return choose(keep_chosen, values, block, kept_components(found, rules), found.offsets)


def fill(values, block, largest):
    found = find_components(background(values), block)
    return choose(fill_chosen, values, block, small_holes(found, largest), found.offsets)


def blobs(shape, classes=1, seed=0, level=0.05):
    rng = np.random.default_rng(seed)
    smooth = [ndimage.gaussian_filter(rng.normal(size=shape), 1.2) for _ in range(classes)]
    values = np.argmax(smooth, axis=0).astype(np.uint8) + 1
    values[np.max(smooth, axis=0) < level] = 0
    return values


def by_scipy(values, minimum=0, largest=None):
    result = np.zeros_like(values)
    for value in np.unique(values[values > 0]):
        labels, count = ndimage.label(values == value)
        sizes = ndimage.sum_labels(np.ones_like(labels), labels, np.arange(1, count + 1))
        keep = set(np.flatnonzero(sizes >= minimum) + 1)
        if largest is not None:
            order = np.argsort(-sizes, kind="stable")[:largest] + 1
            keep &= set(order)
        result[np.isin(labels, list(keep))] = value
    return result


@pytest.mark.parametrize("shape", [(23, 30, 17), (41, 38)])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("side", [5, 8, 64])
def test_small_components_go_whatever_the_blocks(shape, classes, side):
    values = blobs(shape, classes)
    cleaned = clean(values, (side,) * len(shape), CleaningRules(min_size=30))
    np.testing.assert_array_equal(cleaned, by_scipy(values, minimum=30))
    assert 0 < np.count_nonzero(cleaned) < np.count_nonzero(values)


@pytest.mark.parametrize("side", [6, 50])
def test_the_largest_components_of_each_class_stay(side):
    values = blobs((20, 24, 28), 2, seed=1, level=0.12)
    cleaned = clean(values, (side,) * 3, CleaningRules(keep_largest=1))
    sizes = [ndimage.label(cleaned == value)[1] for value in (1, 2)]
    assert sizes == [1, 1]
    assert np.count_nonzero(cleaned) == np.count_nonzero(by_scipy(values, largest=1))


@pytest.mark.parametrize("shape", [(30, 26, 22), (50, 44)])
@pytest.mark.parametrize("side", [7, 64])
def test_holes_are_filled_whatever_the_blocks(shape, side):
    values = blobs(shape, seed=2, level=-0.12)
    filled = fill(values, (side,) * len(shape), 10**9)
    np.testing.assert_array_equal(filled, ndimage.binary_fill_holes(values))
    assert np.count_nonzero(filled) > np.count_nonzero(values)


def test_a_map_in_memory_is_cleaned_like_its_blocks():
    values = blobs((26, 31), seed=3, level=-0.1)
    rules = CleaningRules(min_size=40, keep_largest=2, fill_holes=6)
    np.testing.assert_array_equal(clean_array(values, rules), clean(fill(values, (7, 9), 6), (7, 9), rules))


def test_large_holes_stay():
    values = np.ones((20, 20), np.uint8)
    values[3:5, 3:5] = 0
    values[8:16, 8:16] = 0
    filled = fill(values, (6, 6), 10)
    assert filled[3:5, 3:5].all()
    assert not filled[8:16, 8:16].any()


def test_components_know_the_border_and_their_sizes():
    values = np.zeros((9, 9), np.uint8)
    values[0:2, 4] = 1
    values[4:8, 3:6] = 2
    components = find_components(values, (3, 3))
    roots = np.flatnonzero(components.size)
    assert {(int(components.value[r]), int(components.size[r]), bool(components.at_border[r])) for r in roots} == {
        (1, 2, True), (2, 12, False),
    }  # fmt: skip


def test_joins_are_transitive():
    np.testing.assert_array_equal(
        roots_of(6, [np.array([[1, 3], [3, 5]]), np.array([[2, 4]])]), [0, 1, 2, 1, 2, 1]
    )


def test_impossible_rules_are_refused():
    with pytest.raises(VolumenError, match="postprocess: expected"):
        CleaningRules(min_size=-1)
    assert CleaningRules().does_nothing
