"""Losses are tested on a tiny batch before the training: mistakes are refused with their key, right ones pass."""

from __future__ import annotations

import math
import re

import pytest
import torch
from loss_cases import channels, loss_cases
from torch import nn

from volumen.losses.arguments import OLDER_KEYS
from volumen.losses.multitask import MultiTaskLoss
from volumen.losses.registry import _registered, build_loss, register_loss
from volumen.utils.errors import VolumenError


def make(name, kwargs=None, *, kind="binary", count=None, ndim=3):
    """Build the training's loss with one target and one loss, together with a source target."""
    targets = {
        "s": {"kind": "binary", "out_channels": 1, "losses": ["SoftDiceLoss"]},
        "t": {
            "kind": kind,
            "out_channels": count or channels(kind, ndim),
            "losses": [{"name": name, "kwargs": kwargs or {}}],
            "source_target": "s",
        },
    }
    return MultiTaskLoss(targets, spacing=(1.0,) * ndim)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("name", "kwargs", "kind"), loss_cases())
def test_every_loss_passes_with_every_kind_it_takes(name, kwargs, kind, ndim):
    make(name, kwargs, kind=kind, ndim=ndim)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_a_mask_of_another_library_does_not_keep_a_loss_from_getting_logits(kind):
    """MONAI's MaskedDiceLoss has a `mask` and takes probabilities by default; here it equals its DiceLoss."""
    count = channels(kind, 3)
    masked, plain = (build_loss(f"monai.losses.{name}", kind=kind) for name in ("MaskedDiceLoss", "DiceLoss"))
    pred = torch.randn(2, count, 6, 5, 7)
    target = torch.randint(0, 2, (2, 1 if kind == "multiclass" else count, 6, 5, 7))
    mask = torch.rand(2, 1, 6, 5, 7) > 0.3
    torch.testing.assert_close(masked(pred, target, mask=mask), plain(pred, target, mask=mask))
    make("monai.losses.MaskedDiceLoss", kind=kind)


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "message"),
    [
        ("torch.nn.BCELoss", {}, "binary", "BCELoss fails on a prediction of shape"),
        ("torch.nn.MSELoss", {}, "binary", "does not read the logits of the network: it costs"),
        ("torch.nn.SoftMarginLoss", {}, "multiclass", "does not read the logits"),
        ("AsymmetricUnifiedFocalLoss", {}, "binary", "has no gradient where the prediction is wrong"),
        ("torch.nn.NLLLoss", {}, "multiclass", "a loss of log-probabilities"),
        ("torch.nn.KLDivLoss", {}, "binary", "a loss of log-probabilities"),
        ("torch.nn.MultiMarginLoss", {}, "multiclass", "MultiMarginLoss fails on a prediction of shape"),
        ("monai.losses.DiceLoss", {}, "distance", "a loss of labels"),
        ("monai.losses.SSIMLoss", {"spatial_dims": 2}, "distance", "SSIMLoss fails on a prediction of shape"),
        ("monai.losses.ContrastiveLoss", {}, "field", "ContrastiveLoss fails on a prediction of shape"),
        ("monai.losses.FocalLoss", {"alpha": [0.2, 0.8]}, "binary", "FocalLoss fails on a prediction"),
    ],
)
def test_losses_that_cannot_work_are_refused_with_their_key(name, kwargs, kind, message):
    with pytest.raises(VolumenError, match=re.escape(message)) as error:
        make(name, kwargs, kind=kind)
    assert str(error.value).startswith("targets.t.losses[0]: ")
    assert str(error.value).count("targets.t") == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "message"),
    [
        (
            "CrossEntropyLoss",
            {"weight": [1.0, 2.0]},
            "multiclass",
            "weight: expected 3 numbers, one for each",
        ),
        ("CrossEntropyLoss", {"weight": [2.0]}, "multiclass", "weight: expected 3 numbers"),
        ("CrossEntropyLoss", {"weight": [1, -1, 1]}, "multiclass", "a negative weight would reward mistakes"),
        ("CrossEntropyLoss", {"weight": [0, 0, 0]}, "multiclass", "one of them above 0"),
        ("CrossEntropyLoss", {"weight": [1, math.nan, 1]}, "multiclass", "expected finite numbers"),
        ("CrossEntropyLoss", {"weight": 2.0}, "multiclass", "weight: expected a list of numbers or null"),
        ("torch.nn.CrossEntropyLoss", {"weight": [1.0, 2.0]}, "multiclass", "weight: expected 3 numbers"),
        ("torch.nn.CrossEntropyLoss", {"weight": [1, 1, -2]}, "multiclass", "would reward mistakes"),
        ("monai.losses.DiceLoss", {"weight": [1.0, 2.0]}, "multiclass", "weight: expected 3 numbers"),
        (
            "monai.losses.DiceLoss",
            {"weight": [1, 1, 1], "include_background": False},
            "multiclass",
            "weight: expected 2 numbers",
        ),
        (
            "BCEWithLogitsLoss",
            {"pos_weight": [1.0, 2.0, 3.0]},
            "multilabel",
            "pos_weight: expected 2 numbers",
        ),
        ("BCEWithLogitsLoss", {"pos_weight": -3.0}, "binary", "pos_weight: expected finite numbers"),
        ("WeightedSmoothL1Loss", {"channel_weights": [1.0] * 3}, "field", "channel_weights: expected 2"),
        ("EigenvalueLoss", {"weights": [1.0, -1.0, 1.0]}, "tensor", "weights: expected finite numbers"),
        (
            "FocalLoss",
            {"alpha": [0.25, 0.75]},
            "binary",
            "alpha: expected a number or null, found [0.25, 0.75]",
        ),
        ("FocalLoss", {"gamma": "two"}, "binary", "gamma: expected a number, found 'two'"),
        ("SoftDiceLoss", {"batch": "often"}, "binary", "batch: expected true or false, found 'often'"),
        ("SoftDiceLoss", {"smooth": True}, "binary", "smooth: expected a number, found True"),
        ("SoftClDiceLoss", {"iterations": 2.5}, "binary", "iterations: expected a whole number, found 2.5"),
    ],
)
def test_arguments_of_the_wrong_number_sign_or_type_are_refused_with_their_key(name, kwargs, kind, message):
    with pytest.raises(VolumenError, match=re.escape(message)) as error:
        make(name, kwargs, kind=kind)
    assert str(error.value).startswith("targets.t.losses[0].kwargs.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_class_of_weight_0_does_not_count(smoothing):
    weight = [0.0, 1.0, 2.5]
    loss = build_loss("CrossEntropyLoss", {"weight": weight, "label_smoothing": smoothing}, kind="multiclass")
    pred = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 1, 4, 5, 6))
    value = loss(pred, target)
    torch_loss = nn.CrossEntropyLoss(torch.tensor(weight, dtype=torch.float64), label_smoothing=smoothing)
    torch.testing.assert_close(value, torch_loss(pred, target[:, 0]), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(value, pred)
    assert torch.isfinite(gradient).all()


def test_weights_of_the_right_number_pass_and_numbers_as_text_are_read():
    make("CrossEntropyLoss", {"weight": [0, 1, 2.5]}, kind="multiclass")
    make("monai.losses.DiceLoss", {"weight": [1, 2], "include_background": False}, kind="multiclass")
    make("BCEWithLogitsLoss", {"pos_weight": [2.0]}, kind="multilabel")
    # YAML reads 1e-4 as text.
    assert build_loss("SoftDiceLoss", {"smooth": "1e-4"}, kind="binary").smooth == 1e-4


@pytest.fixture
def mine():
    known = dict(_registered)
    yield register_loss("MineLoss")
    _registered.clear()
    _registered.update(known)


def squared(pred, target):
    return ((pred - target.to(pred.dtype)) ** 2).flatten(1)


def test_a_registered_loss_with_a_mask_of_another_meaning_is_refused(mine):
    @mine
    class MineLoss(nn.Module):
        def forward(self, pred, target, mask=None):
            return ((pred - target) ** 2)[mask.expand_as(pred) == 0].mean()  # True: ignored

    with pytest.raises(
        VolumenError, match=r"targets.t.losses\[0\]: MineLoss counts voxels that its `mask` leaves"
    ):
        make("MineLoss", kind="distance")


def test_a_registered_loss_with_a_mask_must_give_one_number(mine):
    @mine
    class MineLoss(nn.Module):
        def forward(self, pred, target, mask):
            return (squared(pred, target) * mask.flatten(1)).mean(dim=1)

    with pytest.raises(
        VolumenError, match=r"MineLoss gives no single number, expected .* found shape \(2,\)"
    ):
        make("MineLoss", kind="distance")


def test_a_registered_loss_without_a_mask_may_give_a_value_per_sample(mine):
    @mine
    class MineLoss(nn.Module):
        def forward(self, pred, target):
            return squared(pred, target).mean(dim=1)

    loss = make("MineLoss", kind="distance").losses[1]
    pred, target = torch.randn(3, 1, 4, 5, 6), torch.randn(3, 1, 4, 5, 6)
    mask = torch.ones(3, 1, 4, 5, 6, dtype=torch.bool)
    mask[1] = False
    expected = squared(pred, target).mean(dim=1)[[0, 2]].mean()
    torch.testing.assert_close(loss(pred, target, mask=mask), expected)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda pred: (pred - pred.detach()).sum() / 0, "MineLoss has a value that is not finite"),
        (lambda pred: pred.detach().mean(), "MineLoss has no gradient"),
        (lambda pred: (pred * 0).abs().sqrt().sum(), "MineLoss has a gradient that is not finite"),
        (lambda pred: 3.0, "MineLoss gives no single number"),
        (lambda pred: {}["x"], "MineLoss fails on a prediction of shape (2, 1, 11, 13, 17): 'x'"),
    ],
)
def test_a_registered_loss_that_cannot_be_trained_on_is_refused(mine, result, message):
    @mine
    class MineLoss(nn.Module):
        def forward(self, pred, target, mask):
            return result(pred)

    with pytest.raises(VolumenError, match=re.escape(message)):
        make("MineLoss", kind="distance")


def test_the_trial_leaves_the_random_state_and_the_loss_as_they_were(mine):
    @mine
    class MineLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, pred, target, mask):
            self.calls += 1
            torch.rand(1)
            return ((pred - target) ** 2)[mask].mean()

    before = torch.random.get_rng_state()
    loss = make("MineLoss", kind="distance")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loss.losses[1].calls == 0


def test_a_level_that_is_too_small_is_named_in_the_training():
    loss = make("monai.losses.SSIMLoss", {"spatial_dims": 3}, kind="distance")
    small = torch.rand(1, 1, 4, 4, 4, requires_grad=True)
    outputs = {"s": torch.zeros(1, 1, 4, 4, 4), "t": small}
    with pytest.raises(VolumenError, match=r"losses\[0\]: SSIMLoss fails .*; .* skip_deep_supervision: true"):
        loss(outputs, {"s": torch.zeros(1, 1, 4, 4, 4), "t": torch.rand(1, 1, 4, 4, 4)})


@pytest.mark.parametrize("key", OLDER_KEYS)
def test_keys_of_older_weighted_losses_are_refused_with_what_to_do(key):
    with pytest.raises(VolumenError, match=re.escape(OLDER_KEYS[key])) as error:
        make("WeightedSmoothL1Loss", {key: 1}, kind="distance")
    assert "targets.t.losses[0].kwargs" in str(error.value)
