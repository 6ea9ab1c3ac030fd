"""Prediction of images with another voxel size than in training: on a grid of that size, and resampled back.

The windows lie on a grid with the voxel size of the training. Their blended values, before the activation, are stored
block by block below the state folder. A pass over the output's blocks interpolates them linearly at the image's voxels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from volumen.data.space.geometry import AxisTurn, Geometry
from volumen.data.space.resampling import Resampling
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.windows.heads import Head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedGrid:
    """The one voxel size of a training.

    Args:
        geometry: the size, along the axes of the training volumes, and its unit.
        assumed: size of stored voxels that the settings of the training gave (`dataset_config.spacing`), along the same
            axes; it holds for images that state none. None: no setting.
    """

    geometry: Geometry
    assumed: tuple[float, ...] | None = None

    def spacing_of(self, image: Volume, turn: AxisTurn | None = None) -> tuple[float, ...] | None:
        """Return the voxel size of an image in the training's unit, along its own axes; None if nothing states it."""
        if image.spacing is not None or self.assumed is None:
            return image.geometry.in_unit(self.geometry.unit).spacing
        return self.assumed if turn is None else turn.undo_axes(self.assumed)


_MOST_STEP = 64
"""A voxel size that differs from the training's by more than this factor must have a wrong unit."""


def resampling_to_training(
    trained: TrainedGrid | None, image: Volume, turn: AxisTurn | None = None
) -> Resampling | None:
    """Return the grid over an image with the voxel size of the training; None if the image is not resampled.

    Args:
        trained: the common voxel size of the training, `Predictor.trained_grid`; None: there was none.
        image: the image.
        turn: how windows are turned for the network; the training's voxel size is along the network's axes.

    Raises:
        VolumenError: the voxel sizes differ so much that a unit must be wrong.
    """
    if trained is None:
        return None
    size, stored = trained.geometry, trained.spacing_of(image, turn)
    if stored is None:
        logger.warning(
            "%s: states no voxel size, so it is taken to be that of the training, %s", image.path, size.text()
        )
        return None
    if image.spacing is not None and image.geometry.in_unit(size.unit).unit != size.unit:
        logger.warning(
            "%s: voxel size %s, that of the training %s: the numbers are compared without units",
            image.path,
            image.geometry.text(),
            size.text(),
        )
    assert size.spacing is not None
    target = size.spacing if turn is None else turn.undo_axes(size.spacing)
    own = image.geometry.text() if image.spacing is not None else Geometry(stored, size.unit).text()
    refuse_distant_sizes(image.path, stored, target, found=own, expected=size.text())
    found = Resampling.between(image.shape, stored, target)
    if found.is_identity:
        return None
    logger.info(
        "%s: voxel size %s, predicted at %s and brought back to its own voxels", image.path, own, size.text()
    )
    return found


def check_resampled(image: Volume, heads: Sequence[Head]) -> None:
    """Refuse heads whose channels are offsets in voxels, since these depend on the voxel size.

    Raises:
        VolumenError: there is such a head.
    """
    for head in heads:
        offsets = head.layout is not None and any(part.kind == "offsets" for part in head.layout)
        if offsets or head.kind == "field":
            raise VolumenError(
                image.path,
                expected=f"the voxel size of the training for {head.name}, whose channels count voxels",
                found=f"a voxel size of {image.geometry.text()}",
                remedy="leave that target out with --targets, or resample the image",
            )


def refuse_distant_sizes(
    path: object, stored: Sequence[float], target: Sequence[float], *, found: str, expected: str
) -> None:
    """Refuse an image whose voxel size is so far from the training's that a unit must be wrong.

    Args:
        path: the image, for the message.
        stored, target: voxel sizes of the image and of the training, along the same axes.
        found, expected: both as text.

    Raises:
        VolumenError: the sizes differ by more than the factor `_MOST_STEP`.
    """
    factors = [new / old for new, old in zip(target, stored, strict=True)]
    if max(factors) > _MOST_STEP or min(factors) < 1 / _MOST_STEP:
        raise VolumenError(
            path,
            expected=f"a voxel size near that of the training, {expected}",
            found=found,
            remedy="correct the voxel size or its unit in the file",
        )


def length_factor(resampling: Resampling | None, spacing: Sequence[float]) -> float:
    """Return the factor from distances in voxels of the network's grid to distances in voxels of the image.

    Args:
        resampling: the network's grid; None for the image's own.
        spacing: voxel size of the image.
    """
    if resampling is None:
        return 1.0
    return min(s * step for s, step in zip(spacing, resampling.step, strict=True)) / min(spacing)


def on_stored_grid(
    blend: np.ndarray, resampling: Resampling, region: Sequence[slice], first: Sequence[int] | None = None
) -> np.ndarray:
    """Return blended values of the network's grid at stored voxels.

    Args:
        blend: (channels, *space), a part of the network's grid.
        resampling: the network's grid.
        region: stored voxels.
        first: first voxel of `blend` in the network's grid; None: its beginning.
    """
    positions = [
        resampling.resampled_positions(axis, part.start, part.stop) for axis, part in enumerate(region)
    ]
    return resampling.on_stored(blend, positions, first or (0,) * len(positions))
