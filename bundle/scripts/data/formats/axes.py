"""Maps stored axes to channels first, then (Z, Y, X)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from volumen.utils.errors import VolumenError

SETTING = "dataset_config.axes"
_SET = f"set {SETTING}, or --axes of volumen predict"
UNKNOWN = "?"
_SPATIAL = "zyx"
_ORDERS = {2: ("yx",), 3: ("zyx", "cyx", "yxc"), 4: ("czyx", "zyxc", "zcyx")}
"""Orders that programs write, by number of axes."""
_SMALL = 4
"""An unnamed axis of 2 to this many entries may be channels (grey + alpha, RGB, RGBA)."""


class AmbiguousAxesError(VolumenError):
    """A shape can be interpreted in two ways."""


@dataclass(frozen=True)
class AxisMap:
    """The stored axes of space and channels; every other stored axis has one entry.

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
        """Select the spatial entries of a sequence with one value per stored axis, in spatial order."""
        return tuple(values[axis] for axis in self.spatial)

    def stored_region(self, region: tuple[slice, ...]) -> tuple[slice, ...]:
        """Convert a spatial region to slices of the stored array, all channels included."""
        stored = [slice(0, size) for size in self.stored_shape]
        for axis, part in zip(self.spatial, region):
            stored[axis] = part
        return tuple(stored)

    def channels_first(self, block: np.ndarray) -> np.ndarray:
        """Transpose a block of the stored array to (channels, *space)."""
        retained = (*self.spatial,) if self.channel is None else (self.channel, *self.spatial)
        dropped = tuple(axis for axis in range(block.ndim) if axis not in retained)
        ordered = block.transpose(*dropped, *retained)
        return ordered.reshape(self.channels, *ordered.shape[-len(self.spatial) :])


def map_axes(
    where: object,
    shape: Sequence[int],
    *,
    known: str | None = None,
    requested: str | None = None,
    ndim: int | None = None,
) -> AxisMap:
    """Determine the meaning of each stored axis: from the request, else from metadata, else from the shape.

    Args:
        where: file, named in errors.
        shape: stored shape.
        known: one letter per stored axis from the file's metadata (z, y, x, c, t; "?" if unnamed), or None.
        requested: the user's `dataset_config.axes`, such as "zyx", "cyx", "yxc". It takes precedence over metadata.
            Its "c" is dropped for an array with one axis less, so one setting serves images and their labels.
        ndim: number of spatial axes if it is known otherwise (labels have those of their image).

    Raises:
        VolumenError: the shape can be interpreted in two ways, or it does not fit the axes.
    """
    shape = tuple(int(size) for size in shape)
    if 0 in shape:
        raise VolumenError(where, expected="voxels", found=f"shape {shape}", remedy="write it again")
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
        raise VolumenError(where, expected="axes with y and x, each once", found=repr(letters), remedy=_SET)
    extra = [letter for letter in letters if letter not in "zyxc" and shape[at[letter]] != 1]
    if extra:
        sizes = ", ".join(f"{letter}={shape[at[letter]]}" for letter in extra)
        raise VolumenError(
            where,
            expected="axes among c, z, y, x",
            found=f"{letters!r} with {sizes}",
            remedy=f"{_SET} (zyx, if the pages are slices) or save one file per {extra[0]}",
        )
    spatial = [letter for letter in _SPATIAL if letter in at]
    if ndim == 2 and len(spatial) == 3 and shape[at["z"]] == 1:
        spatial.remove("z")
    if ndim is not None and len(spatial) != ndim:
        raise VolumenError(
            where,
            expected=f"{ndim} spatial axes",
            found=f"shape {shape} with axes {letters!r}",
            remedy=_SET,
        )
    return AxisMap(shape, tuple(at[letter] for letter in spatial), at.get("c"))


def _fit_request(where: object, shape: tuple[int, ...], requested: str) -> str:
    """Fit the requested axes to a shape that may lack time and channels, or begin with axes of one entry."""
    if set(requested) - set("tczyx"):
        raise VolumenError(SETTING, expected="letters among t, c, z, y, x", found=repr(requested))
    for dropped in ("", "c", "t", "tc"):
        letters = "".join(letter for letter in requested if letter not in dropped)
        if len(letters) == len(shape):
            return letters
    for letters in (requested, requested.replace("c", "")):
        spare = len(shape) - len(letters)
        if spare > 0 and all(size == 1 for size in shape[:spare]):
            return "0123456789"[:spare] + letters
    raise VolumenError(
        where, expected=f"{len(requested)} axes ({SETTING}: {requested})", found=f"shape {shape}"
    )


def _guess(where: object, shape: tuple[int, ...], known: str, ndim: int | None) -> str:
    """Choose the common order that fits the known letters, dimensions and sizes."""
    spare = 0
    while len(shape) - spare > 4 and shape[spare] == 1:
        spare += 1
    orders = [
        order
        for order in _ORDERS.get(len(shape) - spare, ())
        if all(k in (UNKNOWN, letter) for k, letter in zip(known[spare:], order))
        and ndim in (None, len(order.replace("c", "")))
    ]
    if not orders:
        found = f"shape {shape}" + (f" for {ndim} spatial axes" if ndim else "")
        raise VolumenError(where, expected="2 or 3 spatial axes and channels", found=found, remedy=_SET)
    return "0123456789"[:spare] + (orders[0] if len(orders) == 1 else _by_size(where, shape, spare, orders))


def _by_size(where: object, shape: tuple[int, ...], spare: int, orders: list[str]) -> str:
    sizes = shape[spare:]
    small = [order for order in orders if "c" in order and sizes[order.index("c")] <= _SMALL]
    if "zyx" in orders:
        # An axis of one entry gives no information, and in a stack that is tiny along all axes none is distinct.
        small = [order for order in small if sizes[order.index("c")] > 1 and max(sizes) > _SMALL]
        if small:
            _refuse_ambiguous(where, shape)
        return "zyx"
    if len(small) == 1:
        return small[0]
    if not small and orders[0][0] == "c" and sizes[0] < min(sizes[1:]):
        return orders[0]
    _refuse_ambiguous(where, shape)


def _refuse_ambiguous(where: object, shape: tuple[int, ...]) -> NoReturn:
    choices = {3: "zyx, cyx or yxc", 4: "czyx or zyxc"}.get(len(shape), "such as zyx or czyx")
    raise AmbiguousAxesError(
        where,
        f"shape {shape} can be read in two ways: is the small axis a channel?",
        remedy=f"{_SET}: {choices}",
    )
