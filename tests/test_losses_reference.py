"""Values compared with MONAI's and torch's own losses on unmasked input, and with numbers computed by hand."""

from __future__ import annotations

import math

import monai.losses as theirs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import Case, channels, make_target

from volumen.losses.boundary import surface_distance
from volumen.losses.cross_entropy import BCEWithLogitsLoss, CrossEntropyLoss, FocalLoss
from volumen.losses.dice import DiceCELoss, SoftDiceLoss, TverskyLoss
from volumen.losses.distance import SignedDistanceLoss
from volumen.losses.regression import MaskedMSELoss, MSELoss, SmoothL1Loss, WeightedSmoothL1Loss
from volumen.losses.tensors import EigenvalueLoss, PlanarityLoss
from volumen.losses.topology import SkeletonRecallLoss, SoftClDiceLoss, soft_skeleton
from volumen.losses.vectors import (
    CosineSimilarityLoss,
    NormalGatedRepulsionLoss,
    NormalSmoothnessLoss,
    gaussian_sum,
    sample_at,
)

SHAPE = (2, 9, 8, 7)


def _data(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(SHAPE[0], channels(kind, 3), *SHAPE[1:], generator=generator)
    return pred, make_target(kind, SHAPE, generator)


def _activation(kind: str) -> dict[str, bool]:
    return {"softmax": True, "to_onehot_y": True} if kind == "multiclass" else {"sigmoid": True}


LABELS = pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])


@LABELS
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_dice_is_monai_s(kind, background, batch, squared):
    pred, target = _data(kind)
    expected = theirs.DiceLoss(
        include_background=background or kind == "binary",
        batch=batch,
        squared_pred=squared,
        **_activation(kind),
    )(pred, target.float())
    found = SoftDiceLoss(include_background=background, batch=batch, squared=squared, kind=kind)(pred, target)
    torch.testing.assert_close(found, expected)


def test_dice_leaves_out_the_background_of_classes_by_default():
    pred, target = _data("multiclass")
    expected = theirs.DiceLoss(include_background=False, softmax=True, to_onehot_y=True)(pred, target)
    torch.testing.assert_close(SoftDiceLoss(kind="multiclass")(pred, target), expected)


@LABELS
def test_tversky_is_monai_s(kind):
    pred, target = _data(kind)
    expected = theirs.TverskyLoss(alpha=0.3, beta=0.7, **_activation(kind))(pred, target)
    torch.testing.assert_close(TverskyLoss(include_background=True, kind=kind)(pred, target), expected)


@LABELS
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_is_monai_s(kind, alpha):
    pred, target = _data(kind)
    softmax = kind == "multiclass"
    reference = theirs.FocalLoss(gamma=2.0, alpha=alpha, use_softmax=softmax, to_onehot_y=softmax)
    expected = reference(pred, target)
    if softmax:
        # MONAI also divides by the number of classes, of which all but the true one contribute 0.
        expected = expected * pred.shape[1]
    torch.testing.assert_close(FocalLoss(alpha=alpha, kind=kind)(pred, target), expected)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_dice_and_cross_entropy_is_nnunet_s_pair(kind):
    pred, target = _data(kind)
    softmax = kind == "multiclass"
    expected = theirs.DiceCELoss(include_background=not softmax, lambda_ce=0.5, **_activation(kind))(
        pred, target.float()
    )
    torch.testing.assert_close(DiceCELoss(weight_ce=0.5, kind=kind)(pred, target), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5]])
def test_cross_entropy_is_torch_s_over_valid_voxels(weight, smoothing):
    pred, target = _data("multiclass")
    mask = torch.rand(SHAPE[0], 1, *SHAPE[1:], generator=torch.Generator().manual_seed(1)) > 0.3
    hidden = torch.where(mask, target.long(), -100)[:, 0]
    reference = torch.nn.CrossEntropyLoss(
        None if weight is None else torch.tensor(weight), label_smoothing=smoothing, ignore_index=-100
    )
    found = CrossEntropyLoss(weight, smoothing)(pred, target, mask)
    torch.testing.assert_close(found, reference(pred, hidden))


def test_binary_cross_entropy_is_torch_s_and_makes_classes_one_hot():
    pred, target = _data("multiclass")
    one_hot = F.one_hot(target[:, 0].long(), 3).movedim(-1, 1).float()
    weight = torch.tensor([2.0, 1.0, 3.0])
    expected = F.binary_cross_entropy_with_logits(pred, one_hot, pos_weight=weight.view(3, 1, 1, 1))
    torch.testing.assert_close(BCEWithLogitsLoss(weight.tolist(), kind="multiclass")(pred, target), expected)
    expected = F.binary_cross_entropy_with_logits(pred, torch.where(one_hot > 0, 0.85, 0.15))
    found = BCEWithLogitsLoss(label_smoothing=0.3, kind="multiclass")(pred, target)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_cldice_is_monai_s(dims):
    shape = (1, 17, 15) if dims == 2 else (1, 17, 15, 13)
    generator = torch.Generator().manual_seed(2)
    pred = torch.randn(1, 1, *shape[1:], generator=generator)
    target = make_target("binary", shape, generator).float()
    reference = theirs.SoftclDiceLoss(iter_=3, smooth_nr=1.0, smooth_dr=1.0, smooth=1e-9, sigmoid=True)
    expected = reference(pred, target)
    torch.testing.assert_close(SoftClDiceLoss(iterations=3)(pred, target), expected)


def test_element_wise_losses_take_the_better_sign_of_an_axis_per_voxel():
    generator = torch.Generator().manual_seed(0)
    target = make_target("axis", SHAPE, generator)
    sign = torch.where(torch.rand(2, 1, *SHAPE[1:], generator=generator) < 0.5, -1.0, 1.0)
    for name in (
        "MSELoss",
        "L1Loss",
        "SmoothL1Loss",
        "MaskedMSELoss",
        "CosineSimilarityLoss",
        "torch.nn.HuberLoss",
    ):
        case = Case(name, {}, "axis", dtype=torch.float32)
        assert case.loss(sign * target, target) == pytest.approx(0, abs=1e-6), name
        off = case.loss(0.5 * target, target)
        torch.testing.assert_close(case.loss(0.5 * sign * target, target), off)
    assert MSELoss(kind="vector")(sign * target, target) > 0.5


def test_masked_mse_leaves_out_its_ignore_index():
    pred, target = _data("tensor")
    target[0, :, :4] = -100
    # One channel is enough, also with NaN.
    target[1, 0, :3], target[1, 5, 5:7] = -100, torch.nan
    kept = (target > -99).all(dim=1, keepdim=True).expand_as(target)
    expected = ((pred - target) ** 2)[kept].mean()
    torch.testing.assert_close(MaskedMSELoss(ignore_index=-100)(pred, target), expected)


def test_weighted_smooth_l1():
    pred, target = _data("distance")
    target = target.clamp_min(0)
    weight = torch.where(target != 0, 3.0, 1.0)
    expected = (weight * F.smooth_l1_loss(pred, target, reduction="none")).sum() / weight.sum()
    torch.testing.assert_close(WeightedSmoothL1Loss(nonzero_weight=3.0)(pred, target), expected)


@pytest.mark.parametrize("beta", [0.0, 0.4, 2.0])
def test_smooth_l1_is_torch_s_and_channels_have_weights(beta):
    pred, target = _data("tensor")
    each = F.smooth_l1_loss(pred, target, beta=beta, reduction="none")
    torch.testing.assert_close(SmoothL1Loss(beta, kind="tensor")(pred, target), each.mean())
    channel = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = (each.mean((0, 2, 3, 4)) * channel).sum() / 21
    found = WeightedSmoothL1Loss(beta, channel_weights=channel.tolist(), kind="tensor")(pred, target)
    torch.testing.assert_close(found, expected)


def test_signed_distance_weighs_the_band_and_ends_at_zero():
    _, target = _data("distance")
    loss = SignedDistanceLoss(rho=2.0, beta=1.0, far_weight=0.1)
    assert loss(target, target) == 0
    near, far = target.abs() < 0.5, target.abs() > 2
    assert loss(target + 0.1 * near, target) / near.sum() > 5 * loss(target + 0.1 * far, target) / far.sum()
    weights = 0.1 + 0.9 * (1 - target.abs() / 2).clamp_min(0)
    expected = (weights * F.smooth_l1_loss(target * 0 + 1, target, reduction="none")).sum() / weights.sum()
    torch.testing.assert_close(loss(target * 0 + 1, target), expected)


def _plane(spacing: tuple[float, ...], reach: float) -> torch.Tensor:
    """Return the distance to a tilted plane, in physical units, cut at its reach."""
    normal = torch.tensor([2.0, 1.0, 2.0]) / 3
    axes = torch.meshgrid(*[torch.arange(12.0) * s for s in spacing], indexing="ij")
    return sum(n * (a - 6 * s) for n, a, s in zip(normal, axes, spacing)).clamp(-reach, reach)[None, None]


def test_eikonal_is_zero_for_a_true_distance_and_right_for_a_scaled_one():
    spacing = (2.0, 1.0, 1.0)
    plane = _plane(spacing, reach=100.0)
    loss = SignedDistanceLoss(beta=1.0, eikonal=True, eikonal_weight=1.0, spacing=spacing)
    bare = SignedDistanceLoss(beta=1.0)
    assert loss(plane, plane) < 1e-10
    torch.testing.assert_close(loss(1.5 * plane, plane) - bare(1.5 * plane, plane), torch.tensor(0.25))
    # Beyond its reach the target is flat and no slope is required; only the kink itself has a small effect.
    cut = _plane(spacing, reach=3.0)
    assert (cut.abs() == 3).float().mean() > 0.5
    assert loss(cut, cut) < 0.01


def test_eikonal_knows_the_voxel_size_of_a_coarser_level():
    plane = _plane((1.0, 1.0, 1.0), reach=100.0)[..., ::2, ::2, ::2]
    loss = SignedDistanceLoss(eikonal=True, eikonal_weight=1.0)
    assert loss(plane, plane, scale=(2.0, 2.0, 2.0)) < 1e-10
    assert loss(2 * plane, plane) > 1


def test_eikonal_of_a_flat_prediction_has_a_finite_gradient():
    plane = _plane((1.0, 1.0, 1.0), reach=100.0)
    flat = torch.zeros_like(plane, requires_grad=True)
    SignedDistanceLoss(eikonal=True, eikonal_weight=1.0)(flat, plane).backward()
    assert torch.isfinite(flat.grad).all()


def test_cosine_is_torch_s():
    pred, target = _data("vector")
    cosine = F.cosine_similarity(pred, target, dim=1)
    torch.testing.assert_close(CosineSimilarityLoss(kind="vector")(pred, target), (1 - cosine).mean())
    torch.testing.assert_close(CosineSimilarityLoss(kind="axis")(pred, target), (1 - cosine.abs()).mean())


def test_two_vectors_per_voxel_count_separately():
    first, second = _data("axis", 0), _data("axis", 1)
    both = [torch.cat(pair, dim=1) for pair in zip(first, second)]
    for loss in (CosineSimilarityLoss(kind="axis"), MSELoss(kind="axis"), NormalSmoothnessLoss(kind="axis")):
        expected = (loss(*first) + loss(*second)) / 2
        torch.testing.assert_close(loss(*both), expected)


def test_gaussian_sum_is_scipy_s():
    from scipy.ndimage import correlate1d

    x = np.random.default_rng(0).normal(size=(9, 8, 7))
    sigma, radius = 1.3, 4
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    expected = x
    for axis in range(3):
        expected = correlate1d(expected, kernel, axis=axis, mode="constant")
    found = gaussian_sum(torch.from_numpy(x)[None, None], (sigma,) * 3)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_normal_smoothness_prefers_agreement_and_reads_the_gate():
    generator = torch.Generator().manual_seed(0)
    rough = make_target("vector", SHAPE, generator)
    flat = torch.zeros_like(rough)
    flat[:, 0] = 3.0
    loss = NormalSmoothnessLoss(sigma=1.5, q=2.0)
    assert loss(flat) < 1e-10
    assert loss(rough) > 0.5
    # The field is rough only where the source predicts background, so the gate closes there.
    half = torch.where(torch.arange(9).view(1, 1, 9, 1, 1) < 4, rough, flat)
    gate = torch.where(torch.arange(9).view(1, 1, 9, 1, 1) < 4, -30.0, 30.0).expand(2, 1, *SHAPE[1:])
    assert loss(half, source_pred=gate) < 1e-6 < loss(half)
    # A sign without meaning does not make an axis rough.
    flipped = flat * torch.where(torch.rand(2, 1, *SHAPE[1:], generator=generator) < 0.5, -1.0, 1.0)
    assert NormalSmoothnessLoss(kind="axis")(flipped) < 1e-10 < 0.5 < loss(flipped)


@pytest.mark.parametrize("kind", ["vector", "axis"])
def test_normal_smoothness_is_half_the_mean_squared_difference_to_the_neighbours(kind):
    """Without sign, 1 less the mean squared cosine."""
    generator = torch.Generator().manual_seed(0)
    field = F.normalize(torch.randn(1, 2, 6, 5, generator=generator, dtype=torch.float64), dim=1)
    gate = torch.randn(1, 1, 6, 5, generator=generator, dtype=torch.float64)
    points = [(y, x) for y in range(6) for x in range(5)]
    weight = gate.sigmoid()[0, 0]
    numerator = denominator = 0.0
    for a in points:
        near = [b for b in points if max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 3]
        g = [math.exp(-0.5 * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)) * weight[b].item() for b in near]
        here, there = field[0][:, a[0], a[1]], [field[0][:, b[0], b[1]] for b in near]
        if kind == "vector":
            apart = [0.5 * ((here - other) ** 2).sum().item() for other in there]
        else:
            apart = [1 - (here @ other).item() ** 2 for other in there]
        mean = sum(w * d for w, d in zip(g, apart)) / sum(g)
        numerator += weight[a].item() * mean**2
        denominator += weight[a].item()
    found = NormalSmoothnessLoss(sigma=1.0, q=2.0, kind=kind)(field, source_pred=gate)
    assert found.item() == pytest.approx(numerator / denominator, rel=1e-9)


@pytest.mark.parametrize(("name", "kind"), [("NormalSmoothnessLoss", "vector"), ("PlanarityLoss", "binary")])
def test_a_neighbourhood_keeps_its_width_at_a_coarser_level(name, kind):
    wide, narrow = (Case(name, {"sigma": sigma}, kind) for sigma in (3.0, 1.5))
    found = wide.loss(wide.pred, mask=wide.mask, scale=(2.0, 2.0, 2.0))
    torch.testing.assert_close(found, narrow.loss(wide.pred, mask=wide.mask))
    assert not torch.isclose(found, wide.loss(wide.pred, mask=wide.mask))


@pytest.mark.parametrize("name", ["NormalSmoothnessLoss", "NormalGatedRepulsionLoss"])
def test_where_the_source_is_unknown_nothing_counts(name):
    case = Case(name, {}, "vector")
    known = torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    found = case.loss(case.pred, case.target, case.mask, case.source, source_mask=known)
    torch.testing.assert_close(found, case.loss(case.pred, case.target, case.mask & known, case.source))
    assert found != case.value()


def test_sample_at_moves_in_vector_order():
    x = torch.arange(2 * 3 * 4.0).view(1, 1, 2, 3, 4)
    offset = torch.zeros(1, 3, 2, 3, 4)
    offset[:, 0] = 1.0
    torch.testing.assert_close(sample_at(x, offset)[..., :-1], x[..., 1:])
    offset[:, 0], offset[:, 1] = 0.0, -1.0
    torch.testing.assert_close(sample_at(x, offset)[..., 1:, :], x[..., :-1, :])


def _two_sheets(gap: int, thick: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of two parallel sheets in x and their outward normals, (x, y) channels."""
    inside = torch.zeros(20)
    start = 4
    inside[start : start + thick] = 1
    inside[start + thick + gap : start + 2 * thick + gap] = 1
    from scipy.ndimage import distance_transform_edt as distance

    signed = torch.from_numpy(distance(inside == 0) - distance(inside == 1)).float()
    slope = torch.gradient(signed)[0]
    normals = torch.zeros(1, 2, 5, 20)
    normals[0, 0] = torch.where(slope == 0, 0.0, slope.sign())
    return (inside * 20 - 10).view(1, 1, 1, 20).expand(1, 1, 5, 20).clone(), normals


def test_repulsion_acts_across_a_gap_and_not_within_a_sheet():
    for gap, repelled in ((2, True), (6, False)):
        logits, normals = _two_sheets(gap)
        logits.requires_grad_()
        value = NormalGatedRepulsionLoss(max_distance=3)(normals, normals, source_pred=logits)
        value.backward()
        assert (value > 0.01) == repelled
        # Descent lowers the probability of faces at the gap, and never raises any probability.
        assert logits.grad.min() >= 0


def test_eigenvalue_loss_sees_values_and_not_directions():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 4, 6, 3, 3, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.mT
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    rows, columns = torch.triu_indices(3, 3)

    def channels_first(m):
        return m[..., rows, columns].movedim(-1, 0)[None]

    turned = turn @ matrix @ turn.T
    loss = EigenvalueLoss()
    assert loss(channels_first(turned), channels_first(matrix)) < 1e-20
    value = loss(channels_first(2 * turned), channels_first(matrix))
    expected = torch.linalg.eigvalsh(matrix).pow(2).mean()
    torch.testing.assert_close(value, expected)


def _tensors(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random symmetric matrices (5, 4, 6, 3, 3) and the same with channels first."""
    matrix = torch.randn(5, 4, 6, 3, 3, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.mT
    rows, columns = torch.triu_indices(3, 3)
    return matrix, matrix[..., rows, columns].movedim(-1, 0)[None]


@pytest.mark.parametrize("power", [1, 2])
def test_eigenvalues_have_weights_from_the_smallest(power):
    generator = torch.Generator().manual_seed(0)
    (one, first), (other, second) = _tensors(generator), _tensors(generator)
    gap = (torch.linalg.eigvalsh(one) - torch.linalg.eigvalsh(other)).abs() ** power
    expected = (gap * torch.tensor([1.0, 2.0, 5.0]) / 8).sum(-1).mean()
    torch.testing.assert_close(EigenvalueLoss(power, weights=[1.0, 2.0, 5.0])(first, second), expected)


def test_planarity_is_westin_s_weighted_by_the_source():
    generator = torch.Generator().manual_seed(0)
    matrix, tensor = _tensors(generator)
    source = torch.randn(1, 3, 5, 4, 6, generator=generator, dtype=torch.float64)
    _, second, largest = torch.linalg.eigvalsh(matrix).unbind(-1)
    cost = 1 - (largest - second) / (largest + 0.5)
    for kind, gate in (
        ("multiclass", 1 - source.softmax(1)[0, 0]),
        ("multilabel", source.sigmoid().amax(1)[0]),
        ("binary", source.sigmoid().amax(1)[0]),
    ):
        loss = PlanarityLoss(eps=0.5, kind="tensor", source_kind=kind)
        torch.testing.assert_close(loss(tensor, source_pred=source), (gate * cost).sum() / gate.sum())


def test_planarity_stays_between_0_and_1_whatever_tensor_is_predicted():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pred = torch.randn(1, 6, 2, 2, 2, generator=generator) * 3
        assert 0 <= PlanarityLoss(kind="tensor")(pred) <= 1


def test_eigenvalue_gradient_is_finite_where_eigenvalues_coincide():
    ball = torch.zeros(1, 6, 3, 3, 3)
    ball[:, [0, 3, 5]] = 1.0
    for pred in (ball.clone(), torch.zeros_like(ball)):
        pred.requires_grad_()
        EigenvalueLoss()(pred, 0.5 * ball + 0.1).backward()
        assert torch.isfinite(pred.grad).all()


def test_planarity_orders_sheet_tube_and_ball():
    z, y, x = torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing="ij")
    sheet, tube, ball = z.abs(), (z**2 + y**2).sqrt(), (z**2 + y**2 + x**2).sqrt()
    values = [PlanarityLoss(kind="binary")((4 * (5 - d))[None, None]).item() for d in (sheet, tube, ball)]
    assert values[0] < 0.1 < values[1] < values[2]
    flat = torch.zeros(1, 6, 3, 3, 3)
    flat[:, 0] = 1.0
    assert PlanarityLoss(kind="tensor")(flat) < 2e-3


def test_skeleton_of_a_sheet_is_its_middle_and_recall_reads_it():
    label = torch.zeros(1, 1, 16, 12, 12)
    label[:, :, 5:10] = 1
    known = torch.ones_like(label, dtype=torch.bool)
    skeleton = soft_skeleton(label, known, 5)
    assert torch.equal(skeleton.amax((0, 1, 3, 4)).nonzero().flatten(), torch.tensor([7]))
    loss = SkeletonRecallLoss(iterations=5, radius=0, smooth=1e-5)
    middle = torch.full_like(label, -20.0)
    middle[:, :, 7] = 20.0
    assert loss(middle, label) < 1e-4
    middle[:, :, 7, :6] = -20.0
    assert loss(middle, label) == pytest.approx(0.5, abs=1e-4)


def test_an_ignored_region_neither_ends_nor_thins_a_skeleton():
    label = torch.zeros(1, 1, 15, 15)
    label[:, :, 6:9] = 1
    known = torch.ones_like(label, dtype=torch.bool)
    known[..., 10:] = False
    whole = soft_skeleton(label, torch.ones_like(known), 3)
    torch.testing.assert_close(soft_skeleton(label, known, 3)[..., :10], whole[..., :10])


def test_surface_distance_is_brute_force():
    generator = np.random.default_rng(0)
    inside, known = generator.random((5, 6, 4)) < 0.4, generator.random((5, 6, 4)) < 0.7
    spacing = (2.0, 1.0, 1.5)
    found = surface_distance(inside, known, spacing, reach=3.0)
    points = np.argwhere(np.ones_like(inside))
    for p in points:
        others = points[(known & (inside != inside[tuple(p)]))[tuple(points.T)]]
        nearest = np.sqrt((((others - p) * spacing) ** 2).sum(1)).min()
        assert found[tuple(p)] == pytest.approx(min(nearest, 3.0), abs=1e-5)
    assert np.all(surface_distance(np.zeros((4, 4), bool), np.ones((4, 4), bool), (1, 1), 3.0) == 3.0)


def test_boundary_loss_has_the_gradient_of_kervadec_s():
    pred, target = _data("binary")
    case = Case("BoundaryLoss", {"reach": 4.0}, "binary", dtype=torch.float32)
    pred.requires_grad_()
    (gradient,) = torch.autograd.grad(case.loss(pred, target), pred)
    known = np.ones(SHAPE[1:], bool)
    distance = np.stack([surface_distance(t[0], known, (1, 1, 1), 4.0) for t in target.numpy() > 0])
    phi = torch.from_numpy(np.where(target[:, 0].numpy() > 0, -distance, distance))[:, None] / 4
    (expected,) = torch.autograd.grad((pred.sigmoid() * phi).mean(), pred)
    torch.testing.assert_close(gradient, expected)
    assert case.loss(target * 80.0 - 40.0, target) < 1e-6
