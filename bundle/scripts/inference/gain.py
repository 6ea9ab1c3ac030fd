"""Measures the cost and gain of test-time augmentation: time on the first windows, Dice if the dataset has labels.

The first pass of an augmentation is the unaugmented prediction. It is blended beside the augmented one, and both are
compared with the labels block by block. So both Dice scores are those of whole volumes and need no more forward passes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.validity import known_voxels
from volumen.inference.output.stored import OutputSpec
from volumen.inference.windows.heads import Head
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The truth of a target for one image.

    Args:
        label: the label volume.
        mask: voxels above 0 are compared; None: all voxels.
        ignore: label value that means unknown, or None.
    """

    label: Volume
    mask: Volume | None = None
    ignore: int | None = None


def find_labels(image: str, heads: Sequence[Head], config: Mapping[str, Any]) -> dict[str, Labels]:
    """Return the labels of an image in the `images` folder of a dataset, by target; empty for other images.

    Args:
        image: path of the image.
        heads: outputs; labels are searched for those that are probabilities.
        config: the checkpoint's snapshot, which states the ignored values.
    """
    from volumen.data.formats.opening import open_volume
    from volumen.data.labels.label_channels import label_rule, open_label
    from volumen.data.layout import discover

    folder = next((parent for parent in Path(image).parents if parent.name == "images"), None)
    if "://" in image or folder is None or not (folder.parent / "labels").is_dir():
        return {}
    targets = config.get("dataset_config", {}).get("targets", {})
    found = {}
    try:
        cases = discover(folder.parent, allow_unlabeled=True).cases
        case = next(case for case in cases if Path(case.image) in (Path(image), *Path(image).parents))
        for head in heads:
            settings = targets.get(head.name, {})
            if not head.is_probability or head.name not in case.labels or settings.get("instances"):
                continue
            volume = open_volume(image)
            rule = label_rule(head.name, settings)
            label = _laid(open_label(case.labels[head.name], ndim=len(volume.shape), rule=rule), volume)
            path = case.masks.get(head.name)
            mask = _laid(open_label(path, ndim=len(volume.shape)), volume) if path else None
            found[head.name] = Labels(label, mask, rule.unknown)
    except (VolumenError, StopIteration, OSError) as error:
        logger.debug("%s: no gain is measured: %s", image, error)
        return {}
    return found


def _laid(volume: Volume, image: Volume) -> Volume:
    """Return a label or mask in the place and axis order of its image."""
    from volumen.data.placement import aligned_to_grid

    return aligned_to_grid(volume, image.geometry, image.shape, image.source)


class GainMeter:
    """Overlaps of plain and augmented labels with the truth, added up over blocks; safe to use from many threads.

    Args:
        labels: truth by target.
        stored: the outputs, with their thresholds.
        origin: first voxel of the output in the volume, per axis.
    """

    def __init__(
        self, labels: Mapping[str, Labels], stored: Sequence[OutputSpec], origin: tuple[int, ...]
    ) -> None:
        self._labels, self._origin = labels, origin
        self._stored = {
            # Regions are compared channel by channel, before they make one label map.
            item.head.name: replace(item, kind="labels", head=replace(item.head, values=()))
            for item in stored
            if item.head.name in labels
        }
        self._lock = threading.Lock()
        self.overlaps: dict[str, np.ndarray] = {}
        """Per target, voxels in both and the sum of voxels in each: int64 (plain or augmented, class, 2)."""

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def add(self, name: str, box: tuple[slice, ...], plain: np.ndarray, augmented: np.ndarray) -> None:
        """Compare a block of a target.

        Args:
            name: the target.
            box: the block's place in the output.
            plain, augmented: probabilities (channels, *block).
        """
        stored, truth = self._stored[name], self._labels[name]
        region = tuple(
            slice(part.start + low, part.stop + low)
            for part, low in zip(box, self._origin, strict=True)
        )  # fmt: skip
        label = truth.label.read(region)
        mask = None if truth.mask is None else truth.mask.read(region)
        found = known_voxels(label, mask, truth.ignore)
        valid = np.ones(label.shape[1:], bool) if found is None else found
        expected = _classes(label, stored.head)
        counts = [
            [
                [int((one & other & valid).sum()), int((one & valid).sum()) + int((other & valid).sum())]
                for one, other in zip(_classes(stored.convert(result), stored.head), expected, strict=True)
            ]
            for result in (plain, augmented)
        ]
        with self._lock:
            self.overlaps[name] = self.overlaps.get(name, 0) + np.array(counts, dtype=np.int64)


def _classes(labels: np.ndarray, head: Head) -> list[np.ndarray]:
    """Return one bool array per foreground class, True in its voxels."""
    if head.activation == "softmax":
        return [labels[0] == number for number in range(1, head.channels)]
    return [channel > 0 for channel in labels]


def add_overlaps(total: dict[str, np.ndarray], more: Mapping[str, np.ndarray]) -> None:
    """Add counts of `GainMeter` in place."""
    for name, counts in more.items():
        total[name] = total[name] + counts if name in total else counts


def dice(overlaps: np.ndarray) -> tuple[float, float]:
    """Return the mean Dice over classes without and with augmentation; NaN if no class occurs in truth or result."""
    both, sizes = overlaps[..., 0], overlaps[..., 1].astype(float)
    with np.errstate(invalid="ignore"):
        scores = np.where(sizes > 0, 2 * both / sizes, np.nan)
    defined = ~np.isnan(scores).any(axis=0)
    plain, augmented = scores[:, defined].mean(axis=1) if defined.any() else (np.nan, np.nan)
    return float(plain), float(augmented)


@dataclass(frozen=True)
class AugmentationReport:
    """Cost and gain of an augmentation for one volume.

    Args:
        mode: "mirror" or "rotate".
        passes: forward passes per window.
        factor: time of all passes of a window divided by the time of one pass; None if not measured.
        dice: Dice without and with augmentation by target; empty if the volume has no labels.
    """

    mode: str
    passes: int
    factor: float | None
    dice: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        cost = f"test-time augmentation {self.mode}: {self.passes} forward passes a window"
        if self.factor is not None:
            cost += f", {self.factor:.1f} times the time"
        gains = [
            f"Dice of {name} {plain:.4f} without, {augmented:.4f} with"
            for name, (plain, augmented) in self.dice.items()
        ]
        return f"{cost}; {', '.join(gains) or 'gain unknown, the image has no labels in a dataset'}"
