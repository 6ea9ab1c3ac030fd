"""The valid-patch index against a brute-force loop over patches, and its cache."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from volumen.data.caching.index_cache import _warn_once, cache_path, load_arrays, store_arrays
from volumen.data.formats.opening import open_volume
from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
from volumen.data.index.label_counts import ANY_OBJECT
from volumen.data.index.patch_grid import axis_starts
from volumen.data.index.patch_index import PatchTable
from volumen.data.index.patches import find_valid_patches
from volumen.utils.boxes import bounding_box, box_extent, whole_box
from volumen.utils.errors import VolumenError

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"


class ArrayStub:
    """A volume over an array that notes which chunks are read."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...] | None = None, ndim: int | None = None):
        ndim = ndim or array.ndim
        self.path = "stub"
        self.array = array if array.ndim > ndim else array[None]
        self.shape = self.array.shape[1:]
        self.channels = len(self.array)
        self.dtype = array.dtype
        self.chunks = chunks or self.shape
        self.reads: Counter = Counter()

    def read(self, region):
        for index in itertools.product(
            *(range(s.start // c, -(-s.stop // c)) for s, c in zip(region, self.chunks))
        ):
            self.reads[index] += 1
        return self.array[(slice(None), *region)].copy()

    def fingerprint(self):
        return str(hash(self.array.tobytes()))


@dataclass
class CaseStub:
    labels: dict
    masks: dict = field(default_factory=dict)
    name: str = "a"
    image: object = None

    def __post_init__(self):
        self.image = self.image or next(iter(self.labels.values()))


def find(case, patch, box=None, **options):
    cases = [case] if isinstance(case, CaseStub) else case
    boxes = {c.name: [whole_box(c.image.shape)] for c in cases} if box is None else {cases[0].name: box}
    options = {"targets": sorted({t for c in cases for t in c.labels}), "progress": False, **options}
    return find_valid_patches(cases, boxes, patch, num_threads=options.pop("num_threads", 1), **options)


def brute_force(label, mask, ignore, box, start, patch, ratio, bbox):
    """Judge one patch of one target by looking at its voxels."""
    region = tuple(slice(s, min(s + p, high)) for s, p, (_, high) in zip(start, patch, box))
    values = label[region]
    known = np.ones(values.shape, bool) if mask is None else mask[region] > 0
    if ignore is not None:
        known = known & (values != ignore)
    labelled = known if mask is not None else known & (values != 0)
    share = labelled.sum() / labelled.size
    valid = labelled.any() and share >= ratio - 1e-12
    if valid and bbox > 0:
        where = np.argwhere(labelled)
        valid = np.prod(where.max(0) - where.min(0) + 1) >= bbox * labelled.size - 1e-9
    return {
        "share": share,
        "valid": bool(valid),
        "occupied": bool((known & (values != 0)).any()),
        "known": bool(known.any() and known.mean() >= ratio - 1e-12),
        "classes": {int(v) for v in np.unique(values[known])},
    }


@st.composite
def problems(draw):
    ndim = draw(st.sampled_from([2, 3]))
    sizes = st.integers(1, 14 if ndim == 3 else 24)
    shape = tuple(draw(sizes) for _ in range(ndim))
    patch = tuple(draw(st.integers(1, 9)) for _ in range(ndim))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.uint32]))
    density = draw(st.sampled_from([0.02, 0.2, 0.7]))

    def random_label():
        return (rng.integers(1, 4, shape) * (rng.random(shape) < density)).astype(dtype)

    def chunked(array):
        return ArrayStub(array, tuple(int(rng.integers(1, n + 1)) for n in shape))

    targets = ["t", "u"][: draw(st.integers(1, 2))]
    labels = {t: random_label() for t in targets}
    masks = {t: (rng.random(shape) < 0.5).astype(np.uint8) for t in targets if draw(st.booleans())}
    ignore = {t: draw(st.sampled_from([0, 2, 3])) for t in targets if draw(st.booleans())}
    cuts = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in shape]
    box = tuple((a, b) if b > a else (0, n) for (a, b), n in zip(cuts, shape))
    options = {
        "stride": draw(st.none() | st.tuples(*[st.integers(1, 6)] * ndim)),
        "min_labeled_ratio": draw(st.sampled_from([0.0, 0.1, 0.3, 1.0])),
        "min_bbox_percent": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "background": draw(st.booleans()),
        "jitter": draw(st.booleans()),
        "ignore_labels": ignore,
        "classes": {t: [1, 3] for t in targets} if draw(st.booleans()) else None,
        "num_threads": draw(st.sampled_from([1, 3])),
    }
    case = CaseStub({t: chunked(a) for t, a in labels.items()}, {t: chunked(a) for t, a in masks.items()})
    return case, labels, masks, box, patch, options


@given(problems())
@settings(max_examples=60, deadline=None)
def test_an_index_by_pieces_equals_that_of_the_whole(problem):
    case, _, _, box, patch, options = problem
    whole = find(case, patch, [box], allow_empty=True, **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("volumen.data.index.patches.WHOLE_CELLS", 0)
        patched.setattr("volumen.data.index.patch_grid.WHOLE_CELLS", 0)
        patched.setattr("volumen.data.index.patch_grid._SUBREGION_CELLS", 30)
        pieces = find(case, patch, [box], allow_empty=True, **options)
    assert_same_index(pieces, whole)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_index_equals_brute_force(problem):
    case, labels, masks, box, patch, options = problem
    index = find(case, patch, [box], allow_empty=True, **options)
    ratio, bbox, background = (options[k] for k in ("min_labeled_ratio", "min_bbox_percent", "background"))

    def judge(start):
        each = {
            t: brute_force(
                labels[t], masks.get(t), options["ignore_labels"].get(t), box, start, patch, ratio, bbox
            )
            for t in labels
        }
        occupied = any(e["occupied"] for e in each.values())
        valid = any(e["valid"] for e in each.values()) and (occupied or not background)
        empty = background and not occupied and any(e["known"] for e in each.values())
        return {
            "foreground": valid,
            "background": empty,
            "share": max(e["share"] for e in each.values()),
            "classes": {(t, v) for t, e in each.items() for v in e["classes"]},
        }

    grid = itertools.product(
        *(axis_starts(*span, p, s) for span, p, s in zip(box, patch, index.stride)),
    )
    truth = {start: judge(start) for start in (tuple(int(i) for i in g) for g in grid)}
    for kind in ("foreground", "background"):
        table = getattr(index, kind)
        found = [tuple(row) for row in table.start.tolist()]
        assert found == [start for start, t in truth.items() if t[kind]]
        for row, start in enumerate(found):
            assert table.share[row] == pytest.approx(truth[start]["share"], abs=1e-6)
            for bit, shift in enumerate(index.shifts):
                moved = tuple(s + d for s, d in zip(start, shift))
                inside = all(
                    d == 0 or (m >= low and m + p <= high)
                    for m, d, p, (low, high) in zip(moved, shift, patch, box)
                )
                expected = judge(moved) if inside else {kind: False, "classes": set()}
                assert bool(int(table.shifts[row]) >> bit & 1) == expected[kind]
                for k, pair in enumerate(index.classes):
                    has_class = bool(int(table.class_shifts[k, row]) >> bit & 1)
                    assert not has_class or (expected[kind] and pair in expected["classes"])
    assert_no_voxel_of_a_class_is_lost(index, labels, masks, options)


def assert_no_voxel_of_a_class_is_lost(index, labels, masks, options):
    """Every voxel of a class that a patch can show lies in a patch that can be drawn for the class."""
    table = index.foreground
    for k, (target, value) in enumerate(index.classes):
        shown = np.zeros(labels[target].shape, bool)
        drawn = shown.copy()
        for row, start in enumerate(table.start.tolist()):
            for bit, shift in enumerate(index.shifts):
                _, box = index.regions[table.region[row]]
                part = tuple(
                    slice(s + d, min(s + d + p, high))
                    for s, d, p, (_, high) in zip(start, shift, index.patch_size, box)
                )
                shown[part] |= bool(int(table.shifts[row]) >> bit & 1)
                drawn[part] |= bool(int(table.class_shifts[k, row]) >> bit & 1)
        voxels = labels[target] == value
        if target in masks:
            voxels &= masks[target] > 0
        if value == options["ignore_labels"].get(target):
            voxels[:] = False
        assert not (voxels & shown & ~drawn).any()


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_grid_covers_the_region_and_stays_inside(low, extent, size, stride):
    high = low + extent
    starts = axis_starts(low, high, size, stride)
    assert starts[0] == low
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= stride).all()
    assert starts[-1] == max(low, high - size)


@given(problems(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_random_locations_stay_inside_and_valid(problem, seed):
    case, labels, masks, box, patch, options = problem
    index = find(case, patch, [box], allow_empty=True, **{**options, "jitter": True})
    rng = np.random.default_rng(seed)
    for row in range(min(len(index), 5)):
        location = index.random_location(row, rng)
        for start, size, (low, high) in zip(location.start, patch, box):
            if high - low >= size:
                assert low <= start <= high - size
            else:
                assert high - size <= start <= low
        judged = [
            brute_force(
                labels[t],
                masks.get(t),
                options["ignore_labels"].get(t),
                box,
                tuple(max(s, low) for s, (low, _) in zip(location.start, box)),
                patch,
                options["min_labeled_ratio"],
                options["min_bbox_percent"],
            )
            for t in labels
        ]
        assert any(j["valid"] for j in judged)


def test_random_locations_leave_the_grid_in_every_phase():
    case = CaseStub({"t": ArrayStub(np.ones((160, 160, 160), np.uint8), (64, 64, 64))})
    index = find(case, (64, 64, 64), jitter=True)
    rng = np.random.default_rng(0)
    starts = np.array([index.random_location(row, rng).start for row in range(len(index)) for _ in range(20)])
    for axis in range(3):
        assert {0, 1, 2, 3} <= set((starts[:, axis] % 4).tolist())
    assert len(index.shifts) == 64


@pytest.mark.parametrize("stride", [(2, 2, 2), (5, 3, 7), (8, 8, 8), (16, 16, 16)])
@pytest.mark.parametrize("jitter", [False, True])
def test_every_chunk_is_read_once(stride, jitter):
    rng = np.random.default_rng(0)
    label = ArrayStub((rng.random((70, 65, 90)) < 0.3).astype(np.uint8), (32, 16, 64))
    mask = ArrayStub(np.ones((70, 65, 90), np.uint8), (32, 32, 32))
    case = CaseStub({"t": label}, {"t": mask})
    boxes = [((0, 40), (0, 65), (0, 90)), ((40, 70), (0, 65), (0, 90))]
    find(case, (16, 16, 16), boxes, stride=stride, jitter=jitter, background=True)
    assert set(label.reads.values()) == {1}
    assert set(mask.reads.values()) == {1}
    assert len(label.reads) == 3 * 5 * 2


def test_label_is_not_read_where_the_mask_decides():
    label = ArrayStub(np.zeros((32, 32), np.uint8), (8, 8))
    case = CaseStub({"t": label}, {"t": ArrayStub(np.ones((32, 32), np.uint8), (8, 8))})
    assert len(find(case, (8, 8))) == 49
    assert not label.reads


def test_multichannel_labels_are_labelled_where_any_channel_is():
    array = np.zeros((2, 8, 8), np.uint8)
    array[0, :2, :4] = 1
    array[1, 2:4, :4] = 1
    case = CaseStub({"t": ArrayStub(array, ndim=2)})
    index = find(case, (4, 4), stride=(4, 4))
    assert index.foreground.start.tolist() == [[0, 0]]
    assert index.foreground.share.tolist() == [1.0]


def test_cases_may_lack_targets():
    full = CaseStub({"t": ArrayStub(np.ones((8, 8), np.uint8))}, name="full")
    other = CaseStub({"u": ArrayStub(np.ones((8, 8), np.uint8))}, name="other")
    none = CaseStub({}, name="none", image=ArrayStub(np.zeros((8, 8), np.uint8)))
    index = find([none, full, other], (8, 8), targets=["t", "u"])
    assert [index.grid_location(i).case for i in range(len(index))] == [1, 2]


def test_region_smaller_than_the_patch_gives_one_patch_judged_by_its_own_voxels():
    case = CaseStub({"t": ArrayStub(np.ones((5, 20), np.uint8))})
    index = find(case, (8, 10), min_labeled_ratio=1.0, jitter=True)
    assert index.foreground.start.tolist() == [[0, 0], [0, 5], [0, 10]]
    starts = {index.random_location(0, np.random.default_rng(i)).start[0] for i in range(60)}
    assert starts == {-3, -2, -1, 0}


def test_coarse_search_agrees_with_the_full_one_on_blocky_labels():
    rng = np.random.default_rng(3)
    coarse = (rng.random((12, 14)) < 0.2).astype(np.uint8)
    fine = coarse.repeat(4, 0).repeat(4, 1)
    full, small = (CaseStub({"t": ArrayStub(a, (8, 8))}) for a in (fine, coarse))
    expected = find(full, (16, 16), stride=(8, 8), min_bbox_percent=0.3)
    found = find(full, (16, 16), stride=(8, 8), min_bbox_percent=0.3, search_cases=[small])
    assert found.foreground.start.tolist() == expected.foreground.start.tolist()
    assert np.allclose(found.foreground.share, expected.foreground.share)


def test_skipping_validation_takes_every_grid_patch_unread():
    label = ArrayStub(np.zeros((20, 20), np.uint8))
    index = find(CaseStub({"t": label}), (8, 8), skip_patch_validation=True)
    assert len(index) == 16
    assert not label.reads
    start = np.array([index.random_location(5, np.random.default_rng(i)).start for i in range(200)])
    assert start.min() == 2
    assert start.max() == 6


@pytest.mark.parametrize(
    ("array", "options", "parts"),
    [
        (
            np.eye(16, dtype=np.uint8),
            {},
            ["at least 0.1", "at most 0.0625 (in a)", "set it to 0.062 or lower"],
        ),
        (np.zeros((16, 16), np.uint8), {}, ["no training patch of 16x16 holds a labelled voxel of t"]),
        (np.eye(16, dtype=np.uint8), {"part": "validation"}, ["no validation patch"]),
        (
            np.tri(16, dtype=np.uint8)[::-1] * (np.arange(16) < 2),
            {"min_bbox_percent": 0.9},
            ["min_bbox_percent"],
        ),
    ],
)
def test_nothing_valid_is_an_error_that_says_what_would_be(array, options, parts):
    with pytest.raises(VolumenError) as caught:
        find(CaseStub({"t": ArrayStub(array)}), (16, 16), **options)
    for part in ("dataset_config.min_labeled_ratio", *parts):
        assert part in str(caught.value)


def test_a_default_ratio_gives_way(tmp_path, caplog):
    case = CaseStub({"t": ArrayStub(np.eye(16, dtype=np.uint8))})
    with caplog.at_level(logging.WARNING):
        index = find(case, (16, 16), relax=True, cache_dir=tmp_path)
    assert len(index) == 1
    assert "half of the best share of each is used there" in caplog.text
    assert_same_index(index, find(case, (16, 16), relax=True, cache_dir=tmp_path))
    for options in ({}, {"cache_dir": tmp_path}):
        with pytest.raises(VolumenError):
            find(case, (16, 16), **options)


def test_a_default_ratio_gives_way_in_each_image_for_itself(caplog):
    """A labelled image with sparser objects than the others would else never be trained on, in silence."""
    rng = np.random.default_rng(3)
    dense, sparse, empty = ((rng.random((40, 40)) < share).astype(np.uint8) for share in (0.3, 0.02, 0))
    cases = {
        name: CaseStub({"t": ArrayStub(array)})
        for name, array in zip("abc", (dense, sparse, empty), strict=True)
    }
    alone = {name: find(case, (16, 16), relax=True, allow_empty=True) for name, case in cases.items()}
    for name, case in cases.items():
        case.name = name
    caplog.clear()
    boxes = {name: [((0, 40), (0, 40))] for name in cases}
    options = {"targets": ["t"], "progress": False, "jitter": True, "allow_empty": True}
    with caplog.at_level(logging.WARNING):
        together = find_valid_patches(list(cases.values()), boxes, (16, 16), relax=True, **options)
    counts = np.bincount([together.regions[row][0] for row in together.foreground.region], minlength=3)
    assert counts.tolist() == [len(alone[name]) for name in "abc"]
    assert counts[1] > 0
    assert counts[2] == 0
    assert "no patch of b is labelled to min_labeled_ratio 0.1" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        kept = find_valid_patches(list(cases.values()), boxes, (16, 16), relax=False, **options)
    assert len(kept) == counts[0]
    assert "no patch of b is labelled to min_labeled_ratio 0.1; it has no patch" in caplog.text


def test_a_grid_too_fine_for_memory_is_refused():
    label = ArrayStub(np.zeros((1, 1, 1), np.uint8))
    label.shape = label.chunks = (4096, 4096, 4096)
    with pytest.raises(VolumenError, match=r"stride: the patch grid of 1 1 1 voxels .*larger stride"):
        find(CaseStub({"t": label}), (64, 64, 64), stride=(1, 1, 1))


def test_a_fine_grid_limits_the_displacements():
    label = ArrayStub(np.ones((4, 900, 900), np.uint8))
    assert len(find(CaseStub({"t": label}), (2, 4, 4), jitter=True).shifts) < 64


def test_suggested_ratio_works():
    case = CaseStub({"t": ArrayStub(np.eye(16, dtype=np.uint8))})
    assert len(find(case, (16, 16), min_labeled_ratio=0.062)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stride": (0, 4)},
            "dataset_config.patch_stride: expected 2 positive numbers, one per axis of the patch, found [0, 4]",
        ),
        ({"min_labeled_ratio": 10}, "min_labeled_ratio must be a share between 0 and 1, got 10"),
        ({"min_bbox_percent": 95}, "min_bbox_percent must be a share between 0 and 1, got 95"),
        ({"classes": {"t": range(64)}}, "at most 63 classes can be recorded, got 64"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find(CaseStub({"t": ArrayStub(np.ones((8, 8), np.uint8))}), (4, 4), **options)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_unreadable_label_is_named_with_its_region(num_threads):
    label = ArrayStub(np.ones((64, 64), np.uint8), (64, 64))
    label.path = "labels/a_t.zarr"
    label.read = lambda region: (_ for _ in ()).throw(RuntimeError("bad block"))
    with pytest.raises(VolumenError, match=r"labels/a_t.zarr: the region \[0:64, 0:64\] .*bad block"):
        find(CaseStub({"t": label}), (8, 8), num_threads=num_threads)


def cached_case(seed=0):
    rng = np.random.default_rng(seed)
    return CaseStub({"t": ArrayStub((rng.random((40, 40)) < 0.3).astype(np.uint8), (16, 16))})


OPTIONS = {"jitter": True, "background": True, "classes": {"t": [1]}, "min_labeled_ratio": 0.3}


def assert_same_index(a, b):
    tables = [replace(i, foreground=None, background=None) for i in (a, b)]
    assert tables[0] == tables[1]
    for kind in ("foreground", "background"):
        for name in PatchTable.__dataclass_fields__:
            left, right = getattr(getattr(a, kind), name), getattr(getattr(b, kind), name)
            assert left.dtype == right.dtype
            assert np.array_equal(left, right)


def test_cache_gives_the_same_index_without_reading(tmp_path):
    case = cached_case()
    built = find(case, (8, 8), cache_dir=tmp_path / "cache", **OPTIONS)
    case.labels["t"].reads.clear()
    assert_same_index(built, find(case, (8, 8), cache_dir=tmp_path / "cache", **OPTIONS))
    assert not case.labels["t"].reads
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"min_labeled_ratio": 0.31},
        {"min_bbox_percent": 0.1},
        {"stride": (3, 3)},
        {"ignore_labels": {"t": 1}},
        {"jitter": False},
        {"background": False},
        {"classes": None},
        {"case": cached_case(1)},
        {"box": [((0, 30), (0, 40))]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_cache_is_keyed_by_content_and_parameters(tmp_path, change):
    change = dict(change)
    find(cached_case(), (8, 8), cache_dir=tmp_path, **OPTIONS)
    case = change.pop("case", cached_case())
    options = {**OPTIONS, **change, "allow_empty": True}
    assert_same_index(
        find(case, (8, 8), cache_dir=tmp_path, **options),
        find(case, (8, 8), **options),
    )
    assert len(list(tmp_path.iterdir())) == 2


def damage(path, kind):
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        middle = data.index(b"foreground_start.npy") + 200
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"not an archive at all")


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_cache_is_rebuilt(tmp_path, kind, caplog):
    built = find(cached_case(), (8, 8), cache_dir=tmp_path, **OPTIONS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path, kind)
    with caplog.at_level(logging.WARNING):
        assert_same_index(built, find(cached_case(), (8, 8), cache_dir=tmp_path, **OPTIONS))
    assert "it is built again" in caplog.text
    assert len(path.read_bytes()) == len(whole)


def test_cache_of_other_parameters_under_the_same_name_is_not_used(tmp_path):
    arrays = {"x": np.arange(3)}
    store_arrays(tmp_path, {"a": 1}, arrays)
    cache_path(tmp_path, {"a": 1}).rename(cache_path(tmp_path, {"a": 2}))
    assert load_arrays(tmp_path, {"a": 2}) is None


def test_interrupted_store_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store_arrays(tmp_path, {"a": 1}, {"x": np.arange(3)})
    assert not list(tmp_path.iterdir())


def test_unwritable_cache_is_a_warning(tmp_path, caplog):
    _warn_once.cache_clear()
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        index = find(cached_case(), (8, 8), cache_dir=blocked / "cache", **OPTIONS)
    assert len(index)
    assert "nothing is cached there" in caplog.text


def test_interrupted_build_leaves_nothing(tmp_path):
    case = cached_case()
    case.labels["t"].read = lambda region: (_ for _ in ()).throw(KeyboardInterrupt())
    for num_threads in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            find(case, (8, 8), cache_dir=tmp_path, num_threads=num_threads, **OPTIONS)
    assert not list(tmp_path.iterdir())


def build_in_process(folder, barrier, results):
    barrier.wait()
    results.put(len(find(cached_case(), (8, 8), cache_dir=folder, **OPTIONS)))


def test_two_processes_may_build_at_once(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=build_in_process, args=(tmp_path, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    counts = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert counts == {len(find(cached_case(), (8, 8), **OPTIONS))}
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("layout", ["plain", "sharded", "dotted", "channels"])
def test_absent_zarr_chunks_are_known_and_count_as_zero(tmp_path, zarr_format, layout):
    if layout == "sharded" and zarr_format == 2:
        pytest.skip("zarr v2 has no shards")
    options = {
        "plain": {},
        "sharded": {"shards": (16, 16)},
        "dotted": {"chunk_key_encoding": {"name": "default" if zarr_format == 3 else "v2", "separator": "."}},
        "channels": {},
    }[layout]
    lead = (3,) if layout == "channels" else ()
    array = zarr.create_array(
        tmp_path / "l.zarr",
        shape=(*lead, 40, 48),
        chunks=(*lead, 8, 8),
        dtype="u1",
        zarr_format=zarr_format,
        **options,
    )
    array[..., 8:16, 40:48] = 1
    array[..., 30:40, 3:9] = 2
    volume = open_volume(tmp_path / "l.zarr", ndim=2)
    stored = stored_blocks(volume)
    assert (stored.block, stored.total, stored.fill) == ((8, 8), 30, 0)
    dense = np.asarray(array[:]).reshape(-1, 40, 48).any(0)
    found = {tuple(index) for index in stored.indices.tolist()}
    for index in np.ndindex(5, 6):
        block = dense[tuple(slice(i * 8, (i + 1) * 8) for i in index)]
        assert (index in found) == block.any()
    in_memory = CaseStub({"t": ArrayStub(dense.astype(np.uint8))})
    on_disk = CaseStub({"t": volume})
    for background in (False, True):
        options = {"min_labeled_ratio": 0.05, "background": background, "jitter": True}
        assert_same_index(find(on_disk, (8, 8), **options), find(in_memory, (8, 8), **options))


def test_a_fill_value_other_than_zero_is_read(tmp_path):
    zarr.create_array(tmp_path / "l.zarr", shape=(16, 16), chunks=(8, 8), dtype="u1", fill_value=2)
    volume = open_volume(tmp_path / "l.zarr")
    assert stored_blocks(volume).fill == 2
    assert len(find(CaseStub({"t": volume}), (8, 8))) == 9


def test_indexing_imports_no_torch():
    code = (
        "import sys, volumen.data.index.patches, volumen.data.sampling.split; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(BUNDLE)},
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == b"False"


def test_boxes():
    assert box_extent(((2, 5), (0, 4))) == (3, 4)
    assert whole_box((3, 4)) == ((0, 3), (0, 4))
    where = np.zeros((6, 7), bool)
    assert bounding_box(where) == ((0, 0), (0, 0))
    where[2, 5] = where[4, 1] = True
    assert bounding_box(where) == ((2, 5), (1, 6))


def masked_case():
    """A mask over everything, objects in the left third only."""
    label = np.zeros((32, 96), np.uint16)
    label[8:24, 4:28] = 3000 + np.arange(24, dtype=np.uint16)
    return CaseStub({"t": ArrayStub(label)}, {"t": ArrayStub(np.ones((32, 96), np.uint8))})


def test_masked_background_is_no_label_where_the_loss_counts_on_objects_alone():
    every = find(masked_case(), (16, 16))
    objects = find(masked_case(), (16, 16), objects_only=True)
    assert every.foreground.start[:, 1].max() == 80
    assert objects.foreground.start[:, 1].max() < 28
    assert (objects.foreground.share <= every.foreground.share.max()).all()


def test_any_object_is_a_class_of_targets_without_classes():
    index = find(masked_case(), (16, 16), classes={"t": [ANY_OBJECT]}, jitter=True)
    held = index.foreground.class_shifts[0] > 0
    label = masked_case().labels["t"].array[0]
    rng = np.random.default_rng(0)
    for row in np.flatnonzero(held):
        start = index.random_location(int(row), rng, class_row=0).start
        assert label[tuple(slice(s, s + 16) for s in start)].any()
    for start in index.foreground.start[~held]:
        assert not label[tuple(slice(s + 4, s + 12) for s in start)].any()
    assert 0 < held.sum() < len(held)


def lone_voxel_case(at, shape=(64, 96, 96)):
    """Class 1 almost everywhere, class 2 in a single voxel."""
    label = np.ones(shape, np.uint8)
    label[at] = 2
    return CaseStub({"t": ArrayStub(label)})


@pytest.mark.parametrize("at", [(31, 40, 50), (16, 47, 33), (40, 70, 64)])
def test_a_patch_drawn_for_a_class_has_it_in_its_central_part(at):
    index = find(lone_voxel_case(at), (32, 32, 32), classes={"t": [1, 2]}, jitter=True)
    rows = np.flatnonzero(index.foreground.class_shifts[1])
    rng = np.random.default_rng(0)
    places = [
        [a - s for a, s in zip(at, index.random_location(int(row), rng, class_row=1).start)]
        for row in np.tile(rows, 40)
    ]
    low, high = np.min(places, axis=0), np.max(places, axis=0)
    # Half a patch wide, but for what separates the borders of the counting grid.
    assert (low >= 8 - 3).all()
    assert (high < 24 + 3).all()
    # At several places there, not always at the same.
    assert (high - low >= 6).all()


@pytest.mark.parametrize("at", [(0, 0, 0), (63, 95, 95), (0, 50, 95)])
def test_a_class_at_the_end_of_a_volume_is_drawn_too(at):
    index = find(lone_voxel_case(at), (32, 32, 32), classes={"t": [1, 2]}, jitter=True)
    rows = np.flatnonzero(index.foreground.class_shifts[1])
    assert len(rows)
    for row in rows:
        start = index.random_location(int(row), np.random.default_rng(0), class_row=1).start
        assert all(s <= a < s + 32 for s, a in zip(start, at))


def test_a_class_that_no_valid_patch_can_centre_is_drawn_off_centre():
    label = np.zeros((32, 64), np.uint8)
    label[:, :16] = 1
    label[16, 30] = 2
    # A patch around (16, 30) has too little of a label; one that begins at 0 holds the voxel in its last columns.
    case = CaseStub({"t": ArrayStub(label)})
    index = find(case, (32, 32), classes={"t": [2]}, jitter=True, min_labeled_ratio=0.49)
    (row,) = np.flatnonzero(index.foreground.class_shifts[0])
    assert index.random_location(int(row), np.random.default_rng(0), class_row=0).start == (0, 0)
