"""Draws what a masked autoencoder makes of one patch: `<model_name>_debug.gif` in 3D, `.png` in 2D."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from PIL import Image, ImageDraw
from torch.utils.data import default_collate

from volumen.handlers.preview import colours
from volumen.handlers.preview.handler import write_preview
from volumen.handlers.preview.render import BACKGROUND, FAINT, GAP, HEADER, MARGIN, MAX_FRAMES, TEXT, TITLE
from volumen.handlers.preview.scale_bar import draw_scale_bar
from volumen.handlers.records.logs import TensorBoardLog
from volumen.handlers.records.run_directory import RunDirectory
from volumen.losses.reconstruction import hidden_voxels, normalised_blocks
from volumen.networks.placement import local_network
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.picture_text import drawable
from volumen.utils.picture_text import picture_font as _font
from volumen.utils.sample_keys import HIDDEN, RECONSTRUCTION, mask_key

logger = logging.getLogger(__name__)

LOOKED_AT = 8
"""Patches of the first epoch of which the one with the most contrast is drawn."""
CELL = 288
"""Largest width of a column in pixels, unless the patch is wider."""
HIDDEN_COLOUR = (44, 58, 82)
TITLES = ("original", "visible to the encoder", "completed, each block's brightness given", "difference")


class ReconstructionPreview:
    """Draw one patch after an epoch: the original, what is visible of it, the completed patch, and the difference.

    All epochs draw the same patch with the same hidden blocks. Predictions have the unit of their block's standard
    deviation; for the picture they get the block's true mean and standard deviation, which the network does not know.
    So the picture shows whether structures continue rightly, not whether brightness is right. A preview that cannot be
    written causes a warning and does not end the run.

    Args:
        directory: the run's folder.
        network: the masked autoencoder, wrapped or not.
        dataset: gives `dataset[(epoch, index)]`, results of `FinalizeMaskedPatchd`.
        prepare: the trainer's `PrepareMaskedBatch`.
        block: voxels per axis of a hidden block.
        length: unit of the batch's "spacing", for the scale bar.
        every: epochs between pictures; the last epoch always has one.
        history: number of pictures of earlier epochs to retain as `<model_name>_debug_<epoch>`.
        tensorboard: also receives the middle slice.
    """

    def __init__(
        self,
        directory: RunDirectory,
        network: torch.nn.Module,
        dataset: Any,
        prepare: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]],
        block: Sequence[int],
        *,
        length: str | None = None,
        every: int = 1,
        history: int = 0,
        tensorboard: TensorBoardLog | None = None,
    ) -> None:
        self.directory = directory
        self.network = network
        self.dataset = dataset
        self.prepare = prepare
        self.block = tuple(block)
        self.length = length
        self.every = every
        self.history = history
        self.tensorboard = tensorboard
        self._sample: Mapping[str, Any] | None = None

    def attach(self, engine: SupervisedTrainer) -> None:
        """Draw when an epoch ends, in the first process."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Draw if it is this epoch's turn."""
        epoch = engine.state.epoch
        if not distributed.is_main() or (epoch % self.every and epoch < (engine.state.max_epochs or 0)):
            return
        frames = self.frames(engine)
        try:
            write_preview(self.directory, frames, epoch, self.history)
        except VolumenError as error:
            logger.warning("no preview: %s", error)
        if self.tensorboard is not None:
            self.tensorboard.add_image("preview", np.asarray(frames[len(frames) // 2]))

    def frames(self, engine: SupervisedTrainer) -> list[Image.Image]:
        """Return the frames for the network as it is now."""
        sample = self._chosen()
        names = ("image", RECONSTRUCTION, mask_key(RECONSTRUCTION), HIDDEN)
        batch = default_collate([{name: sample[name] for name in names}])
        network = local_network(self.network)
        training = network.training
        network.eval()
        try:
            with torch.no_grad():
                joined, tensors = self.prepare(batch, engine.state.device)
                predicted = network(joined)[RECONSTRUCTION].float()
        finally:
            network.train(training)
        image, inside = tensors[RECONSTRUCTION], tensors[mask_key(RECONSTRUCTION)]
        _, mean, deviation = normalised_blocks(image, inside, self.block)
        hidden = hidden_voxels(tensors[HIDDEN], self.block)
        completed = torch.where(hidden, predicted * deviation + mean, image.float())
        shown, out = (tensor[0].cpu().numpy() for tensor in (image.float(), completed))
        return render_reconstruction(
            shown,
            hidden[0, 0].cpu().numpy(),
            out,
            title=f"{self.directory.model_name}  ·  epoch {engine.state.epoch}  ·  {sample['volume_name']}",
            spacing=float(sample["spacing"][-1]),
            unit=self.length,
        )

    def _chosen(self) -> Mapping[str, Any]:
        if self._sample is None:
            samples = [self.dataset[(0, index)] for index in range(min(LOOKED_AT, len(self.dataset)))]
            self._sample = max(samples, key=lambda sample: float(sample["image"].std()))
        return self._sample


def render_reconstruction(
    image: np.ndarray,
    hidden: np.ndarray,
    completed: np.ndarray,
    *,
    title: str = "",
    spacing: float | None = None,
    unit: str | None = None,
    max_frames: int = MAX_FRAMES,
) -> list[Image.Image]:
    """Return the frames of a preview: one for a 2D patch, slices along Z for a 3D one.

    Args:
        image: (C, *spatial), the original.
        hidden: bool (*spatial).
        completed: (C, *spatial), the original where it is visible, else the reconstruction.
        title: text of the headline.
        spacing: voxel size along x, in `unit`; None: unknown, the scale bar counts voxels.
        unit: unit of the spacing.
        max_frames: maximum number of slices of a 3D patch, evenly spaced.

    Returns:
        Frames of one size, RGB.
    """
    flat = image.ndim == 3
    if flat:
        image, hidden, completed = image[:, None], hidden[None], completed[:, None]
    depth = image.shape[1]
    low, high = np.percentile(np.nan_to_num(image), (0.5, 99.5))
    span = max(float(high - low), 1e-6)
    title = drawable(title)
    frames = []
    for z in np.unique(np.linspace(0, depth - 1, min(depth, max_frames)).round().astype(int)):
        original, out = (colours.grey((array[:, z] - low) / span) for array in (image, completed))
        visible = np.where(hidden[z][..., None], np.array(HIDDEN_COLOUR, np.float32), original)
        error = np.abs(completed[:, z] - image[:, z]).max(axis=0) / span
        columns = (original, visible, out, colours.through(colours.SEQUENTIAL, 2 * error))
        frames.append(_frame(columns, title, "" if flat else f"z {z + 1} / {depth}", spacing, unit))
    return frames


def _frame(
    columns: Sequence[np.ndarray], title: str, caption: str, spacing: float | None, unit: str | None
) -> Image.Image:
    height, width = columns[0].shape[:2]
    scale = max(1, CELL // width) if width <= CELL else CELL / width
    cell = max(1, int(width * scale)), max(1, int(height * scale))
    size = (2 * MARGIN + len(columns) * cell[0] + GAP * (len(columns) - 1), HEADER + TITLE + cell[1] + MARGIN)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, HEADER / 2), title, fill=TEXT, font=_font(15), anchor="lm")
    draw.text((size[0] - MARGIN, HEADER / 2), caption, fill=FAINT, font=_font(13), anchor="rm")
    for place, (name, colour) in enumerate(zip(TITLES, columns, strict=True)):
        left = MARGIN + place * (cell[0] + GAP)
        draw.text((left, HEADER + TITLE / 2), name, fill=TEXT, font=_font(13), anchor="lm")
        picture = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))
        picture = picture.resize(cell, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
        if not place:
            draw_scale_bar(picture, cell[0] / width, spacing, unit)
        canvas.paste(picture, (left, HEADER + TITLE))
    return canvas
