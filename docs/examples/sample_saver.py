"""Stores training samples: image, truth and prediction of one patch every few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from volumen.utils import distributed


class SampleSaver:
    """Write `sample_<iteration>.npz` with image, targets, masks and full-resolution predictions (logits).

    Args:
        folder: where to; made when the first file is written.
        every: steps between files.
        most: how many of the newest files stay.
    """

    def __init__(self, folder: str | Path, every: int = 100, most: int = 20) -> None:
        if every < 1 or most < 1:
            raise ValueError(f"every and most must be at least 1, got {every} and {most}")
        self.folder, self.every, self.most = Path(folder), every, most

    def attach(self, engine: Engine) -> None:
        """Save after every `every`-th step of the trainer, in the first process."""
        if distributed.is_main():
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self)

    def __call__(self, engine: Engine) -> None:
        """Save the first patch of the step's batch."""
        output, batch = engine.state.output, engine.state.batch
        arrays: dict[str, Any] = {"image": output["image"][0]}
        arrays.update({f"true/{name}": value[0] for name, value in output["label"].items()})
        arrays.update({f"pred/{name}": _finest(value)[0] for name, value in output["pred"].items()})
        arrays["volume_name"], arrays["start"] = batch["volume_name"][0], batch["start"][0]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"sample_{engine.state.iteration:08d}.npz"
        np.savez_compressed(path, **{name: _array(value) for name, value in arrays.items()})
        for old in sorted(self.folder.glob("sample_*.npz"))[: -self.most]:
            old.unlink()


def _finest(output: Any) -> torch.Tensor:
    """Under deep supervision an output is a list, full resolution first."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _array(value: Any) -> np.ndarray:
    # NumPy has no bfloat16.
    if isinstance(value, torch.Tensor):
        return (value.float() if value.is_floating_point() else value).cpu().numpy()
    return np.asarray(value)
