"""Decided labels and the training's Dice, compared with counts by NumPy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.engines.utils import engine_apply_transform

from volumen.handlers.running_dice import RunningDice, dice, label_counts
from volumen.handlers.scores import TargetScores
from volumen.transforms.decide import DecideLabelsd, decide

KINDS = {"ink": "binary", "tissue": "multiclass", "parts": "multilabel", "normals": "vector"}
CHANNELS = {"ink": 1, "tissue": 4, "parts": 2, "normals": 3}


def batch_of(seed: int, size: int = 2) -> tuple[dict, dict]:
    """Return predictions and labels of a batch of random values."""
    generator = torch.Generator().manual_seed(seed)

    def random(channels: int) -> torch.Tensor:
        return torch.randn((size, channels, 5, 6, 7), generator=generator)

    predictions = {name: random(channels) for name, channels in CHANNELS.items()}
    labels = {
        "ink": (random(1) > 0.5).to(torch.uint8),
        "tissue": random(4).argmax(1, keepdim=True).to(torch.uint8),
        "parts": (random(2) > 0).to(torch.uint8),
        "normals": random(3),
        **{f"{name}_mask": random(1) > -1 for name in CHANNELS},
    }
    return predictions, labels


def reference(batches: list[tuple[dict, dict]]) -> float:
    """Compute the definition in NumPy: voxels of all batches pooled, the mean over classes, then over targets."""
    values = []
    for name, kind in KINDS.items():
        found, true, known = [], [], []
        for predictions, labels in batches:
            if kind == "multiclass":
                classes = range(1, CHANNELS[name])
                index, label = predictions[name].numpy().argmax(1), labels[name].numpy()[:, 0]
                found.append(np.stack([index == k for k in classes], 1))
                true.append(np.stack([label == k for k in classes], 1))
            else:
                found.append(1 / (1 + np.exp(-predictions[name].numpy())) > 0.5)
                true.append(labels[name].numpy() > 0)
            known.append(labels[f"{name}_mask"].numpy())
        if kind == "vector":
            continue
        a, b, k = (np.concatenate(parts) for parts in (found, true, known))
        per_class = [
            2 * (a[:, c] & b[:, c] & k[:, 0]).sum() / ((a[:, c] & k[:, 0]).sum() + (b[:, c] & k[:, 0]).sum())
            for c in range(a.shape[1])
        ]
        values.append(np.mean(per_class))
    return float(np.mean(values))


def test_the_running_dice_is_the_pooled_one():
    batches = [batch_of(seed) for seed in range(3)]
    metric, decided = RunningDice(KINDS), DecideLabelsd(KINDS)
    for predictions, labels in batches:
        metric.update((decided.decisions(predictions), labels))
    assert metric.compute() == pytest.approx(reference(batches), abs=1e-12)


def test_it_continues_from_a_checkpoint():
    batches = [batch_of(seed) for seed in range(2)]
    decided = DecideLabelsd(KINDS)
    first, second = RunningDice(KINDS), RunningDice(KINDS)
    first.update((decided.decisions(batches[0][0]), batches[0][1]))
    second.load_state_dict(first.state_dict())
    for metric in (first, second):
        metric.update((decided.decisions(batches[1][0]), batches[1][1]))
    assert first.compute() == second.compute() == pytest.approx(reference(batches), abs=1e-12)


def test_a_class_neither_predicted_nor_true_does_not_count():
    nothing = torch.zeros((1, 1, 4, 4), dtype=torch.uint8)
    metric = RunningDice({"ink": "binary", "tissue": "multiclass"})
    assert math.isnan(metric.compute())
    metric.update(({"ink": nothing > 0}, {"ink": nothing}))
    assert math.isnan(metric.compute())
    one = nothing.clone()
    one[..., 0, 0] = 3
    metric.update(({"tissue": one}, {"tissue": one}))
    assert metric.compute() == 1.0  # classes 1 and 2 do not occur
    unknown = label_counts(one > 0, one, torch.zeros((1, 1, 4, 4), dtype=torch.bool), "binary")
    assert math.isnan(dice(unknown))


def test_the_finest_output_decides_and_logits_stay():
    logits = torch.tensor([[[[-1.0, 2.0]], [[1.0, 1.0]]]])
    data = {"pred": {"ink": [logits[:, :1], None], "tissue": logits, "normals": logits}, "image": 1}
    found = DecideLabelsd(KINDS)(data)
    assert found["pred"] is data["pred"]
    assert set(found["decisions"]) == {"ink", "tissue"}
    assert found["decisions"]["ink"].tolist() == [[[[False, True]]]]
    assert found["decisions"]["tissue"].tolist() == [[[[1, 0]]]]
    assert decide(torch.zeros(1, 300, 1, 1), "multiclass").dtype == torch.int16


def test_monai_applies_it_and_the_validation_scores_what_it_decided():
    predictions, labels = batch_of(0)
    sections = {name: {"kind": kind, "out_channels": CHANNELS[name]} for name, kind in KINDS.items()}
    scores = []
    for decided in (False, True):
        batch, output = {"volume_name": ["a", "b"]}, {"pred": predictions, "label": labels}
        if decided:
            batch, output = engine_apply_transform(batch, output, DecideLabelsd(KINDS))
            assert "decisions" in output
        metric = TargetScores(sections)
        metric.iteration_completed(SimpleNamespace(state=SimpleNamespace(output=output, batch=batch)))
        metric.compute()
        scores.append(metric.values)
    assert scores[0] == scores[1]
    assert {"ink/dice", "tissue/dice/3", "normals/angular_error", "mean_dice"} <= set(scores[0])
