"""Compares an image with the images on which a network was trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from volumen.data.placement import warn_impossible
from volumen.data.space.geometry import Geometry, directions_of, nearest_turn
from volumen.inference.intensity_check import check_intensities
from volumen.inference.predictor import Predictor
from volumen.inference.windows.window_rules import OURS, WindowRules
from volumen.transforms.normalize import schemes_of
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import by, counted

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

logger = logging.getLogger(__name__)


def check_kind(predictor: Predictor, image: Volume) -> None:
    """Refuse an image that the network cannot process.

    Raises:
        VolumenError: the number of axes or channels differs, or values are floating-point and their range is unknown.
    """
    ndim = len(predictor.patch_size)
    if len(image.shape) != ndim:
        raise VolumenError(
            image.path, expected=f"{ndim} spatial axes, as in training", found=f"shape {image.shape}",
            remedy="say which axes they are with --axes",
        )  # fmt: skip
    if image.channels != predictor.in_channels:
        raise VolumenError(
            image.path,
            expected=f"{counted(predictor.in_channels, 'channel')}, as in training",
            found=image.channels,
            remedy="say which axis is the channels' with --axes",
        )
    if _is_scaled_by_type(predictor) and image.dtype.kind == "f":
        raise VolumenError(
            image.path,
            expected="values of type uint8, as in training, which 255 brings to [0, 1]",
            found=f"type {image.dtype.name}",
            remedy="convert it as the training images were",
        )


def _is_scaled_by_type(predictor: Predictor) -> bool:
    """Whether training scaled its images to [0, 1] by the range of their type, which it does for uint8 only."""
    dataset = predictor.config.get("dataset_config") or {}
    return "unit" in schemes_of(dataset.get("normalization_scheme") or ()) and not dataset.get(
        "intensity_properties"
    )


def check_image(predictor: Predictor, image: Volume) -> None:
    """Compare an image with the training images; log a warning for differences that do not prevent a prediction.

    Raises:
        VolumenError: see `check_kind`.
    """
    check_kind(predictor, image)
    properties = predictor.config.get("dataset_config", {}).get("intensity_properties") or {}
    dtypes = properties.get("dtypes") or (["uint8"] if _is_scaled_by_type(predictor) else None)
    if dtypes and image.dtype.name not in dtypes:
        logger.warning(
            "%s: values of type %s, the network was trained on %s",
            image.path,
            image.dtype,
            " and ".join(dtypes),
        )
    check_intensities(predictor.config, predictor.normalizer, image)
    _check_spacing(predictor, image)


def _check_spacing(predictor: Predictor, image: Volume) -> None:
    """Warn of a voxel size unlike the training volumes'; without units only the ratios of axes are compared."""
    warn_impossible(image)
    if predictor.resamples:
        return
    trained = Geometry(predictor.spacing, predictor.unit)
    own = image.geometry.in_unit(trained.unit)
    if own.spacing is None or trained.spacing is None:
        return
    sizes, directions = own.spacing, predictor.orientation
    if directions is not None and image.geometry.orientation is not None and len(directions) == len(sizes):
        sizes = nearest_turn(directions_of(directions), image.geometry)[0].of_axes(sizes)
    ratios = [a / b for a, b in zip(sizes, trained.spacing, strict=True)]
    if own.unit is None or own.unit != trained.unit:
        ratios = [ratio / ratios[0] for ratio in ratios]
    if max(ratios) > 1.25 or min(ratios) < 0.8:
        logger.warning(
            "%s: spacing %s, the network was trained on %s; it is not resampled, since the training had no"
            " target_spacing",
            image.path,
            image.geometry.text(),
            trained.text(),
        )


def log_small(
    image: Volume,
    shape: Sequence[int],
    window: Sequence[int],
    usual: Sequence[int],
    rules: WindowRules = OURS,
) -> None:
    """Log which windows an image smaller than the usual window gets, and how much of them lies beyond it.

    Args:
        image: for its name.
        shape: voxels per axis, as the windows see the image.
        window: its windows.
        usual: the windows of larger images.
        rules: what windows hold beyond the image.
    """
    if all(size >= side for size, side in zip(shape, usual, strict=True)):
        return
    text = f"windows of {by(window)}"
    if tuple(window) != tuple(usual):
        text += f" instead of {by(usual)}"
    beyond = [
        f"{side - size} voxels along {axis}"
        for size, side, axis in zip(shape, window, "zyx"[-len(window) :], strict=True)
        if side > size
    ]
    if beyond:
        text += f", of which {' and '.join(beyond)} are {'0' if rules.zero_beyond else 'reflected'}"
    logger.info("%s: %s is smaller than a window: %s", image.path, by(shape), text)
