"""Candidate boxes, the sums over them, and the choice among them, against brute force and other libraries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies
from scipy.stats import entropy as scipy_entropy

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.pairing import Case
from volumen.inference.windows.heads import Head
from volumen.suggestion.choice import Candidates, choose, overlapping
from volumen.suggestion.grid import BoxGrid
from volumen.suggestion.labelled import LabelledImage, Labelling
from volumen.suggestion.subject import Subject
from volumen.suggestion.suggest import make_candidates
from volumen.suggestion.table import UNIT, entropies, measure
from volumen.transforms.normalize import Normalizer
from volumen.utils.errors import VolumenError

BINARY = Subject(Head("ink", 1), ("ink",))
CLASSES = Subject(Head("tissue", 3, "softmax", "multiclass"), ("grey", "white"))
REGIONS = Subject(Head("tumour", 2, "sigmoid", "multilabel", values=(1, 3)), ("whole", "core"), ignore=255)


@given(
    strategies.lists(
        strategies.tuples(strategies.integers(1, 23), strategies.integers(1, 9)), min_size=1, max_size=3
    ),
    strategies.integers(1, 200),
)
def test_box_sums_are_those_of_a_loop_and_blocks_cover_every_cell_once(sides, voxels):
    shape, size = (tuple(part) for part in zip(*sides, strict=True))
    grid = BoxGrid(shape, size)
    values = np.random.default_rng(0).integers(0, 50, shape)
    cells = np.zeros(grid.cells, np.int64)
    visits = np.zeros(shape, int)
    for block in grid.blocks(voxels):
        region = grid.region(block)
        visits[region] += 1
        for cell in itertools.product(*(range(part.start, part.stop) for part in block)):
            one = grid.region(tuple(slice(n, n + 1) for n in cell))
            cells[cell] = values[one].sum()
    assert (visits == 1).all()
    corners = grid.corners()
    assert grid.box_sums(cells).tolist() == [
        values[tuple(slice(a, a + side) for a, side in zip(corner, grid.extent, strict=True))].sum()
        for corner in corners
    ]
    assert (corners.max(axis=0) + grid.extent == shape).all(), "the last boxes end with the volume"


def volume_of(image, labels=None, masks=None, ignore=None, labelled_only=False, name="a"):
    labels, masks = labels or {}, masks or {}
    names = {*labels, "ink", "tissue"}

    def opened(array):
        return None if array is None else ArrayVolume(array)

    return LabelledImage(
        Case(name, name, {}, {}),
        ArrayVolume(image),
        {t: Labelling(opened(labels.get(t)), opened(masks.get(t)), ignore, labelled_only) for t in names},
    )


def stored(seed, channels, shape):
    """Random probabilities as a prediction stores them."""
    raw = np.random.default_rng(seed).dirichlet([0.4] * max(2, channels), shape)
    return np.moveaxis(np.rint(raw[..., :channels] * 255).astype(np.uint8), -1, 0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_table_is_the_loop_over_its_boxes_and_does_not_depend_on_the_blocks(dtype):
    shape, size = (11, 20, 13), (4, 6, 64)
    rng = np.random.default_rng(1)
    image = rng.integers(0, 200, shape).astype(dtype)
    image[:6, :9] = 7
    mask = (rng.random(shape) < 0.3).astype(np.uint8)
    volume = volume_of(image, {"ink": np.ones(shape, np.uint8)}, {"ink": mask})
    predicted = {
        "ink": ArrayVolume(stored(2, 1, shape), axes="czyx"),
        "tissue": ArrayVolume(stored(3, 3, shape), axes="czyx"),
    }
    properties = {"channels": [{"min": 0.0, "max": 255.0, "mean": 90.0, "std": 60.0}]}
    normalizer = Normalizer("zscore", properties)
    tables = [
        measure(volume, predicted, (BINARY, CLASSES), normalizer, size, block_voxels=voxels)
        for voxels in (1, 300, 10**9)
    ]
    for other in tables[1:]:
        for key, array in tables[0].arrays().items():
            assert array.tobytes() == other.arrays()[key].tobytes(), key
    table = tables[0]
    p, q = predicted["ink"].array[0] / 255, predicted["tissue"].array / 255
    ink = scipy_entropy(np.stack([p, 1 - p]), base=2, axis=0)
    tissue = -sum(np.where(c > 0, c * np.log(np.maximum(c, 1e-9)), 0) for c in q) / np.log(3)
    normal = (image.astype(float) - 90) / 60
    for row, corner in enumerate(table.corners):
        box = tuple(slice(a, a + side) for a, side in zip(corner, table.extent, strict=True))
        close = {"rel": 0, "abs": 2e-4}
        assert table.known["ink"][row] == mask[box].sum()
        assert table.known["tissue"][row] == 0
        assert table.mean_entropy("ink")[row] == pytest.approx(ink[box].mean(), **close)
        assert table.mean_class_entropy("ink")[0, row] == pytest.approx((ink * p)[box].mean(), **close)
        assert table.mean_entropy("tissue")[row] == pytest.approx(tissue[box].mean(), **close)
        for channel in range(3):
            expected = (tissue * q[channel])[box].mean()
            assert table.mean_class_entropy("tissue")[channel, row] == pytest.approx(expected, **close)
            assert table.share("tissue")[channel, row] == pytest.approx(q[channel][box].mean(), abs=1e-9)
        mean, deviation = table.image_features()[:, row]
        assert mean == pytest.approx(normal[box].mean(), abs=1e-3)
        assert deviation == pytest.approx(normal[box].std(), abs=1e-3)


def test_entropy_is_0_where_certain_and_1_where_all_classes_are_equal():
    certain, _ = entropies(np.array([[[255, 0]]], np.uint8), BINARY)
    assert certain.tolist() == [[0, 0]]
    half, of_class = entropies(np.full((1, 1, 1), 128, np.uint8), BINARY)
    assert half[0, 0] / UNIT == pytest.approx(1, abs=1e-4)
    assert of_class[0, 0, 0] / (UNIT * 255) == pytest.approx(128 / 255, abs=1e-4)
    third, _ = entropies(np.full((3, 1, 1), 85, np.uint8), CLASSES)
    assert third[0, 0] / UNIT == pytest.approx(1, abs=1e-4)
    skipped, _ = entropies(np.zeros((3, 1, 1), np.uint8), CLASSES)
    assert skipped[0, 0] == 0, "a window that was left empty is not uncertain"


def test_a_label_to_paint_is_what_a_prediction_of_labels_writes():
    from volumen.inference.output.stored import OutputSpec

    for subject in (BINARY, CLASSES, REGIONS):
        raw = stored(5, subject.head.channels, (6, 7))
        expected = OutputSpec(subject.head, "labels").convert(raw.astype(np.float32) / 255)
        assert np.array_equal(subject.decide(raw), expected)
    assert REGIONS.form.values == (0, 1, 3, 255)


def candidates_of(scores, shares=None, *, corners=None, volume=None, side=4, features=None):
    scores = np.atleast_2d(np.asarray(scores, float))
    n = scores.shape[1]
    corners = np.arange(n)[:, None] * side if corners is None else np.asarray(corners)
    volume = np.zeros(n, int) if volume is None else np.asarray(volume)
    count = volume.max() + 1
    return Candidates(
        volume,
        corners,
        np.full((count, corners.shape[1]), side),
        np.full((count, corners.shape[1]), corners.max() + side),
        np.zeros((n, 1)) if features is None else np.asarray(features, float),
        scores.sum(axis=0),
        scores,
        scores if shares is None else np.atleast_2d(np.asarray(shares, float)),
    )


@pytest.mark.parametrize("strategy", ["power", "entropy", "foreground", "random"])
def test_choices_are_repeatable_and_never_overlap(strategy):
    rng = np.random.default_rng(3)
    corners = np.stack(np.meshgrid(*[np.arange(0, 30, 2)] * 2, indexing="ij"), -1).reshape(-1, 2)
    corners, volume = np.concatenate([corners, corners]), np.repeat([0, 1], len(corners))
    features = rng.random((len(volume), 3))
    candidates = candidates_of(
        rng.random((2, len(volume))), corners=corners, volume=volume, features=features
    )
    found = choose(candidates, strategy, 12, seed=4)
    assert found == choose(candidates, strategy, 12, seed=4)
    assert len(found) == 12
    for one, other in itertools.combinations(found, 2):
        a, b = one.candidate, other.candidate
        apart = (np.abs(corners[a] - corners[b]) >= 4).any()
        assert volume[a] != volume[b] or apart
    if strategy != "entropy":
        assert [c.candidate for c in found] != [c.candidate for c in choose(candidates, strategy, 12, seed=5)]
    everything = choose(candidates, strategy, 10**4, seed=4)
    left = ~np.any([overlapping(candidates, c.candidate) for c in everything], axis=0)
    assert not left.any(), "as many as there is room for, no more"


def test_entropy_takes_the_largest_and_power_draws_in_proportion_to_the_score():
    scores = np.array([1.0, 2.0, 4.0, 1.0])
    taken = choose(candidates_of(scores), "entropy", 2)
    assert [one.candidate for one in taken] == [2, 1]
    # One box, drawn for no class: with a pool of POOL boxes the first of the noisy order is taken.
    for beta, expected in (
        (1.0, scores / scores.sum()),
        (2.0, scores**2 / (scores**2).sum()),
        (0.0, np.full(4, 0.25)),
    ):
        single = candidates_of(np.zeros((0, 4)))
        single = Candidates(**{**vars(single), "entropy": scores})
        firsts = [choose(single, "power", 1, beta=beta, seed=seed)[0].candidate for seed in range(4000)]
        share = np.bincount(firsts, minlength=4) / len(firsts)
        # Three standard errors of 4000 draws are below 0.024.
        assert np.abs(share - expected).max() < 0.025


def test_two_of_three_boxes_are_drawn_for_classes_each_equally_often():
    rng = np.random.default_rng(0)
    rare = np.where(np.arange(100) >= 90, 0.01, 0.0)
    candidates = candidates_of([rng.random(100), rare])
    for strategy in ("power", "foreground"):
        found = choose(candidates, strategy, 9, seed=1)
        assert sorted(str(one.stratum) for one in found) == ["0"] * 3 + ["1"] * 3 + ["None"] * 3
        assert all(one.candidate >= 90 for one in found if one.stratum == 1), (
            "the rare class is where it may be"
        )
        assert [one.stratum for one in found[:3]] == [0, 1, None], "the first ones are of all classes"


def test_power_spreads_boxes_in_feature_space():
    # Ten alike boxes and six others of equal entropy: the eight that are looked at hold some of both kinds.
    features = np.array([[0.0]] * 10 + [[5.0]] * 6)
    candidates = candidates_of(
        np.ones(16), features=features, corners=np.zeros((16, 1), int), volume=range(16)
    )
    for seed in range(10):
        two = [one.candidate for one in choose(candidates, "power", 3, seed=seed) if one.stratum == 0]
        assert sorted(one >= 10 for one in two) == [False, True]


def table_of(volume, predicted, size=(4, 4)):
    return measure(volume, predicted, (BINARY,), Normalizer("unit"), size)


@pytest.mark.parametrize("by", ["mask", "ignore", "labelled only"])
def test_labelled_boxes_and_padding_are_no_candidates(by):
    shape = (8, 16)
    rng = np.random.default_rng(0)
    image = rng.integers(1, 200, shape).astype(np.uint8)
    image[:, 12:] = 0
    known = np.zeros(shape, np.uint8)
    known[:, :4] = 1
    label = np.where(known, 1, 255 if by == "ignore" else 0).astype(np.uint8)
    volume = volume_of(
        image, {"ink": label}, {"ink": known} if by == "mask" else {},
        255 if by == "ignore" else None, by == "labelled only",
    )  # fmt: skip
    predicted = {"ink": ArrayVolume(stored(2, 1, shape), axes="cyx")}
    table = table_of(volume, predicted)
    numbers, candidates = make_candidates([volume], {"a": table}, (BINARY,), 0.1)
    assert sorted({int(x) for _, x in table.corners[numbers]}) == [4, 6, 8, 10]
    assert np.array_equal(candidates.corners, table.corners[numbers])
    _, half = make_candidates([volume], {"a": table}, (BINARY,), 0.5)
    assert sorted({int(x) for _, x in half.corners}) == [2, 4, 6, 8, 10], "the share that may be labelled"


def test_a_finished_volume_is_said_to_be_finished():
    shape = (8, 8)
    image = np.arange(64, dtype=np.uint8).reshape(shape)
    predicted = {"ink": ArrayVolume(stored(2, 1, shape), axes="cyx")}
    finished = volume_of(image, {"ink": np.ones(shape, np.uint8)})
    with pytest.raises(VolumenError, match="labelled already"):
        make_candidates([finished], {"a": table_of(finished, predicted)}, (BINARY,), 0.1)
    empty = volume_of(np.zeros(shape, np.uint8))
    with pytest.raises(VolumenError, match="no box that is unlabelled and has contrast"):
        make_candidates([empty], {"a": table_of(empty, predicted)}, (BINARY,), 0.1)
