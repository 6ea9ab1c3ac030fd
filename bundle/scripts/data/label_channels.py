"""Labels and masks as programs save them: grey as RGB, with an alpha channel, in colours; read as one channel.

What a label means must not depend on how its values were stored. A view of the stored volume is returned, with a
`remark` that says what was recognised; it checks every region that it reads, since only a part is looked at before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from volumen.data.formats.integral import IntegralVolume
from volumen.data.formats.label_view import InvertedLabel, LabelView, NoNanMask
from volumen.data.formats.volumes import Region, SingleLevelError, Volume, open_volume
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

IGNORE_KEYS = ("ignore_label", "ignore_index", "ignore_value")
_BLOCKS = 16
"""Blocks of up to 4 million values that are looked at."""
_COLOURS = 8
"""Different colours that are listed at most."""


@dataclass(frozen=True)
class LabelRule:
    """What the settings say of how a target's labels are stored.

    Args:
        setting: name of the target's entry, for messages; "" for a mask.
        separate: its channels are targets of their own, whatever they hold.
        channels: channels of the head, or None.
        invert: 0 is the foreground.
        unknown: label value that NaN stands for, or None.
    """

    setting: str = ""
    separate: bool = False
    channels: int | None = None
    invert: bool = False
    unknown: int | None = None


def label_rule(name: str, entry: Mapping[str, Any]) -> LabelRule:
    """Return what a target's entry, of an experiment or in a trained model's snapshot, says of its labels."""
    return LabelRule(
        f"targets.{name}",
        separate=entry.get("kind") == "multilabel",
        channels=entry.get("out_channels"),
        invert=bool(entry.get("invert")),
        unknown=next((entry[key] for key in IGNORE_KEYS if entry.get(key) is not None), None),
    )


def open_label(
    path: Any,
    *,
    axes: str | None = None,
    level: int = 0,
    ndim: int | None = None,
    rule: LabelRule | None = None,
) -> Volume:
    """Open a label or a mask; one without levels may have been drawn at the image's level.

    Args:
        path, axes, level, ndim: see `open_volume`.
        rule: what the settings say of it; None for a mask.

    Raises:
        VolumenError: as `open_volume` and `as_label`.
    """
    try:
        volume = open_volume(path, axes=axes, level=level, ndim=ndim, labels=True)
    except SingleLevelError:
        volume = open_volume(path, axes=axes, ndim=ndim, labels=True)
    return as_label(volume, rule or LabelRule())


def open_mask_file(path: Any, *, ndim: int | None = None) -> Volume:
    """Open a mask of one channel, and say what was recognised; it counts where it is not 0.

    Raises:
        VolumenError: as `open_volume`, or its channels differ.
    """
    mask = one_channel(open_volume(path, ndim=ndim, labels=True), LabelRule())
    if mask.channels != 1:
        raise VolumenError(
            path, expected="a mask of 1 channel", found=f"{mask.channels}", remedy="save it as grey"
        )
    mask = _said(mask, LabelRule())
    if remark := getattr(mask, "remark", ""):
        logger.warning("%s: %s", path, remark)
    return NoNanMask(mask) if np.dtype(mask.dtype).kind == "f" else mask


def as_label(volume: Volume, rule: LabelRule) -> Volume:
    """Return a volume of integers with one channel for each target that the label holds.

    Args:
        volume: what is stored.
        rule: what the settings say of it.

    Raises:
        VolumenError: colours, or an alpha channel that is not constant, of which nothing says what they mean.
    """
    found = volume
    if volume.channels > 1 and not rule.separate:
        found = one_channel(volume, rule)
    if np.dtype(found.dtype).kind not in "ui":
        found = IntegralVolume(found, unknown=rule.unknown, setting=rule.setting)
    return InvertedLabel(found, rule.unknown) if rule.invert else _said(found, rule)


def _said(volume: Volume, rule: LabelRule) -> Volume:
    """Add what a file says of its values that may turn their meaning round."""
    if getattr(volume, "samples", None) != "min-is-white":
        return volume
    setting = f"; {rule.setting}.invert: true reads it as foreground" if rule.setting else ""
    text = f"stored as min-is-white: 0, which programs show white, is read as background{setting}"
    return LabelView(volume, volume.channels, text)


class _Follows(NamedTuple):
    """What another channel must hold where the chosen one is not 0: None, the same; else this value, or 0 at 0."""

    channel: int
    value: int | float | None


class ChannelLabel(LabelView):
    """One channel of a label whose other channels say nothing more.

    Args:
        volume: what is stored.
        channel: the channel.
        follows: what the colour channels beside it must hold.
        constant: value that other channels must have everywhere, by channel.
        remark: what was recognised.
        rule: for the error where the channels do say more.
    """

    def __init__(
        self,
        volume: Volume,
        channel: int,
        follows: Sequence[_Follows],
        constant: dict[int, Any],
        remark: str,
        rule: LabelRule,
    ) -> None:
        super().__init__(volume, 1, remark)
        self._channel, self._follows, self._constant, self._rule = channel, tuple(follows), constant, rule

    def fingerprint(self) -> str:
        return f"{self.volume.fingerprint()} channel {self._channel}"

    def read(self, region: Region) -> np.ndarray:
        block = self.volume.read(region)
        chosen = block[self._channel]
        for channel, value in self._follows:
            due = chosen if value is None else np.where(chosen == 0, chosen, block.dtype.type(value))
            if not np.array_equal(block[channel], due):
                place = np.argwhere(block[channel] != due)[0]
                raise _refusal(self.volume, self._rule, f"the colour {_colour_at(block, place)}")
        for channel, value in self._constant.items():
            if (block[channel] != value).any():
                raise _refusal(self.volume, self._rule, "an alpha channel that is not constant")
        return block[self._channel : self._channel + 1].copy()


class _Seen(NamedTuple):
    """What a part of a volume holds.

    Attributes:
        colours: different values over all channels, at most one more than `_COLOURS`.
        low, high: smallest and largest value per channel.
        two_valued: per channel, whether it holds 0 and one other value at most.
    """

    colours: set[tuple[int | float, ...]]
    low: list[Any]
    high: list[Any]
    two_valued: list[bool]


def one_channel(volume: Volume, rule: LabelRule) -> Volume:
    """Return the one channel that says all, or the volume where its channels are targets of their own."""
    samples, channels = getattr(volume, "samples", None), volume.channels
    if channels not in (2, 3, 4) or (channels == 2 and samples != "grey+alpha"):
        return volume
    seen = _look(volume)
    alpha = channels - 1 if samples in ("rgba", "grey+alpha") or _is_opaque(volume, seen) else None
    colour_channels = [channel for channel in range(channels) if channel != alpha]
    if len(colour_channels) > 3:
        return volume
    constant, remarks = {}, []
    if alpha is not None:
        if seen.low[alpha] != seen.high[alpha]:
            if all(seen.low[channel] == seen.high[channel] for channel in colour_channels):
                constant = {channel: seen.low[channel] for channel in colour_channels}
                text = "its colour is constant, so its alpha channel is read as the label"
                return ChannelLabel(volume, alpha, [], constant, text, rule)
            return _separate_or_refuse(volume, rule, "an alpha channel that is not constant")
        constant[alpha] = seen.low[alpha]
        remarks.append("its constant alpha channel is left out")
    colours = {colour[: len(colour_channels)] for colour in seen.colours}
    if len(colour_channels) == 1 or all(len(set(colour)) == 1 for colour in colours):
        if len(colour_channels) > 1:
            keep = f" ({rule.setting}.kind: multilabel keeps them apart)" if rule.setting else ""
            remarks.append(f"grey saved as RGB: its 3 equal channels are read as one label{keep}")
        follows = [_Follows(channel, None) for channel in colour_channels[1:]]
        return ChannelLabel(volume, 0, follows, constant, "; ".join(remarks), rule)
    declared = samples in ("rgb", "rgba")
    single = sorted(colour for colour in colours if any(colour))
    if declared and len(single) == 1 and len(colours) <= 2:
        return _one_colour(volume, single[0], constant, remarks, rule)
    if declared or not all(seen.two_valued[channel] for channel in colour_channels):
        return _separate_or_refuse(volume, rule, _listed(colours))
    if max(seen.high) > 1 and rule.channels != channels:
        text = f"its {channels} channels are read as overlapping targets; {_choice(rule)}"
        return LabelView(volume, channels, text)
    return volume


def _one_colour(
    volume: Volume, colour: tuple[Any, ...], constant: dict[int, Any], remarks: list[str], rule: LabelRule
) -> Volume:
    """Return the label of objects that are drawn in a single colour on black."""
    channel = int(np.argmax(colour))
    follows = [_Follows(other, value) for other, value in enumerate(colour) if other != channel]
    remarks.append(f"drawn in one colour, {_text(colour)}, which is read as foreground")
    return ChannelLabel(volume, channel, follows, constant, "; ".join(remarks), rule)


def _separate_or_refuse(volume: Volume, rule: LabelRule, found: str) -> Volume:
    if rule.channels == volume.channels:
        return volume
    raise _refusal(volume, rule, found)


def _refusal(volume: Volume, rule: LabelRule, found: str) -> VolumenError:
    if not rule.setting:
        return VolumenError(
            volume.path, expected="a mask of 1 channel", found=found, remedy="save it as grey"
        )
    return VolumenError(volume.path, expected="a label in grey", found=found, remedy=_choice(rule))


def _choice(rule: LabelRule) -> str:
    if not rule.setting:
        return "save it as grey"
    return (
        "save class numbers 0, 1, 2, ... if they are colours of classes, or set "
        f"{rule.setting}.kind: multilabel if each channel is a target of its own"
    )


def _is_opaque(volume: Volume, seen: _Seen) -> bool:
    """Whether the last of four channels without a name is an alpha channel: as large as its type can be, everywhere."""
    dtype = np.dtype(volume.dtype)
    if volume.channels != 4 or getattr(volume, "samples", None) is not None or dtype.kind != "u":
        return False
    return bool(seen.low[-1] == seen.high[-1] == np.iinfo(dtype).max)


def _look(volume: Volume) -> _Seen:
    """Look at blocks all over a volume."""
    from volumen.data.index.label_values import stored_regions

    regions, absent = stored_regions(volume)
    channels = volume.channels
    # What is not stored holds the fill value in every channel.
    fills = sorted(absent) if len(regions) or absent else [0]
    colours: set[tuple[int | float, ...]] = {(fill,) * channels for fill in fills}
    low: list[Any] = [fills[0] if fills else None] * channels
    high: list[Any] = [fills[-1] if fills else None] * channels
    values: list[set] = [{0, *fills} for _ in range(channels)]
    step = max(1, len(regions) // _BLOCKS)
    for region in regions[: step * _BLOCKS : step]:
        flat = volume.read(region).reshape(channels, -1)
        for channel, row in enumerate(flat):
            least, most = row.min().item(), row.max().item()
            low[channel] = least if low[channel] is None else min(low[channel], least)
            high[channel] = most if high[channel] is None else max(high[channel], most)
            if len(values[channel]) <= 2:
                values[channel] |= {least, most, *row[(row != least) & (row != most)][:1].tolist()}
        if len(colours) <= _COLOURS:
            colours |= _colours_of(flat)
    return _Seen(colours, low, high, [len(found) <= 2 for found in values])


def _colours_of(flat: np.ndarray) -> set[tuple[int | float, ...]]:
    """Return different columns of (channels, voxels): all, or nine where there are more than eight."""
    found: set[tuple[int | float, ...]] = set()
    left = flat
    while left.shape[1] and len(found) <= _COLOURS:
        colour = left[:, :1]
        found.add(tuple(colour[:, 0].tolist()))
        left = left[:, (left != colour).any(axis=0)]
    return found


def _colour_at(block: np.ndarray, place: np.ndarray) -> str:
    return _text([channel[tuple(place)].item() for channel in block])


def _text(colour: Sequence[Any]) -> str:
    return f"({', '.join(f'{value:g}' for value in colour)})"


def _listed(colours: set[tuple[Any, ...]]) -> str:
    shown = ", ".join(_text(colour) for colour in sorted(colours)[:4])
    if len(colours) > _COLOURS:
        return f"many colours: {shown}, ..."
    return f"{len(colours)} colours: {shown}{', ...' * (len(colours) > 4)}"
