"""What an evaluation compares and what it finds: plain values, and the reading of one case piece by piece."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.validity import (
    binary_truth,
    class_truth,
    known_voxels,
    labelled_voxels,
    refuse_negative,
    without_ignored,
)
from volumen.inference.postprocess.blocks import block_box, block_counts
from volumen.metrics.units import length_unit, short_unit
from volumen.utils.terminal.text import counted

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.evaluation.derived_truth import DerivedTruth
    from volumen.evaluation.diagnosis import Diagnosis
    from volumen.metrics.objects.numbering import ObjectNumbers

logger = logging.getLogger(__name__)

Details = dict[str, Any]
"""What stands behind the scores of a class of a case, as JSON has it."""
PIECE_VOXELS = 1 << 24
"""A larger case is read block by block for what adds up over voxels."""


DERIVED_SIDE = 128
"""Large cases, derived targets and instances are scored in blocks of this many voxels an axis."""


@dataclass(frozen=True)
class Scale:
    """What turns voxels into lengths.

    Args:
        spacing: voxel size per axis; None where it is not known.
        unit: of the voxel size as it is written behind a number, "" where it is not known.
    """

    spacing: tuple[float, ...] | None = None
    unit: str = ""

    def lengths(self, voxel: Sequence[int] | None) -> list[str]:
        """Return a place as lengths from the label's first voxel (z, y, x); empty where a size is not known."""
        if voxel is None or self.spacing is None:
            return ["", "", ""]
        sizes = [f"{at * side:.6g}" for at, side in zip(voxel, self.spacing, strict=True)]
        return [""] * (3 - len(sizes)) + sizes


@dataclass(frozen=True)
class ScoredCase:
    """A prediction with its label.

    Args:
        name: the image's name.
        target: the target's name.
        kind: binary, multiclass or multilabel; distance, vector, axis, tensor or field; instances.
        prediction: probabilities or labels.
        label: the truth.
        mask: scored where above 0, or None.
        region: place of the prediction in the label, per axis.
        channels: channels of the head.
        scale: what stored values are divided by to be probabilities; 0 for labels.
        ignore: label value that means unknown, or None.
        image: path of the image, or None.
        classes: names of the classes, or None.
        source: the labelled target that a derived one is made from; None where the target itself is labelled.
        labelled_only: only voxels with a label above 0 count, as in a training with `compute_loss_on_labeled_only`.
        truth: makes the truth of a derived target from the label; None where the label itself is it.
        spacing: voxel size in `unit`, which is the same for all cases; None where no file states it.
        unit: unit of the spacing, or None.
        size_is_given: whether the user gave the voxel size, so that units of the files do not belong to it.
        model: file name and epoch of the model that predicted, or None.
    """

    name: str
    target: str
    kind: str
    prediction: Volume
    label: Volume
    mask: Volume | None
    region: tuple[slice, ...]
    channels: int
    scale: float
    ignore: int | None = None
    image: str | None = None
    classes: tuple[str, ...] | None = None
    source: str | None = None
    labelled_only: bool = False
    truth: DerivedTruth | None = None
    spacing: tuple[float, ...] | None = None
    unit: str | None = None
    model: str | None = None
    size_is_given: bool = False

    @property
    def stated_unit(self) -> str | None:
        """Unit of the spacing, else of the files; None where the user gave the spacing, or no file states one."""
        if self.size_is_given:
            return self.unit
        return self.unit or self.prediction.unit or self.label.unit

    @property
    def as_target(self) -> dict[str, Any]:
        """What shapes the metrics of its target, see `build_metrics`."""
        return {
            "kind": self.kind,
            "out_channels": self.channels,
            "classes": self.classes,
            "source_target": self.source,
        }

    @property
    def scale_of_voxels(self) -> Scale:
        """What turns voxels of the label into lengths."""
        unit = length_unit(self.stated_unit, self.spacing)
        return Scale(self.spacing if unit else None, short_unit(unit) if unit else "")

    def pieces(self) -> Iterator[tuple[slice, ...]]:
        """Yield boxes of the prediction that fit in memory."""
        shape = self.prediction.shape
        large = math.prod(shape) > PIECE_VOXELS
        if self.truth is not None or self.kind == "instances" or large:
            block = (DERIVED_SIDE if len(shape) == 3 else 8 * DERIVED_SIDE,) * len(shape)
            for number in range(math.prod(block_counts(shape, block))):
                yield block_box(number, shape, block)
            return
        yield tuple(slice(0, n) for n in shape)

    def read(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return prediction (C, *box), truth (Ct, *box) and known voxels, bool (*box)."""
        found = self.prediction.read(box)
        if self.scale:
            found = found.astype(np.float32) / self.scale
        return (found, *self.read_truth(box))

    def read_truth(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return truth (Ct, *box) and known voxels, bool (*box), without reading the prediction."""
        there = self.place_of(box)
        if self.truth is not None:
            truth, known = self.truth.read(there, self.label, self.mask, self.ignore)
        else:
            truth, known = self._label(there)
        if self.labelled_only:
            known = labelled_voxels(without_ignored(self.label.read(there), self.ignore), known)
        return truth, known

    def place_of(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return a box of the prediction as one of the label's volume."""
        return tuple(
            slice(b.start + r.start, b.stop + r.start) for b, r in zip(box, self.region, strict=True)
        )

    def _label(self, there: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the label (Ct, *there) as training reads it, and where it is known, bool (*there)."""
        label = self.label.read(there)
        mask = None if self.mask is None else self.mask.read(there)
        trusted = known_voxels(label, mask, self.ignore)
        known = np.ones(label.shape[1:], bool) if trusted is None else trusted
        label = without_ignored(label, self.ignore)
        place, remedy = self.label.path, "give the value that means unknown as --ignore-label"
        if self.kind in ("binary", "multilabel"):
            return binary_truth(label, known, self.target, place, remedy=remedy), known
        if self.kind == "multiclass":
            remedy += f", or --instances {self.target} where the values number objects"
            return class_truth(label, known, self.target, self.channels, place, remedy=remedy), known
        refuse_negative(label, known, self.target, place, remedy=remedy)
        return label, known


@dataclass(frozen=True)
class Evaluation:
    """Scores.

    Args:
        mean: metric to its mean over cases.
        interval: metric to its 95 % bootstrap interval over cases, None below two cases.
        cases: case to metric to value; NaN where undefined.
        scored: what was compared.
        settings: what shapes the scores.
        unpredicted: names of labels of the scored targets that have no prediction; they enter no mean.
        unlabelled: names of predictions that have no label.
        details: case to target to class to counts and places of errors.
        seconds: part of the scoring to its CPU seconds.
        seen: "<case>_<target>" to how many of its pieces have a known voxel, and how many of them hold foreground of
            prediction or truth.
        numbers: case to target to class to the numbers of the objects that the details name.
        histograms: target to class to case to counts of probabilities, see `probability_counts`; only of targets with
            probabilities.
        diagnosis: errors by the geometry around them, and suspect labels; None where they were not asked for.
    """

    mean: dict[str, float]
    interval: dict[str, tuple[float, float] | None]
    cases: dict[str, dict[str, float]]
    scored: tuple[ScoredCase, ...] = field(repr=False)
    settings: dict[str, Any]
    unpredicted: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    details: dict[str, dict[str, dict[str, Details]]] = field(default_factory=dict, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    numbers: dict[str, dict[str, dict[str, ObjectNumbers]]] = field(default_factory=dict, repr=False)
    histograms: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict, repr=False)
    diagnosis: Diagnosis | None = field(default=None, repr=False)

    @property
    def coverage(self) -> str:
        """How many of the labelled cases were scored: "2 of 3 cases", or "3 cases" where none is missing."""
        targets = {case.source or case.target for case in self.scored}
        images = {image_of(name, targets) for name in self.unpredicted} | set(self.cases)
        every = counted(len(images), "case")
        return every if len(images) == len(self.cases) else f"{len(self.cases)} of {every}"


def image_of(label: str, targets: Collection[str]) -> str | None:
    """Return the image that a label `<image>_<target>` is of; None where it is of none of the targets."""
    named = [target for target in targets if label.endswith(f"_{target}") and label != f"_{target}"]
    return label.removesuffix(f"_{max(named, key=len)}") if named else None
