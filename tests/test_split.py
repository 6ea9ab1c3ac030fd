"""The split shares no voxel, is repeatable, and puts labels on both sides."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.sampling.split import MIN_REGION, Split, labelled_profiles, make_split
from volumen.utils.boxes import Box, box_extent
from volumen.utils.errors import VolumenError


def profiles_of(label):
    axes = range(label.ndim)
    return [(label > 0).sum(axis=tuple(a for a in axes if a != axis)) for axis in axes]


def labelled_in(box, label):
    return int((label[tuple(slice(*span) for span in box)] > 0).sum())


@st.composite
def volumes(draw):
    ndim = draw(st.sampled_from([2, 3]))
    sizes = st.integers(1, 300)
    count = draw(st.integers(1, 6))
    shapes = {f"v{i}": tuple(draw(sizes) for _ in range(ndim)) for i in range(count)}
    patch = tuple(draw(st.integers(4, 64)) for _ in range(ndim))
    return shapes, patch, draw(st.floats(0.05, 1.0)), draw(st.integers(0, 1000))


@given(volumes())
@settings(max_examples=200, deadline=None)
def test_split_shares_no_voxel_and_loses_none(problem):
    shapes, patch, fraction, seed = problem
    if fraction < 1 and len(shapes) == 1:
        (shape,) = shapes.values()
        if all(n < 2 * min(MIN_REGION, p) for n, p in zip(shape, patch)):
            with pytest.raises(VolumenError, match="too small to be divided"):
                make_split(shapes, patch, fraction, seed)
            return
    split = make_split(shapes, patch, fraction, seed)
    for name, shape in shapes.items():
        boxes = [*split.train.get(name, []), *split.val.get(name, [])]
        assert not any(boxes_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert sum(np.prod(box_extent(box)) for box in boxes) == np.prod(shape)
        assert all(0 <= a < b <= n for box in boxes for (a, b), n in zip(box, shape))
    assert bool(split.val) == (fraction < 1)
    assert split.train
    assert split == make_split(shapes, patch, fraction, seed)
    assert split == make_split(dict(reversed(shapes.items())), patch, fraction, seed)
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split


@given(volumes())
@settings(max_examples=100, deadline=None)
def test_whole_volumes_are_held_out_where_there_are_several(problem):
    shapes, patch, fraction, seed = problem
    assume(len(shapes) > 1 and fraction < 1)
    split = make_split(shapes, patch, fraction, seed)
    assert not set(split.train) & set(split.val)
    assert set(split.train) | set(split.val) == set(shapes)
    assert len(split.val) == min(max(1, round(len(shapes) * (1 - fraction))), len(shapes) - 1)


@given(volumes())
@settings(max_examples=200, deadline=None)
def test_single_volume_leaves_a_patch_on_both_sides_where_it_can(problem):
    shapes, patch, fraction, seed = problem
    name, shape = next(iter(shapes.items()))
    assume(fraction < 1 and any(n >= 2 * p for n, p in zip(shape, patch)))
    split = make_split({name: shape}, patch, fraction, seed)
    (box,) = split.val[name]
    (axis,) = (a for a, n in enumerate(shape) if box_extent(box)[a] < n)
    assert box_extent(box)[axis] >= patch[axis]
    assert max(box_extent(b)[axis] for b in split.train[name]) >= patch[axis]


def test_longest_axis_in_patches_is_cut():
    split = make_split({"a": (13, 1024, 900)}, (8, 256, 256), 0.75, 0)
    assert {box_extent(b) for b in split.val["a"]} == {(13, 256, 900)}
    assert {box_extent(b) for b in split.train["a"]} == {(13, 768, 900)}


def test_seed_chooses():
    shapes = {f"v{i:02d}": (40, 40, 40) for i in range(20)}
    held_out = {tuple(make_split(shapes, (8, 8, 8), 0.8, seed).val) for seed in range(10)}
    assert len(held_out) > 5
    sides = {make_split({"a": (100, 40)}, (8, 8), 0.8, seed).val["a"][0][0] for seed in range(10)}
    assert sides == {(0, 20), (80, 100)}


@pytest.mark.parametrize("seed", range(4))
def test_validation_gets_labels_wherever_they_are(seed):
    shape = (256, 128, 128)
    places = {
        "at one end": (slice(0, 60), slice(None), slice(None)),
        "in the middle": (slice(100, 160), slice(None), slice(None)),
        "one slice": (slice(128, 129), slice(None), slice(None)),
        "a small block": (slice(20, 60), slice(30, 70), slice(80, 120)),
        "everywhere": (slice(None),) * 3,
    }
    for region in places.values():
        label = np.zeros(shape, np.uint8)
        label[region] = 1
        split = make_split({"a": shape}, (32, 32, 32), 0.8, seed, {"a": {"t": profiles_of(label)}})
        val = labelled_in(split.val["a"][0], label)
        train = sum(labelled_in(box, label) for box in split.train["a"])
        assert 0 < val < train


def test_every_target_is_validated():
    label = {t: np.zeros((200, 64), np.uint8) for t in "ab"}
    label["a"][:] = 1
    label["b"][90:130] = 1
    split = make_split(
        {"v": (200, 64)}, (16, 16), 0.8, 0, {"v": {t: profiles_of(a) for t, a in label.items()}}
    )
    for array in label.values():
        assert labelled_in(split.val["v"][0], array) > 0
        assert sum(labelled_in(box, array) for box in split.train["v"]) > 0


def test_unlabelled_volumes_are_never_held_out():
    shapes = dict.fromkeys("abcd", (64, 64))
    empty = {"t": [np.zeros(64, int)] * 2}
    full = {"t": [np.full(64, 64)] * 2}
    for seed in range(5):
        split = make_split(shapes, (16, 16), 0.5, seed, {"a": empty, "b": full, "c": full, "d": empty})
        assert set(split.val) < {"b", "c"}
    split = make_split(shapes, (16, 16), 0.75, 0, {"a": empty, "b": full, "c": empty, "d": empty})
    assert set(split.val) == {"b"}
    assert set(split.train) == set("abcd")


def test_held_out_volumes_hold_the_share_asked_for():
    shapes = {"big": (400, 100), **{f"s{i}": (20, 100) for i in range(4)}}
    for seed in range(5):
        assert "big" in make_split(shapes, (8, 8), 0.8, seed).train


def test_no_validation():
    split = make_split({"a": (50, 50), "b": (20, 20)}, (64, 64), 1.0, 0)
    assert split.train == {"a": [((0, 50), (0, 50))], "b": [((0, 20), (0, 20))]}
    assert split.val == {}


def test_narrow_volume_warns_and_trains(caplog):
    with caplog.at_level(logging.WARNING):
        split = make_split({"a": (100, 90)}, (64, 64), 0.8, 0)
    assert "reflected" in caplog.text
    assert box_extent(split.val["a"][0]) == (36, 90)
    assert box_extent(split.train["a"][0]) == (64, 90)


def test_errors():
    with pytest.raises(VolumenError, match=r"a: too small to be divided .*shape \(9, 9\).*tr_val_split"):
        make_split({"a": (9, 9)}, (64, 64), 0.8, 0)
    with pytest.raises(VolumenError, match="no volume"):
        make_split({}, (64, 64), 0.8, 0)
    with pytest.raises(ValueError, match=r"train_fraction must be above 0 and at most 1, got 1.5"):
        make_split({"a": (99, 99)}, (8, 8), 1.5, 0)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_labelled_profiles_equal_direct_counts(num_threads):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (70, 33, 41)).astype(np.uint8)
    mask = rng.integers(0, 2, label.shape).astype(np.uint8)
    case = SimpleNamespace(
        name="a",
        labels={"t": ArrayVolume(label), "u": ArrayVolume(label)},
        masks={"u": ArrayVolume(mask)},
    )
    found = labelled_profiles(
        [case], ["t", "u", "absent"], ignore_labels={"t": 3, "u": 2}, num_threads=num_threads, progress=False
    )
    truth = {"t": (label != 0) & (label != 3), "u": (mask > 0) & (label != 2)}
    assert set(found["a"]) == {"t", "u"}
    for target, flags in truth.items():
        for axis, expected in enumerate(profiles_of(flags)):
            assert np.array_equal(found["a"][target][axis], expected)


def boxes_overlap(a: Box, b: Box) -> bool:
    """Tell whether two boxes of one volume share a voxel."""
    return all(
        max(a_start, b_start) < min(a_stop, b_stop) for (a_start, a_stop), (b_start, b_stop) in zip(a, b)
    )
