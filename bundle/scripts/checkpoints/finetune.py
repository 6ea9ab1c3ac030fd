"""Loads another model's weights before a training starts."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from volumen.checkpoints.file import CHECKSUM, DamagedCheckpoint, read_file, verify_checksum
from volumen.checkpoints.nnunet import WEIGHTS_KEY, is_nnunet_state, load_nnunet, safe_globals
from volumen.checkpoints.pretrained import load_encoder, pretraining_of
from volumen.checkpoints.weights import LoadReport, load_partial
from volumen.networks.placement import unwrap
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)


class Finetune:
    """Load only the weights when a new training starts; weights of other shapes are left out.

    It stands before the `Checkpointer` in the list: a resumed run takes its own weights after all. A trainer that
    runs again keeps the weights that it has. The file
    is a checkpoint of this program, a plain state_dict, or one of nnU-Net v2's residual-encoder U-Nets (its
    encoder).

    Args:
        network: the network.
        path: the file; None loads nothing.
    """

    def __init__(self, network: torch.nn.Module, path: str | os.PathLike | None = None) -> None:
        self.network = network
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.is_file():
            raise VolumenError("--finetune", "there is no such file", found=self.path)
        self._loaded = False

    def attach(self, engine: Engine) -> None:
        """Load when the trainer starts."""
        if self.path is not None:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load the weights, and log which were and which were not loaded."""
        assert self.path is not None
        if self._loaded:
            return
        self._loaded = True
        network = unwrap(self.network)
        report = load_weights(network, self.path)
        lines = encoder_lines(report) if report.is_encoder else report_lines(report)
        for line in lines:
            logger.info("%s: %s", self.path, line)


def report_lines(report: LoadReport) -> list[str]:
    """Return log lines: the loaded weights by part of the network, and the names of all that were not loaded."""
    total = len(report.loaded) + len(report.missing) + len(report.mismatched)
    parts = Counter(".".join(name.split(".")[:2]) for name in report.loaded)
    counts = ", ".join(f"{part} {count}" for part, count in parts.items())
    lines = [f"loaded {len(report.loaded)} of the network's {total} weights: {counts}"]
    for what, names in (
        (
            "of another shape, not loaded",
            [f"{name} {theirs} for {ours}" for name, ours, theirs in report.mismatched],
        ),
        ("not in the file, left as initialised", report.missing),
        ("in the file alone", report.unexpected),
    ):
        if names:
            lines.append(f"{what}: {', '.join(names)}")
    return lines


def encoder_lines(report: LoadReport) -> list[str]:
    """Return log lines about a pretrained encoder: what was taken, what not, and what is new, by part."""

    def by_part(names: Sequence[str], depth: int) -> str:
        parts = Counter(".".join(name.split(".")[:depth]) for name in names)
        return ", ".join(f"{part} {count}" for part, count in parts.items()) or "nothing"

    return [
        f"took the whole encoder, {counted(len(report.loaded), 'weight')}: {by_part(report.loaded, 2)}",
        f"not taken, since it completes images: {by_part(report.unexpected, 1)}",
        f"new, left as initialised: {by_part(report.missing, 2)}",
    ]


def load_weights(network: torch.nn.Module, path: Path) -> LoadReport:
    """Copy into a network every weight of a file whose name and shape match; of a pretraining, the whole encoder.

    Raises:
        VolumenError: the file is not a checkpoint, no weight in it matches, or a pretrained encoder is another one.
    """
    content = read_weights_file(path)
    if pretraining_of(content) is not None:
        return load_encoder(network, content, path)
    weights = content.get(WEIGHTS_KEY, content)
    if isinstance(weights, Mapping) and is_nnunet_state(weights) and hasattr(network, "targets"):
        report = load_nnunet(network, content)  # type: ignore[arg-type]
    else:
        report = load_partial(network, inference_weights(content))
    if not report.loaded:
        raise VolumenError(path, f"no weight of this file fits the network ({report.summary()})")
    return report


def inference_weights(content: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Return the weights of a checkpoint that predict best: the moving average if it exists, else the model's.

    Args:
        content: a checkpoint's content, or a state_dict itself.
    """
    averaged = content.get("handlers", {}).get("weight_average", {}).get("weights")
    for weights in (averaged, content.get("model"), content.get("state_dict")):
        if weights:
            return weights
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def read_weights_file(path: Path, *, shapes_only: bool = False) -> Mapping[str, Any]:
    """Return the content of a checkpoint of any program, without running code from it.

    Args:
        path: the file.
        shapes_only: read no values of weights; the checksum is not verified then.

    Raises:
        VolumenError: the file is damaged or no checkpoint.
    """
    where, allowed = "meta" if shapes_only else "cpu", safe_globals()
    try:
        content = read_file(path, map_location=where, mmap=shapes_only, allowed=allowed)
    except DamagedCheckpoint:
        if not shapes_only:
            raise
        content = read_file(path, map_location=where, allowed=allowed)  # files of old torch cannot be mapped
    if not isinstance(content, Mapping):
        raise VolumenError(path, expected="a checkpoint or a state_dict", found=type(content).__name__)
    if shapes_only or CHECKSUM not in content:
        return content
    return verify_checksum(content, path)
