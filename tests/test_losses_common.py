"""The contract of every loss, tested on each one of the registry and on some of MONAI and torch."""

from __future__ import annotations

import pytest
import torch
from loss_cases import VALUE_KINDS, Case, loss_cases

from volumen.losses.registry import build_loss, loss_class, loss_names

CASES = loss_cases()
each_loss = pytest.mark.parametrize(
    ("name", "kwargs", "kind"), CASES, ids=[f"{n}-{k}-{kw}" for n, kw, k in CASES]
)
# The gate or the distance uses only the source; their own prediction has no gradient by design.
NO_GRADIENT = {"NormalGatedRepulsionLoss"}


def _gradient(case: Case, **given) -> tuple[torch.Tensor, torch.Tensor]:
    pred = given.pop("pred", case.pred).detach().clone().requires_grad_()
    value = case.value(pred=pred, **given)
    value.backward()
    return value.detach(), pred.grad


@each_loss
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (2, 6, 7)], ids=["3d", "2d"])
def test_gradient_is_right_in_float64(name, kwargs, kind, shape):
    if "FocalLoss" in name and name.startswith("monai"):
        pytest.skip("MONAI's own computes in float32")
    case = Case(name, kwargs, kind, shape=shape)
    pred = case.pred.requires_grad_()
    if name == "PlanarityLoss" and kind != "tensor":
        # Its weights follow the prediction and carry no gradient, which finite differences do not take into account.
        size = list(pred.shape)
        size[1] -= kind == "multiclass"
        case.loss.strength = lambda tensor, dims: torch.ones(size, dtype=pred.dtype)
    source = case.source.requires_grad_(name in NO_GRADIENT)
    assert torch.autograd.gradcheck(
        lambda p, s: case.value(pred=p, source=s), (pred, source), fast_mode=True, atol=1e-5, rtol=1e-3
    )


@each_loss
def test_ignored_voxels_have_zero_gradient_and_no_effect(name, kwargs, kind):
    case = Case(name, kwargs, kind)
    value, gradient = _gradient(case)
    hidden = (~case.mask).expand_as(case.pred)
    hidden_target = (~case.mask).expand_as(case.target)
    assert torch.all(gradient[hidden] == 0)
    assert name in NO_GRADIENT or torch.any(gradient[~hidden] != 0)
    for junk in (torch.nan, torch.inf, -1e30):
        pred = case.pred.masked_fill(hidden, junk)
        target = case.target.masked_fill(hidden_target, junk if kind in VALUE_KINDS else 255)
        source = case.source.masked_fill(~case.mask, junk)
        again, again_gradient = _gradient(case, pred=pred, target=target, source=source)
        assert again == value
        assert torch.equal(again_gradient, gradient)


@each_loss
def test_a_sample_without_valid_voxels_is_as_if_absent(name, kwargs, kind):
    case = Case(name, kwargs, kind, shape=(3, 5, 4, 6))
    case.mask[1] = False
    value, gradient = _gradient(case)
    keep = [0, 2]
    alone, alone_gradient = _gradient(
        case, pred=case.pred[keep], target=case.target[keep], mask=case.mask[keep], source=case.source[keep]
    )
    torch.testing.assert_close(value, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[keep], alone_gradient, rtol=1e-10, atol=1e-12)
    assert torch.all(gradient[1] == 0)


@each_loss
def test_a_batch_without_valid_voxels_is_zero_on_the_graph(name, kwargs, kind):
    case = Case(name, kwargs, kind)
    junk = torch.full_like(case.pred, torch.nan)
    value, gradient = _gradient(case, pred=junk, mask=torch.zeros_like(case.mask))
    assert value == 0
    assert torch.all(gradient == 0)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_float32_under_autocast(name, kwargs, kind, dtype):
    case = Case(name, kwargs, kind, shape=(2, 12, 12, 12), dtype=torch.float32)
    reference = case.value(pred=case.pred.to(dtype).float())
    with torch.autocast("cpu", dtype=dtype):
        value, gradient = _gradient(case, pred=case.pred.to(dtype))
    assert value.dtype == torch.float32
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(value, reference.detach(), rtol=1e-5, atol=1e-6)


@each_loss
def test_large_half_precision_logits_stay_finite(name, kwargs, kind):
    case = Case(name, kwargs, kind, dtype=torch.float32)
    for scale in (0.0, 6e4):
        value, gradient = _gradient(case, pred=(case.pred.clamp(-1, 1) * scale).half())
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("NormalSmoothnessLoss", "vector"), ("NormalSmoothnessLoss", "axis"), ("PlanarityLoss", "tensor")],
)
def test_a_gate_carries_no_gradient(name, kind):
    """Otherwise the source target would learn to vanish where the loss is high."""
    case = Case(name, {}, kind)
    source = case.source.requires_grad_()
    case.value(pred=case.pred.requires_grad_(), source=source).backward()
    assert source.grad is None
    assert case.value(source=-source) != case.value()


@each_loss
def test_no_mask_means_all_valid(name, kwargs, kind):
    case = Case(name, kwargs, kind)
    full = torch.ones_like(case.mask)
    extras = {"source_pred": case.source} if "source_pred" in case.extras else {}
    assert case.loss(case.pred, case.target, **extras) == case.value(mask=full)


OWN = [case for case in CASES if case[0] in loss_names()]
ON_DEVICE = [case for case in OWN if case[0] != "BoundaryLoss"]


@pytest.mark.parametrize(("name", "kwargs", "kind"), OWN, ids=[f"{n}-{k}-{kw}" for n, kw, k in OWN])
def test_a_valid_box_has_the_loss_of_its_crop(name, kwargs, kind):
    """An unknown voxel acts like the end of the patch: no surface, no neighbour, no end of a structure."""
    case = Case(name, kwargs, kind, shape=(2, 11, 10, 12))
    box = (..., slice(1, 9), slice(0, 8), slice(4, 12))
    mask = torch.zeros_like(case.mask)
    mask[box] = True
    value, gradient = _gradient(case, mask=mask)
    crop, crop_gradient = _gradient(
        case, pred=case.pred[box], target=case.target[box], mask=mask[box], source=case.source[box]
    )
    assert crop != 0
    torch.testing.assert_close(value, crop)
    torch.testing.assert_close(gradient[box], crop_gradient)


@pytest.mark.parametrize(
    ("name", "kwargs", "kind"), ON_DEVICE, ids=[f"{n}-{k}-{kw}" for n, kw, k in ON_DEVICE]
)
def test_runs_on_another_device_without_waiting_for_it(name, kwargs, kind):
    """The meta device holds no values: code that runs there mixes no devices and copies nothing back from a GPU."""
    case = Case(name, kwargs, kind, dtype=torch.float32)
    case.loss.to("meta")
    for field in ("pred", "target", "mask", "source"):
        setattr(case, field, getattr(case, field).to("meta"))
    pred = case.pred.requires_grad_()
    value = case.value(pred=pred)
    assert value.device.type == "meta"
    value.backward()
    assert pred.grad.shape == pred.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_loss
def test_a_gpu_gives_the_cpu_s_value_and_gradient(name, kwargs, kind):
    case = Case(name, kwargs, kind)
    value, gradient = _gradient(case)
    case.loss.cuda()
    for field in ("pred", "target", "mask", "source"):
        setattr(case, field, getattr(case, field).cuda())
    there, there_gradient = _gradient(case)
    torch.testing.assert_close(there.cpu(), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(there_gradient.cpu(), gradient, rtol=1e-5, atol=1e-8)


# These use only one part of the information, or none of the truth.
ONE_SIDED = {"NormalSmoothnessLoss", "PlanarityLoss", "NormalGatedRepulsionLoss"}


@each_loss
def test_descent_leads_towards_the_truth(name, kwargs, kind):
    case = Case(name, kwargs, kind, shape=(2, 6, 6, 6), dtype=torch.float32)
    pred = case.pred.clone().requires_grad_(name not in NO_GRADIENT)
    source = case.source.clone().requires_grad_(name in NO_GRADIENT)
    optimizer = torch.optim.Adam([source if name in NO_GRADIENT else pred], lr=0.2)
    start = case.value(pred=pred, source=source).item()
    for _ in range(60):
        optimizer.zero_grad()
        case.value(pred=pred, source=source).backward()
        optimizer.step()
    assert case.value(pred=pred, source=source).item() < (0.9 if name in ONE_SIDED else 0.6) * start


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("CrossEntropyLoss", {"weight": [1.0, 2.0]}),
        ("BCEWithLogitsLoss", {"pos_weight": [1.0, 2.0]}),
        ("WeightedSmoothL1Loss", {"channel_weights": [1.0, 2.0]}),
    ],
)
def test_weights_move_with_the_loss_and_are_no_part_of_a_checkpoint(name, kwargs):
    """Otherwise a resumed run would use the weights of its first configuration, or refuse another number of them."""
    loss = loss_class(name)(**kwargs).to("meta")
    assert [buffer.device.type for buffer in loss.buffers()] == ["meta"]
    assert not loss.state_dict()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("TverskyLoss", {"alpha": -0.1}, "alpha and beta >= 0"),
        ("TverskyLoss", {"beta": -0.1}, "alpha and beta >= 0"),
        ("TverskyLoss", {"gamma": 0.0}, "gamma > 0"),
        ("FocalLoss", {"gamma": -1.0}, "gamma >= 0"),
        ("FocalLoss", {"alpha": 1.1}, "alpha <= 1"),
        ("SignedDistanceLoss", {"rho": 0.0}, "rho > 0"),
        ("SignedDistanceLoss", {"beta": -1.0}, "beta >= 0"),
        ("SignedDistanceLoss", {"far_weight": 1.5}, "far_weight <= 1"),
        ("WeightedSmoothL1Loss", {"nonzero_weight": 0.0}, "nonzero_weight must be positive"),
        ("WeightedSmoothL1Loss", {"beta": -1.0}, "beta must not be negative"),
        ("EigenvalueLoss", {"power": 3}, "power must be 1 or 2"),
        ("PlanarityLoss", {"sigma": 0.0}, "sigma and eps must be positive"),
        ("PlanarityLoss", {"eps": 0.0}, "sigma and eps must be positive"),
        ("SoftClDiceLoss", {"iterations": -1}, "iterations must not be negative"),
        ("CosineSimilarityLoss", {"dim": 2}, "dim must be 1"),
        ("NormalSmoothnessLoss", {"sigma": 0.0}, "sigma must be positive"),
        ("NormalSmoothnessLoss", {"q": 0.5}, "q at least 1"),
        ("NormalGatedRepulsionLoss", {"min_distance": 0}, "0 < min_distance"),
        ("NormalGatedRepulsionLoss", {"min_distance": 4}, "min_distance <= max_distance"),
        ("BoundaryLoss", {"reach": 0.0}, "reach must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(name, kwargs, message):
    kind = loss_class(name).default_kind
    build_loss(name, {}, kind=kind)
    with pytest.raises(ValueError, match=message):
        loss_class(name)(**kwargs, kind=kind)


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "channels", "message"),
    [
        ("CosineSimilarityLoss", {}, "vector", 4, "multiple of 3 channels, got 4"),
        ("EigenvalueLoss", {}, "tensor", 5, "multiple of 6 channels, got 5"),
        ("EigenvalueLoss", {"weights": [1.0, 2.0]}, "tensor", 6, "have 3 eigenvalues"),
        (
            "SignedDistanceLoss",
            {"eikonal": True, "spacing": [1.0, 1.0]},
            "distance",
            1,
            "must have 3 entries",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, kwargs, kind, channels, message):
    pred = torch.randn(1, channels, 4, 4, 4)
    with pytest.raises(ValueError, match=message):
        loss_class(name)(**kwargs, kind=kind)(pred, pred)
    with pytest.raises(ValueError, match=r"target of shape \(1, 7, 4, 4, 4\) does not fit"):
        loss_class("MSELoss")(kind="field")(pred, torch.zeros(1, 7, 4, 4, 4))
    with pytest.raises(ValueError, match="mask must have shape"):
        loss_class("MSELoss")(kind="field")(pred, pred, torch.ones(1, 1, 4, 4, dtype=torch.bool))
