"""Decides where a label is valid; training, validation, scores, statistics and pictures all follow this rule.

A voxel of a label is known where its mask is above 0 in every channel and no channel of the label holds the ignore
value. Without a mask and an ignore value every voxel is known, and 0 is background. A mask value that is negative or
NaN is not above 0. A negative value of a label at a known voxel is an error: it is neither background nor foreground.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.errors import VolumenError


def inside_mask(mask: np.ndarray) -> np.ndarray:
    """Return where a mask (C, *space) is above 0 in every channel: bool (*space)."""
    inside: np.ndarray = mask > 0
    return inside[0] if len(inside) == 1 else np.asarray(inside.all(axis=0))


def holds_value(label: np.ndarray, value: int) -> np.ndarray:
    """Return where any channel of a label (C, *space) holds a value: bool (*space)."""
    holds: np.ndarray = label == value
    return holds[0] if len(holds) == 1 else np.asarray(holds.any(axis=0))


def known_voxels(
    label: np.ndarray | None, mask: np.ndarray | None = None, ignore: int | None = None
) -> np.ndarray | None:
    """Return where a label is known.

    Args:
        label: (C, *space), or None if it is not read; `ignore` must then be None.
        mask: (C, *space) of the same space, or None for everywhere.
        ignore: label value that means unknown, or None.

    Returns:
        bool (*space), a new array; None means that all voxels are known.
    """
    known = None if mask is None else inside_mask(mask)
    if ignore is None:
        return known
    if label is None:
        raise ValueError("where a value is ignored, the label is needed")
    trusted = ~holds_value(label, ignore)
    return trusted if known is None else known & trusted


def without_ignored(label: np.ndarray, ignore: int | None) -> np.ndarray:
    """Return a label (C, *space) with 0 at ignored voxels, since code that counts classes must not see that value."""
    if ignore is None:
        return label
    return np.where(holds_value(label, ignore)[None], np.zeros((), dtype=label.dtype), label)


def labelled_voxels(label: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the known voxels whose label is above 0 in any channel (`compute_loss_on_labeled_only`): bool (*space)."""
    labelled: np.ndarray = np.asarray((label > 0).any(axis=0))
    return labelled if known is None else labelled & known


def binary_truth(
    label: np.ndarray, known: np.ndarray | None, target: str, volume: str, *, remedy: str | None = None
) -> np.ndarray:
    """Return a label as 0 and 1 in uint8: every value but 0 is foreground.

    Args:
        label: (C, *space).
        known: bool (1, *space) or (*space), or None for all.
        target, volume: names for the error.
        remedy: for the error; None names the setting of the training.

    Raises:
        VolumenError: a known voxel has a negative value.
    """
    refuse_negative(label, known, target, volume, remedy=remedy)
    return np.asarray(label != 0).view(np.uint8)


def refuse_negative(
    label: np.ndarray, known: np.ndarray | None, target: str, volume: str, *, remedy: str | None = None
) -> None:
    """Refuse a label with a negative value at a known voxel.

    Raises:
        VolumenError: names target, volume and value.
    """
    if label.dtype.kind not in "if" or not label.size or label.min() >= 0:
        return
    negative = label < 0 if known is None else (label < 0) & known
    if negative.any():
        value = int(label[negative].min())
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected="0 for background and values above 0 for foreground",
            found=value,
            remedy=remedy or f"set targets.{target}.ignore_label: {value} if it means unknown",
        )


def class_truth(
    label: np.ndarray,
    known: np.ndarray | None,
    target: str,
    classes: int,
    volume: str,
    *,
    remedy: str | None = None,
) -> np.ndarray:
    """Return a label of class indices with 0 instead of values that are no class, which only unknown voxels may have.

    Args:
        label: (C, *space).
        known: bool (1, *space) or (*space), or None for all.
        target, volume: names for the error.
        classes: number of classes, background included.
        remedy: for the error; None names the settings of the training.

    Raises:
        VolumenError: a known voxel has a value that is negative or no class.
    """
    if not label.size or (label.min() >= 0 and label.max() < classes):
        return label
    foreign = (label < 0) | (label >= classes)
    values = label[foreign if known is None else foreign & known]
    if values.size:
        low, high = int(values.min()), int(values.max())
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected=f"classes 0 to {classes - 1}",
            found=high if high >= classes else low,
            remedy=remedy or f"set targets.{target}.ignore_label, or out_channels to the number of classes",
        )
    return np.where(foreign, np.zeros((), dtype=label.dtype), label)
