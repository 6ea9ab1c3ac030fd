"""Prediction of images whose voxel size is not that of the training: on the network's grid, and back on the image's.

The windows lie on a grid of the training's voxel size. Their blended values, before the activation, are stored block by
block below the state folder, and interpolated linearly at the image's own voxels in a pass over the output's blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from volumen.data.space.geometry import AxisTurn, Geometry
from volumen.data.space.resampling import Resampling, interpolate
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.windows.heads import Head

logger = logging.getLogger(__name__)

_MOST_STEP = 64
"""A voxel size that differs by more than this factor from the training's is a wrong unit."""


def resampling_to_training(
    trained: Geometry | None, image: Volume, turn: AxisTurn | None = None
) -> Resampling | None:
    """Return the grid of the training's voxel size over an image; None where the image is predicted as stored.

    Args:
        trained: the one voxel size of the training, `Predictor.trained_grid`; None: it had none.
        image: the image.
        turn: how windows are turned for the network; the training's voxel size is along the network's axes.

    Raises:
        VolumenError: a voxel size that cannot be of the same kind of image.
    """
    if trained is None or trained.spacing is None:
        return None
    own = image.geometry.in_unit(trained.unit)
    if own.spacing is None:
        logger.warning(
            "%s: states no voxel size, so it is taken to be that of the training, %s",
            image.path,
            trained.text(),
        )
        return None
    if own.unit != trained.unit:
        logger.warning(
            "%s: voxel size %s, that of the training %s: the numbers are compared without units",
            image.path,
            image.geometry.text(),
            trained.text(),
        )
    target = trained.spacing if turn is None else turn.undo_axes(trained.spacing)
    factors = [wanted / stored for wanted, stored in zip(target, own.spacing, strict=True)]
    if max(factors) > _MOST_STEP or min(factors) < 1 / _MOST_STEP:
        raise VolumenError(
            image.path,
            expected=f"a voxel size near that of the training, {trained.text()}",
            found=image.geometry.text(),
            remedy="correct the voxel size or its unit in the file",
        )
    found = Resampling.between(image.shape, own.spacing, target)
    if found.is_identity:
        return None
    logger.info(
        "%s: voxel size %s, predicted at %s and brought back to its own voxels",
        image.path,
        image.geometry.text(),
        trained.text(),
    )
    return found


def check_resampled(image: Volume, heads: Sequence[Head]) -> None:
    """Refuse heads whose channels are offsets in voxels, which mean nothing between voxels of another size.

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


def length_factor(resampling: Resampling | None, spacing: Sequence[float]) -> float:
    """Return by what distances in voxels of the network's grid are multiplied for those of the image's grid.

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
        first: place of `blend` in the network's grid; None for its beginning.
    """
    positions = [
        resampling.resampled_positions(axis, part.start, part.stop) for axis, part in enumerate(region)
    ]
    # What resampling makes larger, the way back makes smaller.
    return interpolate(blend, positions, first or (0,) * len(positions), resampling.order[::-1])
