"""Turns logits into decided labels, which the metrics of training and validation score, like `volumen evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LABEL_KINDS = ("binary", "multiclass", "multilabel")
DECISIONS = "decisions"


def decide(logits: Tensor, kind: str) -> Tensor:
    """Return the labels with the largest probability.

    Args:
        logits: (B, C, *space).
        kind: binary, multiclass or multilabel.

    Returns:
        uint8 (int16 above 256 classes) class indices (B, 1, *space) of a multiclass target; else bool (B, C, *space):
        True for probabilities of at least one half in float32, the type in which a prediction stores them.
    """
    if kind == "multiclass":
        return logits.argmax(dim=1, keepdim=True).to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    return torch.sigmoid(logits.float()) >= 0.5


class DecideLabelsd:
    """Add `decisions` to an engine's output: target to decided labels, for the labelled targets.

    It is the `postprocessing` of trainer and evaluator: MONAI calls it after each step with a dictionary that holds the
    batch and the output. Under deep supervision the finest output is used. Other targets are values and need no
    decision.

    Args:
        kinds: target to kind, as in `ConfigManager.kinds`.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = {name: kind for name, kind in kinds.items() if kind in LABEL_KINDS}

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data with `decisions`; `decide` describes the shapes."""
        return {**data, DECISIONS: self.decisions(data["pred"])}

    def decisions(self, predictions: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the decided labels of every labelled target among the predictions."""
        return {
            name: decide(_finest(predictions[name]).detach(), kind)
            for name, kind in self.kinds.items()
            if name in predictions
        }


def _finest(value: Any) -> Tensor:
    return value[0] if isinstance(value, list | tuple) else value
