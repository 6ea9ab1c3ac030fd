"""From logits to decided labels: what the metrics of training and validation count, as `volumen evaluate` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LABEL_KINDS = ("binary", "multiclass", "multilabel")
DECISIONS = "decisions"


def decide(logits: Tensor, kind: str) -> Tensor:
    """Return the labels of the largest probability.

    Args:
        logits: (B, C, *space).
        kind: binary, multiclass or multilabel.

    Returns:
        uint8 (int16 above 256 classes) class indices (B, 1, *space) of a multiclass target; else bool (B, C, *space):
        a probability in float32 from one half on, as a stored prediction holds it.
    """
    if kind == "multiclass":
        return logits.argmax(dim=1, keepdim=True).to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    return torch.sigmoid(logits.float()) >= 0.5


class DecideLabelsd:
    """Add `decisions` to an engine's output: target to decided labels, of the labelled targets.

    It is the `postprocessing` of trainer and evaluator: MONAI calls it with the batch and the output joined after each
    step. Under deep supervision the finest output counts. Other targets have values, which need no decision.

    Args:
        kinds: target to kind, as of `ConfigManager.kinds`.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = {name: kind for name, kind in kinds.items() if kind in LABEL_KINDS}

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data with `decisions`; shapes as of `decide`."""
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
