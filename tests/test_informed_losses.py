"""Losses of targets of which only a part is known: bounds, confidence and free directions."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from volumen.losses.base import Loss
from volumen.losses.informed import Knowledge, across, in_plane
from volumen.losses.masking import full_mask, masked_mean
from volumen.losses.multitask import MultiTaskLoss
from volumen.losses.registry import _registered, accepted_extras, build_loss, register_loss

DISTANCE_LOSSES = [
    ("SignedDistanceLoss", {}),
    ("SignedDistanceLoss", {"eikonal": True, "eikonal_weight": 0.0}),
    ("MaskedMSELoss", {}),
    ("MSELoss", {}),
    ("SmoothL1Loss", {"beta": 0.5}),
    ("WeightedSmoothL1Loss", {}),
    ("L1Loss", {}),
    ("torch.nn.HuberLoss", {"delta": 0.5}),
    ("torch.nn.L1Loss", {}),
]


def multitask(losses, kind="distance", validity="informed", **more):
    target = {"kind": kind, "losses": losses, "validity": validity, **more}
    return MultiTaskLoss({"d": target})


def batch_between(seed=0, shape=(2, 1, 6, 8, 10)):
    random = torch.Generator().manual_seed(seed)
    lower = 4 * torch.randn(shape, generator=random)
    width = torch.rand(shape, generator=random) * 3 * (torch.rand(shape, generator=random) > 0.3)
    counts = torch.rand((shape[0], 1, *shape[2:]), generator=random) > 0.3
    batch = {
        "d": lower,
        "d_upper": lower + width,
        "d_confidence": counts.float(),
        "d_mask": counts & (width == 0).all(dim=1, keepdim=True),
    }
    return batch, random


@pytest.mark.parametrize(("name", "kwargs"), DISTANCE_LOSSES)
def test_a_prediction_between_the_bounds_costs_nothing_and_has_no_gradient(name, kwargs):
    batch, random = batch_between()
    share = torch.rand(batch["d"].shape, generator=random)
    pred = torch.lerp(batch["d"], batch["d_upper"], share)
    pred = torch.where(batch["d_confidence"] > 0, pred, torch.full_like(pred, float("nan"))).requires_grad_()
    total = multitask([{"name": name, "kwargs": kwargs}])({"d": pred}, batch)
    (gradient,) = torch.autograd.grad(total, pred)
    assert total.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize(("name", "kwargs"), DISTANCE_LOSSES)
def test_a_prediction_beyond_a_bound_counts_from_the_nearer_end(name, kwargs):
    batch, random = batch_between()
    side = torch.rand(batch["d"].shape, generator=random) > 0.5
    step = 2 * torch.rand(batch["d"].shape, generator=random)
    end = torch.where(side, batch["d_upper"], batch["d"])
    pred = end + torch.where(side, step, -step)
    found = multitask([{"name": name, "kwargs": kwargs}])({"d": pred}, batch)
    alone = build_loss(name, kwargs, kind="distance", spacing=(1.0,) * 3)
    assert found.item() == pytest.approx(alone(pred, end, mask=batch["d_confidence"] > 0).item(), rel=1e-5)


@pytest.mark.parametrize(("name", "kwargs"), [*DISTANCE_LOSSES, ("SignedDistanceLoss", {"eikonal": True})])
def test_where_both_ends_meet_the_loss_is_that_of_exact_values(name, kwargs):
    batch, random = batch_between()
    batch |= {"d_upper": batch["d"], "d_mask": batch["d_confidence"] > 0}
    pred = torch.randn(batch["d"].shape, generator=random).requires_grad_()
    results = []
    for validity in ("exact", "informed"):
        used = batch if validity == "informed" else {key: batch[key] for key in ("d", "d_mask")}
        total = multitask([{"name": name, "kwargs": kwargs}], validity=validity)({"d": pred}, used)
        results.append((total, torch.autograd.grad(total, pred)[0]))
    for exact, informed in zip(*results):
        torch.testing.assert_close(informed, exact, rtol=1e-5, atol=1e-8)


def test_the_eikonal_term_counts_exact_voxels_only():
    """Between bounds the target follows the prediction, whose own slope must not decide where the term applies."""
    z = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(1, 1, 12, 4, 4).clone()
    batch = {"d": z, "d_upper": z + 2, "d_confidence": torch.ones(1, 1, 12, 4, 4)}
    batch["d_mask"] = torch.zeros(1, 1, 12, 4, 4, dtype=torch.bool)
    pred = (z + 1 + 0.3 * torch.sin(z)).requires_grad_()
    total = multitask([{"name": "SignedDistanceLoss", "kwargs": {"eikonal": True, "eikonal_weight": 1.0}}])(
        {"d": pred}, batch
    )
    assert total.item() == 0.0


class PlainLoss(Loss):
    """A user's loss that knows nothing of bounds."""

    def forward(self, pred, target, mask=None):
        mask = full_mask(mask, pred)
        return masked_mean((pred - target) ** 2, mask)


def test_a_loss_that_takes_no_confidence_gets_exact_values_only_and_it_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr("volumen.losses.registry._registered", dict(_registered))
    register_loss("PlainLoss")(PlainLoss)
    batch, random = batch_between()
    pred = torch.randn(batch["d"].shape, generator=random)
    with caplog.at_level(logging.INFO):
        loss = multitask([{"name": "PlainLoss"}, {"name": "L1Loss", "weight": 0.0}])
        loss({"d": pred}, batch)
        found = loss({"d": pred}, batch)
    said = [record.getMessage() for record in caplog.records if "PlainLoss" in record.getMessage()]
    assert len(said) == 1
    assert "L1Loss" not in caplog.text
    expected = ((pred - batch["d"]) ** 2)[batch["d_mask"]].mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_losses_of_other_libraries_take_a_confidence_only_if_they_have_a_value_per_voxel():
    taking = {
        name: "confidence" in accepted_extras(build_loss(name, {}, kind=kind))
        for name, kind in [("torch.nn.HuberLoss", "distance"), ("monai.losses.DiceLoss", "binary")]
    }
    assert taking == {"torch.nn.HuberLoss": True, "monai.losses.DiceLoss": False}


@pytest.mark.parametrize(
    ("name", "kind", "channels"),
    [("CosineSimilarityLoss", "vector", 3), ("MSELoss", "axis", 3), ("L1Loss", "tensor", 6)],
)
def test_the_confidence_is_the_weight_of_a_voxel(name, kind, channels):
    random = torch.Generator().manual_seed(1)
    target = torch.randn(2, channels, 4, 5, 6, generator=random)
    target = F.normalize(target, dim=1) if kind != "tensor" else target
    pred = torch.randn(2, channels, 4, 5, 6, generator=random)
    confidence = torch.rand(2, 1, 4, 5, 6, generator=random) * (
        torch.rand(2, 1, 4, 5, 6, generator=random) > 0.4
    )
    batch = {
        "d": target,
        "d_mask": torch.zeros_like(confidence, dtype=torch.bool),
        "d_confidence": confidence,
    }
    found = multitask([{"name": name}], kind=kind)({"d": pred}, batch)
    alone = build_loss(name, {}, kind=kind)
    total = weight = 0.0
    for at in itertools.product(range(2), range(4), range(5), range(6)):
        one = (slice(at[0], at[0] + 1), slice(None), *(slice(i, i + 1) for i in at[1:]))
        value = float(confidence[one])
        total += value * float(alone(pred[one], target[one]))
        weight += value
    assert found.item() == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 8, 8), (7, 5, 9), (8, 12)])
def test_a_coarse_level_keeps_the_mean_of_the_truth_between_the_bounds(shape):
    batch, random = batch_between(shape=(1, 2, *shape))
    truth = torch.lerp(batch["d"], batch["d_upper"], torch.rand(batch["d"].shape, generator=random))
    known = Knowledge(batch["d"], torch.ones(1, 1, *shape), batch["d_upper"])
    size = tuple(-(-n // 2) for n in shape)
    coarse = known.at(size, "distance", "linear")
    pool = F.avg_pool2d if len(shape) == 2 else F.avg_pool3d
    mean = pool(truth, 2, ceil_mode=True, count_include_pad=False)
    assert (coarse.confidence == 1).all()
    assert (coarse.target <= mean + 1e-6).all()
    assert (mean <= coarse.upper + 1e-6).all()
    # A block with one unknown voxel has no known mean.
    some = torch.ones(1, 1, *shape)
    some[(0, 0, *(0,) * len(shape))] = 0
    assert (
        Knowledge(batch["d"], some, batch["d_upper"]).at(size, "distance", "linear").confidence.flatten()[0]
        == 0
    )


def test_a_coarse_level_of_directions_is_the_mean_by_confidence():
    x = torch.zeros(1, 3, 2, 2, 2)
    x[:, 0] = 1.0
    x[0, :, 1, 1, 1] = torch.tensor([0.0, 1.0, 0.0])
    confidence = torch.ones(1, 1, 2, 2, 2)
    confidence[0, 0, 1, 1, 1] = 0
    coarse = Knowledge(x, confidence).at((1, 1, 1), "vector", "linear")
    torch.testing.assert_close(coarse.target.flatten(), torch.tensor([1.0, 0.0, 0.0]))
    assert coarse.confidence.item() == pytest.approx(7 / 8)
    axis = Knowledge(x, confidence).at((1, 1, 1), "axis", "linear")
    torch.testing.assert_close(axis.target.flatten().abs(), torch.tensor([1.0, 0.0, 0.0]))


def unit(*parts):
    return F.normalize(torch.tensor(parts), dim=0).view(1, -1, 1, 1, 1)


def test_a_vector_known_in_a_plane_leaves_its_part_across_free():
    target, free = unit(0.6, 0.8, 0.0), unit(0.0, 0.0, 1.0)
    for slope in (-3.0, 0.0, 0.7):
        right = F.normalize(target + slope * free, dim=1)
        torch.testing.assert_close(across(right, target, free), right)
    # A wrong direction within the plane costs the angle to the nearest vector that agrees.
    wrong = unit(0.8, -0.6, 1.0)
    found = across(wrong, target, free)
    grid = [
        F.normalize(torch.cos(a) * target + torch.sin(a) * free, dim=1)
        for a in torch.linspace(-1.57, 1.57, 4001)
    ]
    best = max(float((wrong * one).sum()) for one in grid)
    assert (
        float((wrong * found).sum()) == pytest.approx(best, abs=2e-3) or float((wrong * target).sum()) <= 1e-6
    )
    assert torch.isfinite(across(-target, target, free)).all()


def test_a_loss_of_vectors_is_zero_for_all_that_agree_and_leads_to_them():
    target, free = unit(0.6, 0.8, 0.0), unit(0.0, 0.0, 1.0)
    batch = {"d": target, "d_mask": torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool)}
    batch |= {"d_confidence": torch.ones(1, 1, 1, 1, 1), "d_free": free}
    loss = multitask([{"name": "CosineSimilarityLoss"}], kind="vector")
    agreeing = F.normalize(target + 2 * free, dim=1).requires_grad_()
    total = loss({"d": agreeing}, batch)
    assert total.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(total, agreeing)[0].abs().max() < 1e-5
    pred = nn.Parameter(unit(-0.8, 0.1, 0.5).clone())
    optimizer = torch.optim.SGD([pred], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        loss({"d": pred}, batch).backward()
        optimizer.step()
    part = pred.detach()[:, :2].flatten()
    assert float(F.cosine_similarity(part, target[:, :2].flatten(), dim=0)) > 0.999


def test_a_tensor_known_in_a_plane_keeps_all_other_parts_free():
    rng = np.random.default_rng(0)
    free = F.normalize(torch.tensor(rng.normal(size=(1, 3, 1, 1, 1)), dtype=torch.float32), dim=1)
    direction = free.flatten().flip(0).numpy()
    normal = np.cross(direction, [1.0, 0.3, 0.2])
    normal /= np.linalg.norm(normal)
    rows, columns = np.triu_indices(3)
    target = torch.tensor(np.outer(normal, normal)[rows, columns], dtype=torch.float32).view(1, 6, 1, 1, 1)
    # Every surface whose trace in the plane has this normal agrees.
    for angle in (0.0, 0.5, 1.2):
        real = np.cos(angle) * normal + np.sin(angle) * direction
        pred = torch.tensor(np.outer(real, real)[rows, columns], dtype=torch.float32).view(1, 6, 1, 1, 1)
        torch.testing.assert_close(in_plane(pred, target, free), pred, atol=1e-5, rtol=0)
    # The part in the plane of another one is that of the target, the rest is left.
    pred = torch.tensor(rng.normal(size=(1, 6, 1, 1, 1)), dtype=torch.float32)
    found = in_plane(pred, target, free).flatten().numpy()
    matrix, before = np.zeros((3, 3)), np.zeros((3, 3))
    matrix[rows, columns] = matrix[columns, rows] = found
    before[rows, columns] = before[columns, rows] = pred.flatten().numpy()
    plane = np.eye(3) - np.outer(direction, direction)
    np.testing.assert_allclose(matrix @ direction, before @ direction, atol=1e-5)
    inside = plane @ matrix @ plane
    share = np.clip((plane @ before @ plane * np.outer(normal, normal)).sum(), 0, 1)
    np.testing.assert_allclose(inside, share * np.outer(normal, normal), atol=1e-5)


def test_a_target_counts_as_present_by_its_confidence():
    batch, _ = batch_between()
    batch["d_mask"] = torch.zeros_like(batch["d_mask"])
    loss = multitask([{"name": "L1Loss"}])
    loss({"d": batch["d"] - 1}, batch)
    assert bool(loss.present["d"])
    assert float(loss.components["d"]) == pytest.approx(1, abs=1e-5)
