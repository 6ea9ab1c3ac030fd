"""Losses that are compiled for the patch's size."""

from __future__ import annotations

import pytest
import torch

from volumen.losses.multitask import MultiTaskLoss
from volumen.utils.compilation import compile_arguments

TARGETS = {
    "membrane": {"kind": "binary", "out_channels": 1, "losses": ["BCEWithLogitsLoss", "SoftDiceLoss"]},
    "tissue": {"kind": "multiclass", "out_channels": 3, "losses": ["CrossEntropyLoss"]},
    "distance": {"kind": "distance", "out_channels": 1, "losses": ["SignedDistanceLoss", "MSELoss"]},
    "normals": {"kind": "vector", "out_channels": 3, "losses": ["CosineSimilarityLoss"]},
}


def batch_and_outputs():
    torch.manual_seed(0)
    batch, outputs = {}, {}
    for name, target in TARGETS.items():
        channels = target["out_channels"]
        size = (2, 1 if target["kind"] == "multiclass" else channels, 8, 8, 8)
        labels = target["kind"] in ("binary", "multiclass")
        batch[name] = torch.randint(0, max(2, channels), size).short() if labels else torch.randn(size)
        batch[f"{name}_mask"] = torch.rand(2, 1, 8, 8, 8) > 0.2
        outputs[name] = [torch.randn(2, channels, side, side, side, requires_grad=True) for side in (8, 4)]
    return batch, outputs


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_the_plain_losses(backend):
    found = []
    for setting in (False, True):
        batch, outputs = batch_and_outputs()
        loss = MultiTaskLoss(
            TARGETS,
            spacing=(1.0,) * 3,
            compile=setting,
            compile_kwargs={"backend": backend} if setting else None,
        )
        total = loss(outputs, batch)
        total.backward()
        gradients = [level.grad for levels in outputs.values() for level in levels]
        found.append((total.detach(), gradients, {k: float(v) for k, v in loss.components.items()}))
        assert list(loss.state_dict()) == list(MultiTaskLoss(TARGETS).state_dict())
    (plain, gradients, components), (total, ours, ours_components) = found
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-6)
    assert ours_components == pytest.approx(components, rel=1e-5, abs=1e-6)
    for one, other in zip(gradients, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


def test_what_a_setting_means_to_torch():
    assert compile_arguments(True) == {"dynamic": False}
    assert compile_arguments("reduce-overhead", backend="eager") == {
        "dynamic": False,
        "mode": "reduce-overhead",
        "backend": "eager",
    }
