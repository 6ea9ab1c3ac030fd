"""A threshold means "from this probability on" wherever a probability becomes a label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volumen.data.formats.volumes import ArrayVolume
from volumen.evaluation.cases import ScoredCase
from volumen.evaluation.html.pictures.views import classes
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import score
from volumen.inference.output.stored import OutputSpec
from volumen.inference.windows.heads import Head
from volumen.metrics.target_metrics import build_metrics
from volumen.transforms.decide import decide

LEVELS = np.arange(256, dtype=np.uint8)


def _case(stored: np.ndarray, truth: np.ndarray, scale: float) -> ScoredCase:
    whole = tuple(slice(0, n) for n in truth.shape)
    return ScoredCase(
        "case", "ink", "binary", ArrayVolume(stored), ArrayVolume(truth), None, whole, 1, scale,
    )  # fmt: skip


@pytest.mark.parametrize("level", [1, 51, 127, 128, 200, 254, 255])
def test_every_stored_level_at_its_own_threshold_is_foreground(level):
    # 51 / 255 is 0.2: the probability itself must count, in the scores, in the report and in the labels written.
    threshold = level / 255
    stored = np.broadcast_to(LEVELS, (4, 256)).copy()
    truth = (stored >= level).astype(np.uint8)
    case = _case(stored, truth, 255.0)
    scores = score([case], EvaluateRequest("", "", "", threshold=threshold, metrics=("dice",)))
    assert scores.mean["ink/dice"] == 1.0
    values, _, _ = case.read(tuple(slice(0, n) for n in stored.shape))
    np.testing.assert_array_equal(classes(values, case, threshold), truth)
    written = OutputSpec(Head("ink", 1), "labels", threshold).convert(values)
    np.testing.assert_array_equal(written[0], truth)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_predicted_labels_and_their_probabilities_score_alike(threshold, kind):
    rng = np.random.default_rng(0)
    channels = 1 if kind == "binary" else 2
    probability = rng.choice(np.float32([0, 0.125, 0.25, 0.5, 0.75, 1]), size=(1, channels, 9, 9))
    truth = rng.integers(0, 2, probability.shape).astype(np.uint8)
    labels = OutputSpec(Head("ink", channels, "sigmoid", kind), "labels", threshold).convert(probability[0])[
        None
    ]
    values = []
    for found in (probability, labels):
        metrics = build_metrics({"ink": {"kind": kind, "out_channels": channels}}, threshold=threshold)
        metrics.update({"ink": found}, {"ink": truth})
        found_values = metrics.compute()
        # Labels have no probabilities to score.
        ours = {"ece", "average_precision", "best_threshold"}
        values.append({key: value for key, value in found_values.items() if key.split("/")[-1] not in ours})
        values[-1] = {key: value for key, value in values[-1].items() if not ours & set(key.split("/"))}
    assert values[0] == values[1]
    assert "ink/dice" in values[0]


def test_validation_decides_as_the_prediction_writes():
    logits = torch.tensor([-1.0, -1e-3, -0.0, 0.0, 1e-3, 1.0]).reshape(1, 1, 6)
    written = OutputSpec(Head("ink", 1), "labels").convert(torch.sigmoid(logits[0]).numpy())
    np.testing.assert_array_equal(decide(logits, "binary")[0].numpy(), written)
