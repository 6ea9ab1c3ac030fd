"""Reads labels and masks that programs saved as RGB, with an alpha channel, or in colours, as one channel.

The meaning of a label must not depend on how its values are stored. The functions return a view of the stored volume
with a `remark` that describes the recognised form. The view checks every region that it reads, since recognition
examines only a sample.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from volumen.data.formats.integral import IntegralVolume
from volumen.data.formats.label_view import InvertedLabel, LabelView, NoNanMask, RegionLabel
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Region, SingleLevelError, Volume
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

IGNORE_KEYS = ("ignore_label", "ignore_index", "ignore_value")
_BLOCKS = 16
"""Number of blocks of up to 4 million values that are examined."""
_COLOURS = 8
"""Largest number of different colours that are listed."""


@dataclass(frozen=True)
class LabelRule:
    """How the labels of a target are stored, according to the settings.

    Args:
        setting: name of the target's entry in the settings, for messages; "" for a mask.
        separate: each channel is a separate target, whatever its values.
        channels: channels of the head, or None.
        invert: whether 0 is the foreground.
        unknown: label value as which NaN is read, or None.
        regions: label values of each overlapping region that is learned of a label map; empty for none.
    """

    setting: str = ""
    separate: bool = False
    channels: int | None = None
    invert: bool = False
    unknown: int | None = None
    regions: tuple[tuple[int, ...], ...] = ()


def region_representatives(regions: Sequence[Sequence[int]]) -> list[int]:
    """Return a label value for each region that stands for it: the first that no later region has, else its first.

    Args:
        regions: label values of each, outer regions before inner ones.
    """
    return [
        next((value for value in own if not any(value in later for later in regions[n + 1 :])), own[0])
        for n, own in enumerate(regions)
    ]


def label_rule(name: str, entry: Mapping[str, Any]) -> LabelRule:
    """Return the rule of a target's entry, either of an experiment or of a trained model's snapshot."""
    return LabelRule(
        f"targets.{name}",
        separate=entry.get("kind") == "multilabel" and not entry.get("regions"),
        channels=entry.get("out_channels"),
        regions=tuple(tuple(values) for values in (entry.get("regions") or {}).values()),
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
    """Open a label or a mask; a volume without resolution levels is accepted, as it may match the image's level.

    Args:
        path, axes, level, ndim: see `open_volume`.
        rule: how the settings describe its storage; None for a mask.

    Raises:
        VolumenError: as `open_volume` and `as_label`.
    """
    try:
        volume = open_volume(path, axes=axes, level=level, ndim=ndim, labels=True)
    except SingleLevelError:
        volume = open_volume(path, axes=axes, ndim=ndim, labels=True)
    return as_label(volume, rule or LabelRule())


def open_mask_file(path: Any, *, ndim: int | None = None) -> Volume:
    """Open a mask of one channel and log the form that was recognised; voxels that are not 0 are inside the mask.

    Raises:
        VolumenError: as `open_volume`, or the channels of the mask differ.
    """
    mask = one_channel(open_volume(path, ndim=ndim, labels=True), LabelRule())
    if mask.channels != 1:
        raise VolumenError(
            path, expected="a mask of 1 channel", found=f"{mask.channels}", remedy="save it as grey"
        )
    mask = _with_file_remark(mask, LabelRule())
    if remark := getattr(mask, "remark", ""):
        logger.warning("%s: %s", path, remark)
    return NoNanMask(mask) if np.dtype(mask.dtype).kind == "f" else mask


def as_label(volume: Volume, rule: LabelRule) -> Volume:
    """Return a volume of integers with one channel per target of the label.

    Args:
        volume: the stored volume.
        rule: how the settings describe its storage.

    Raises:
        VolumenError: it has colours, or an alpha channel that is not constant, and no setting states their meaning.
    """
    found = volume
    if volume.channels > 1 and not rule.separate:
        found = one_channel(volume, rule)
    if np.dtype(found.dtype).kind not in "ui":
        found = IntegralVolume(found, unknown=rule.unknown, setting=rule.setting)
    found = InvertedLabel(found, rule.unknown) if rule.invert else _with_file_remark(found, rule)
    return RegionLabel(found, rule.regions, rule.unknown) if rule.regions else found


def _with_file_remark(volume: Volume, rule: LabelRule) -> Volume:
    """Add a remark if the file states that its values have an inverted meaning."""
    if getattr(volume, "samples", None) != "min-is-white":
        return volume
    setting = f"; {rule.setting}.invert: true reads it as foreground" if rule.setting else ""
    text = f"stored as min-is-white: 0, which programs show white, is read as background{setting}"
    return LabelView(volume, volume.channels, text)


class _ChannelRule(NamedTuple):
    """Values that another channel must have: those of the chosen channel (None), or this value where it is not 0."""

    channel: int
    value: int | float | None


class ChannelLabel(LabelView):
    """One channel of a label whose other channels contain no further information.

    Args:
        volume: the stored volume.
        channel: index of the channel.
        follows: the values that the other colour channels must have.
        constant: by channel, the value that a channel must have everywhere.
        remark: description of the recognised form.
        rule: for the error if the channels do differ.
    """

    def __init__(
        self,
        volume: Volume,
        channel: int,
        follows: Sequence[_ChannelRule],
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


class _ValueSummary(NamedTuple):
    """Summary of the values in a sample of a volume.

    Attributes:
        colours: distinct tuples of values over all channels, at most `_COLOURS` + 1.
        low, high: smallest and largest value per channel.
        two_valued: per channel, whether it has at most 0 and one other value.
    """

    colours: set[tuple[int | float, ...]]
    low: list[Any]
    high: list[Any]
    two_valued: list[bool]


def one_channel(volume: Volume, rule: LabelRule) -> Volume:
    """Return the channel that contains all information, or the volume if its channels are separate targets."""
    samples, channels = getattr(volume, "samples", None), volume.channels
    if channels not in (2, 3, 4) or (channels == 2 and samples != "grey+alpha"):
        return volume
    seen = _summarize(volume)
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
        follows = [_ChannelRule(channel, None) for channel in colour_channels[1:]]
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
    follows = [_ChannelRule(other, value) for other, value in enumerate(colour) if other != channel]
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


def _is_opaque(volume: Volume, seen: _ValueSummary) -> bool:
    """Return whether the last of four unnamed channels is an alpha channel: the type's largest value everywhere."""
    dtype = np.dtype(volume.dtype)
    if volume.channels != 4 or getattr(volume, "samples", None) is not None or dtype.kind != "u":
        return False
    return bool(seen.low[-1] == seen.high[-1] == np.iinfo(dtype).max)


def _summarize(volume: Volume) -> _ValueSummary:
    """Summarise the values in blocks spread over a volume."""
    from volumen.data.index.label_values import stored_regions

    regions, absent = stored_regions(volume)
    channels = volume.channels
    # Blocks that are not stored have the fill value in every channel.
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
    return _ValueSummary(colours, low, high, [len(found) <= 2 for found in values])


def _colours_of(flat: np.ndarray) -> set[tuple[int | float, ...]]:
    """Return the distinct columns of (channels, voxels): all, or nine if there are more than eight."""
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
