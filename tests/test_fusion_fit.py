"""The fit of a fusion, against a second implementation and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volumen.metrics.fusion import VoxelSample, best_threshold, crossed_gain, fit, fit_logistic
from volumen.utils.errors import VolumenError


def _data(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy views of a label, a third without information, and one that speaks against it."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    sign = np.where(truth, 1.0, -1.0)
    columns = [3 * sign + 4 * rng.normal(size=n), 10 + 0.5 * sign + rng.normal(size=n), rng.normal(size=n)]
    return np.column_stack([*columns, -sign + 3 * rng.normal(size=n)]), truth


def test_the_fit_is_that_of_a_second_implementation_with_the_same_constraint():
    x, y = _data()
    bias, weights = fit_logistic(x, y)
    features, labels = torch.from_numpy(x), torch.from_numpy(y).double()
    # Squares keep the weights at least 0; LBFGS minimises without bounds.
    roots = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([roots, offset], lr=0.5, max_iter=500, tolerance_grad=1e-10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        z = offset + features @ roots.square()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, labels)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    np.testing.assert_allclose(weights, roots.square().detach().numpy(), atol=2e-3)
    assert bias == pytest.approx(offset.item(), abs=5e-3)
    assert weights[3] == 0  # what speaks against the label is not used, rather than used with the other sign
    assert weights[0] > 0.2
    assert weights[1] > 0.5


def test_the_weights_are_those_of_the_distribution_that_made_the_data():
    # For Gaussians of equal deviation s around +-m, the log odds are 2 m x / s^2 + log(prior odds).
    x, y = _data(200_000)
    bias, weights = fit_logistic(x[:, :2], y)
    assert weights[0] == pytest.approx(2 * 3 / 4**2, rel=0.03)
    assert weights[1] == pytest.approx(2 * 0.5 / 1**2, rel=0.03)
    assert bias == pytest.approx(np.log(0.3 / 0.7) - 10 * 2 * 0.5, rel=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_has_the_best_dice_of_all(seed):
    rng = np.random.default_rng(seed)
    score = np.round(rng.normal(size=60), 1)  # many scores are equal
    labels = rng.random(60) < 1 / (1 + np.exp(-2 * score))
    labels[0] = True

    def dice(t: float) -> float:
        return 2 * ((score >= t) & labels).sum() / ((score >= t).sum() + labels.sum())

    best = max(dice(t) for t in [*score, score.max() + 1])
    assert dice(best_threshold(score, labels)) == pytest.approx(best)


def test_classes_that_can_be_separated_have_finite_weights():
    x = np.linspace(-1, 1, 101)[:, None]
    bias, weights = fit(x, x[:, 0] > 0.1)
    assert np.isfinite([bias, *weights]).all()
    assert ((bias + x @ weights >= 0) == (x[:, 0] > 0.1)).all()


def _filled(x: np.ndarray, y: np.ndarray, **options) -> VoxelSample:
    sample = VoxelSample(x.shape[1], **options)
    for half, part in enumerate(np.array_split(np.arange(len(y)), 2)):
        for block in np.array_split(part, 7):
            sample.add(x[block].T, y[block], half)
    return sample


def test_the_gain_is_found_where_heads_add_something_and_not_where_they_do_not():
    x, y = _data(40_000)
    gain = crossed_gain(_filled(x, y), own=0)
    assert gain.helps
    # The best decision that uses both views, from the known distribution, on the same voxels.
    odds = 2 * 3 / 16 * x[:, 0] + 2 * 0.5 * (x[:, 1] - 10)
    t = best_threshold(odds, y)
    best = 2 * ((odds >= t) & y).sum() / ((odds >= t).sum() + y.sum())
    assert gain.fused == pytest.approx(best, abs=0.005)
    noise = crossed_gain(_filled(x[:, [0, 2]], y), own=0)
    assert not noise.helps
    assert abs(noise.gain) < 0.003


def test_a_threshold_alone_is_no_gain_of_a_fusion():
    x, y = _data(40_000)
    shifted = np.column_stack([x[:, 0] - 8.0, x[:, 2]])  # the own head decides far too rarely
    gain = crossed_gain(_filled(shifted, y), own=0)
    assert gain.moved > gain.alone + 0.1
    assert gain.fused > gain.alone + 0.1
    assert not gain.helps


def test_the_sample_is_uniform_and_its_memory_bounded():
    rng = np.random.default_rng(0)
    sample = VoxelSample(1, capacity=2000, seed=3)
    for number in range(50):
        values = np.full(1000, float(number))
        sample.add(values[None], rng.random(1000) < 0.5, 0)
    assert [len(rows) for rows in sample.rows] == [2000, 0]
    counts = np.bincount(sample.half(0)[0][:, 0].astype(int), minlength=50)
    # 40 of each block are expected, with a deviation of about 6.2.
    assert abs(counts.mean() - 40) < 1e-9
    assert counts.min() > 10
    assert counts.max() < 75


def test_weights_count_as_repetitions():
    sample = VoxelSample(1, capacity=3000)
    for value, weight in ((0.0, 1.0), (1.0, 9.0)):
        sample.add(np.full((1, 50_000), value), np.ones(50_000, bool), 0, weight)
    assert sample.half(0)[0].mean() == pytest.approx(0.9, abs=0.03)


def test_merged_samples_are_a_sample_of_all():
    parts = [VoxelSample(1, capacity=1000, seed=seed) for seed in (1, 2)]
    for value, part in enumerate(parts):
        part.add(np.full((1, 30_000), float(value)), np.zeros(30_000, bool), 1)
    parts[0].merge(parts[1].rows)
    assert len(parts[0].rows[1]) == 1000
    assert parts[0].half(1)[0].mean() == pytest.approx(0.5, abs=0.07)


def test_values_that_are_not_finite_do_not_count():
    sample = VoxelSample(1)
    sample.add(np.array([[1.0, np.nan, np.inf, 2.0]]), np.ones(4, bool), 0)
    assert sorted(sample.half(0)[0][:, 0]) == [1, 2]


def test_too_few_voxels_are_refused_with_their_number():
    x, y = _data(40_000)
    y[20_000:] = False
    y[20_000:20_123] = True
    with pytest.raises(VolumenError, match=r"targets.ink.fuse.*1000.*foreground of half 2.*found 123"):
        _filled(x, y).check("targets.ink.fuse")
