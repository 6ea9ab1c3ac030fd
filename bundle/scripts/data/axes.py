"""Which stored axis is which: from stored order to channels first, then (Z, Y, X)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.errors import VolumenError

SETTING = "dataset_config.axes"
UNKNOWN = "?"
_SPATIAL = "zyx"
_SMALL = 4
"""An unnamed axis of 2 to this many entries may hold channels (grey + alpha, RGB, RGBA)."""


@dataclass(frozen=True)
class AxisMap:
    """The stored axes that hold space and channels; every other stored axis has one entry.

    Args:
        stored_shape: shape of the stored array.
        spatial: stored index of each spatial axis, in the order (Z, Y, X) or (Y, X).
        channel: stored index of the channel axis, or None.
    """

    stored_shape: tuple[int, ...]
    spatial: tuple[int, ...]
    channel: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape, (Z, Y, X) or (Y, X)."""
        return self.of_space(self.stored_shape)

    @property
    def channels(self) -> int:
        return 1 if self.channel is None else self.stored_shape[self.channel]

    def of_space(self, values: Sequence) -> tuple:
        """Pick the spatial entries of one value per stored axis, in spatial order."""
        return tuple(values[axis] for axis in self.spatial)

    def stored_region(self, region: tuple[slice, ...]) -> tuple[slice, ...]:
        """Turn a spatial region into slices of the stored array, all channels included."""
        stored = [slice(0, size) for size in self.stored_shape]
        for axis, part in zip(self.spatial, region):
            stored[axis] = part
        return tuple(stored)

    def channels_first(self, block: np.ndarray) -> np.ndarray:
        """Transpose a block of the stored array to (channels, *space)."""
        kept = (*self.spatial,) if self.channel is None else (self.channel, *self.spatial)
        dropped = tuple(axis for axis in range(block.ndim) if axis not in kept)
        ordered = block.transpose(*dropped, *kept)
        return ordered.reshape(self.channels, *ordered.shape[-len(self.spatial) :])


def map_axes(
    where: object,
    shape: Sequence[int],
    *,
    known: str | None = None,
    requested: str | None = None,
    ndim: int | None = None,
) -> AxisMap:
    """Decide what each stored axis means: by request, else by metadata, else by the shape.

    Args:
        where: file named in errors.
        shape: stored shape.
        known: one letter per stored axis from the file's metadata (z, y, x, c, t; "?" if unnamed), or None.
        requested: the user's `dataset_config.axes`, such as "zyx", "cyx", "yxc". It wins over metadata. A "c"
            in it is dropped for an array with one axis less, so one setting serves images and their labels.
        ndim: number of spatial axes when it is known from elsewhere (labels follow their image).

    Raises:
        VolumenError: the shape can be read in two ways, or it does not fit the axes.
    """
    shape = tuple(int(size) for size in shape)
    if requested:
        letters = _fit_request(where, shape, requested.lower())
    elif known is not None and UNKNOWN not in known:
        letters = known.lower()
    else:
        letters = _guess(where, shape, (known or UNKNOWN * len(shape)).lower(), ndim)
    return _build(where, shape, letters, ndim)


def _build(where: object, shape: tuple[int, ...], letters: str, ndim: int | None) -> AxisMap:
    at = {letter: axis for axis, letter in enumerate(letters)}
    if len(at) != len(letters) or not {"y", "x"} <= set(at):
        raise VolumenError(
            where, expected="axes with y and x, each once", found=repr(letters), remedy=f"set {SETTING}"
        )
    extra = [letter for letter in letters if letter not in "zyxc" and shape[at[letter]] != 1]
    if extra:
        sizes = ", ".join(f"{letter}={shape[at[letter]]}" for letter in extra)
        raise VolumenError(
            where,
            expected="axes among c, z, y, x",
            found=f"{letters!r} with {sizes}",
            remedy=f"set {SETTING} (zyx, if the pages are slices) or save one file per {extra[0]}",
        )
    spatial = [letter for letter in _SPATIAL if letter in at]
    if ndim == 2 and len(spatial) == 3 and shape[at["z"]] == 1:
        spatial.remove("z")
    if ndim is not None and len(spatial) != ndim:
        raise VolumenError(
            where,
            expected=f"{ndim} spatial axes",
            found=f"shape {shape} with axes {letters!r}",
            remedy=f"set {SETTING}",
        )
    return AxisMap(shape, tuple(at[letter] for letter in spatial), at.get("c"))


def _fit_request(where: object, shape: tuple[int, ...], requested: str) -> str:
    if set(requested) - set("tczyx"):
        raise VolumenError(SETTING, expected="letters among t, c, z, y, x", found=repr(requested))
    if len(requested) == len(shape):
        return requested
    without = requested.replace("c", "")
    for letters in (requested, without):
        if len(letters) == len(shape):
            return letters
        spare = len(shape) - len(letters)
        if spare > 0 and all(size == 1 for size in shape[:spare]):
            return "0123456789"[:spare] + letters
    raise VolumenError(
        where, expected=f"{len(requested)} axes ({SETTING}: {requested})", found=f"shape {shape}"
    )


def _guess(where: object, shape: tuple[int, ...], known: str, ndim: int | None) -> str:
    """Name the unnamed axes: what is left of z, y, x, and a channel only where there must be one."""
    letters = list(known)
    unnamed = [axis for axis, letter in enumerate(known) if letter == UNKNOWN]
    while len(unnamed) > 1 and len(shape) > 4 and shape[unnamed[0]] == 1:
        letters[unnamed[0]] = "0123456789"[unnamed[0]]
        unnamed.pop(0)
    missing = [letter for letter in _SPATIAL if letter not in known]
    if ndim == 2 and "z" in missing:
        missing.remove("z")
    spare = len(unnamed) - len(missing)
    if len(shape) == 2 or (spare < 0 and missing[0] == "z"):
        missing, spare = (
            [m for m in missing if m != "z"],
            len(unnamed) - len([m for m in missing if m != "z"]),
        )
    if spare < 0 or spare > 1 or (spare == 1 and "c" in known):
        raise VolumenError(
            where,
            expected="2 or 3 spatial axes and channels",
            found=f"shape {shape}",
            remedy=f"set {SETTING}",
        )
    if spare == 1:
        missing = _with_channel(where, shape, unnamed, missing)
    elif "z" in missing and "c" not in known and ndim is None:
        _refuse_thin(where, shape, unnamed)
    for axis, letter in zip(unnamed, missing):
        letters[axis] = letter
    return "".join(letters)


def _with_channel(where: object, shape: tuple[int, ...], unnamed: list[int], missing: list[str]) -> list[str]:
    first, last = shape[unnamed[0]], shape[unnamed[-1]]
    others = [shape[axis] for axis in unnamed[1:-1]]
    channel_last = last <= _SMALL < first
    channel_first = not channel_last and last > _SMALL and first < min([*others, last])
    if channel_first == channel_last:
        _refuse_ambiguous(where, shape)
    return ["c", *missing] if channel_first else [*missing, "c"]


def _refuse_thin(where: object, shape: tuple[int, ...], unnamed: list[int]) -> None:
    """Three unnamed axes are (Z, Y, X), unless the first or the last is as small as channels are."""
    ends = (shape[unnamed[0]], shape[unnamed[-1]])
    inner = [size for size in shape if size not in ends] or [max(shape)]
    if any(1 < size <= _SMALL for size in ends) and max(shape) > _SMALL and min(inner) > _SMALL:
        _refuse_ambiguous(where, shape)


def _refuse_ambiguous(where: object, shape: tuple[int, ...]) -> None:
    choices = {3: "zyx, cyx or yxc", 4: "czyx or zyxc"}.get(len(shape), "such as zyx or czyx")
    raise VolumenError(
        where,
        f"shape {shape} can be read in two ways: is the small axis a channel?",
        remedy=f"set {SETTING}: {choices}",
    )
