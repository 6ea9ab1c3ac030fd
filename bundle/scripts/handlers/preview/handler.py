"""Draws the validation's first batch: `<model_name>_debug.gif` in 3D, `.png` in 2D."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from volumen.checkpoints.file import write_run_file
from volumen.handlers.preview.colours import key_colours
from volumen.handlers.preview.render import MAX_FRAMES, render_preview
from volumen.handlers.records.logs import TensorBoardLog
from volumen.handlers.records.run_directory import RunDirectory
from volumen.handlers.validation import FINAL
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import counted_voxels, mask_key, upper_key

logger = logging.getLogger(__name__)

MAX_BYTES = 4_000_000
MILLISECONDS = 110
MIN_FRAMES = 8
NEAREST = Image.Resampling.NEAREST


class PreviewHandler:
    """Draw one patch of the evaluator's first batch after each validation.

    The patch is the one with the most labelled foreground in that batch. The batches of validation are the same
    every epoch, so the pictures of a run show the same place. A preview that cannot be written causes a warning
    and does not end the run.

    Args:
        directory: the run's folder.
        kinds: target to kind (binary, multiclass, multilabel, distance, vector, axis, tensor, field).
        history: number of pictures of earlier validations to retain as `<model_name>_debug_<epoch>`.
        tensorboard: also receives the middle slice.
        length: unit of the batch's "spacing", for the scale bar.
    """

    def __init__(
        self,
        directory: RunDirectory,
        kinds: Mapping[str, str],
        *,
        history: int = 0,
        tensorboard: TensorBoardLog | None = None,
        length: str | None = None,
    ) -> None:
        if history < 0:
            raise ValueError(f"history must be at least 0, got {history}")
        self.directory = directory
        self.kinds = dict(kinds)
        self.history = history
        self.tensorboard = tensorboard
        self.length = length

    def attach(self, engine: Engine) -> None:
        """Draw after the evaluator's first iteration, in the first process."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Draw if this is the first batch of a validation."""
        # The last and the best epoch already have previews when they are scored again.
        if engine.state.iteration != 1 or not distributed.is_main() or getattr(engine.state, FINAL, False):
            return
        if not self.directory.path.is_dir():
            return  # without the folder no training has begun, as when another program evaluates
        frames = self.frames(engine)
        try:
            write_preview(self.directory, frames, engine.state.epoch, self.history)
        except VolumenError as error:
            logger.warning("no preview: %s", error)
        if self.tensorboard is not None:
            self.tensorboard.add_image("preview", np.asarray(frames[len(frames) // 2]))

    def frames(self, engine: Engine) -> list[Image.Image]:
        """Return the frames for the evaluator's current batch."""
        output: Any = engine.state.output
        batch = engine.state.batch
        labels, predictions = output["label"], output["pred"]
        sample = most_foreground(labels, list(self.kinds), len(output["image"]))
        names = batch.get("volume_name") if isinstance(batch, Mapping) else None
        spacing = batch.get("spacing") if isinstance(batch, Mapping) else None
        where = f"  ·  {names[sample]}" if isinstance(names, Sequence) else ""
        return render_preview(
            _array(output["image"][sample]),
            {name: _array(labels[name][sample]) for name in self.kinds if name in labels},
            {name: _array(_finest(value)[sample]) for name, value in predictions.items()},
            {
                name: _array(shown_voxels(labels, name)[sample])
                for name in self.kinds
                if mask_key(name) in labels
            },
            self.kinds,
            title=f"{self.directory.model_name}  ·  epoch {engine.state.epoch}{where}",
            spacing=[float(step[sample]) for step in spacing] if spacing is not None else None,
            unit=self.length,
        )


def write_preview(
    directory: RunDirectory, frames: Sequence[Image.Image], epoch: int, history: int = 0
) -> None:
    """Write a preview as `<model_name>_debug`, and retain some of earlier epochs as `<model_name>_debug_<epoch>`.

    Args:
        directory: the run's folder.
        frames: one for a PNG, several for a GIF.
        epoch: number of the epoch.
        history: number of numbered pictures to retain.

    Raises:
        VolumenError: the disk is full or cannot be written.
    """
    suffix, data = encode(frames)
    write_run_file(directory.file(f"debug.{suffix}"), data)
    if not history:
        return
    write_run_file(directory.file(f"debug_{epoch}.{suffix}"), data)
    pattern = re.compile(re.escape(directory.model_name) + r"_debug_(\d+)\.(gif|png)")
    found = [
        (int(match[1]), path) for path in directory.path.iterdir() if (match := pattern.fullmatch(path.name))
    ]
    for _, path in sorted(found)[:-history]:
        path.unlink(missing_ok=True)


def shown_voxels(labels: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the voxels of a target with a value to show: exact ones, and estimates; bounds are no value."""
    return labels[mask_key(name)] if upper_key(name) in labels else counted_voxels(labels, name)


def most_foreground(labels: Mapping[str, torch.Tensor], names: Sequence[str], batch_size: int) -> int:
    """Return the batch index of the sample with the most valid voxels that are not 0, over all targets."""
    scores = torch.zeros(batch_size)
    for name in names:
        if name in labels:
            foreground = (labels[name] != 0).any(dim=1, keepdim=True)
            if mask_key(name) in labels:
                foreground = foreground & (labels[mask_key(name)] > 0)
            scores += foreground.flatten(1).float().mean(dim=1).cpu()
    return int(scores.argmax())


def encode(frames: Sequence[Image.Image], max_bytes: int = MAX_BYTES) -> tuple[str, bytes]:
    """Return ("png", bytes) of one frame or ("gif", bytes) of several, the latter below `max_bytes`.

    A GIF that is too large loses every second slice; with few slices left it is scaled down until it fits.
    """
    if len(frames) == 1:
        buffer = io.BytesIO()
        frames[0].save(buffer, "PNG", optimize=True)
        return "png", buffer.getvalue()
    shown = list(frames)
    while True:
        data = _gif(shown)
        if len(data) <= max_bytes or shown[0].width < 200:
            return "gif", data
        if len(shown) // 2 >= MIN_FRAMES:
            shown = shown[::2]
        else:
            size = (round(shown[0].width * 0.75), round(shown[0].height * 0.75))
            shown = [frame.resize(size, Image.Resampling.LANCZOS) for frame in shown]


def _gif(frames: Sequence[Image.Image]) -> bytes:
    """Encode frames as an endless GIF; all frames share one palette, so the colours do not flicker."""
    chosen = [frames[index] for index in np.linspace(0, len(frames) - 1, min(4, len(frames))).astype(int)]
    width, height = frames[0].size
    # The palette is computed with a strip of the keys' colours, so that small keys do not lose their colours.
    strip = Image.fromarray(key_colours().astype(np.uint8)[None]).resize((width, height // 8), NEAREST)
    sheet = Image.new("RGB", (width, height * len(chosen) + strip.height))
    sheet.paste(strip, (0, height * len(chosen)))
    for place, frame in enumerate(chosen):
        sheet.paste(frame, (0, place * height))
    palette = sheet.quantize(colors=255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    indexed[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=round(MILLISECONDS * max(1.0, MAX_FRAMES / len(frames) / 2)),
        loop=0,
        optimize=False,
    )
    return buffer.getvalue()


def _finest(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list | tuple) else value


def _array(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.detach().cpu()
    return (plain.float() if plain.is_floating_point() else plain).numpy()
