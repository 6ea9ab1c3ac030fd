"""What is suggested for: the labelled targets of a network, their classes, and how their labels are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.labels.label_channels import LabelRule, label_rule
from volumen.inference.predict import class_names
from volumen.inference.windows.heads import PROBABILITIES, Head
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.inference.predictor import Predictor

FULL = 255
"""The stored value of probability 1."""


@dataclass(frozen=True)
class LabelForm:
    """How the label of a target is stored and painted.

    Args:
        name: the target.
        values: values that the label may have, the ignored one included.
        channels: channels of the label.
        separate: each channel is a class of its own.
        ignore: label value that means unknown, or None.
    """

    name: str
    values: tuple[int, ...]
    channels: int = 1
    separate: bool = False
    ignore: int | None = None

    @property
    def rule(self) -> LabelRule:
        """How a file is read: as the annotator sees it, so regions are values of one label map."""
        return LabelRule(f"targets.{self.name}", separate=self.separate, unknown=self.ignore)


@dataclass(frozen=True)
class Subject:
    """A labelled target of a network.

    Args:
        head: output of the network, probabilities.
        classes: names of the foreground classes; a class is a channel of the head, without a softmax's background.
        ignore: label value that means unknown, or None.
    """

    head: Head
    classes: tuple[str, ...]
    ignore: int | None = None

    @property
    def name(self) -> str:
        """Name of the target."""
        return self.head.name

    @property
    def first(self) -> int:
        """Channel of the first foreground class."""
        return int(self.head.activation == "softmax")

    @property
    def form(self) -> LabelForm:
        """How its label is stored and painted."""
        own: Sequence[int] = (0, 1)
        if self.head.values:
            own = (0, *self.head.values)
        elif self.head.activation == "softmax":
            own = range(self.head.channels)
        values = tuple(sorted({*own, *(() if self.ignore is None else (self.ignore,))}))
        separate = self.head.kind == "multilabel" and not self.head.values
        return LabelForm(self.name, values, self.head.channels if separate else 1, separate, self.ignore)

    def decide(self, stored: np.ndarray) -> np.ndarray:
        """Return the label (channels, *space) uint8 that a prediction stands for.

        Args:
            stored: probabilities (channels of the head, *space), 255 is 1.
        """
        if self.head.activation == "softmax":
            return np.asarray(stored.argmax(axis=0)[None], np.uint8)
        found = stored >= (FULL + 1) // 2
        if not self.head.values:
            return found.astype(np.uint8)
        label = np.zeros((1, *stored.shape[1:]), np.uint8)
        for channel, value in zip(found, self.head.values, strict=True):
            label[0][channel] = value
        return label


def find_subjects(predictor: Predictor, names: Sequence[str] | None) -> tuple[Subject, ...]:
    """Return the targets to suggest for.

    Args:
        predictor: the network; its checkpoint records how labels are stored.
        names: their names; None: all labelled targets that are probabilities, without instances.

    Raises:
        VolumenError: no such target, one without probabilities, or one whose labels number instances.
    """
    tasks = predictor.config.get("auxiliary_tasks") or {}
    entries: Mapping[str, Any] = (predictor.config.get("dataset_config") or {}).get("targets") or {}
    labelled = {head.name: head for head in predictor.heads() if head.name not in tasks}
    usable = {name: head for name, head in labelled.items() if not _unusable(head, entries.get(name, {}))}
    if not names and not usable:
        why = "; ".join(
            f"{name}: {_unusable(head, entries.get(name, {}))}" for name, head in labelled.items()
        )
        raise VolumenError(predictor.path, expected="a labelled target of probabilities", found=why or "none")
    for name in names or ():
        if name not in usable:
            head = labelled.get(name)
            why = (
                "no labelled target of the network"
                if head is None
                else _unusable(head, entries.get(name, {}))
            )
            raise VolumenError(
                "--target", expected=f"among {', '.join(usable) or 'none'}", found=f"{name}, {why}"
            )
    named = class_names(predictor.config)
    return tuple(
        Subject(
            usable[name],
            _classes(usable[name], named.get(name)),
            label_rule(name, entries.get(name, {})).unknown,
        )
        for name in (names or usable)
    )


def _unusable(head: Head, entry: Mapping[str, Any]) -> str:
    """Return why boxes of a target cannot be suggested; empty if they can."""
    if head.kind not in PROBABILITIES:
        return f"{head.kind}, no probabilities"
    if entry.get("instances"):
        return "whose labels number instances, which boxes cannot continue"
    return "whose labels are inverted" if entry.get("invert") else ""


def _classes(head: Head, names: Sequence[str] | None) -> tuple[str, ...]:
    first = int(head.activation == "softmax")
    count = head.channels - first
    given = tuple(names or ())
    if len(given) == head.channels:
        given = given[first:]
    if len(given) == count:
        return given
    return (head.name,) if count == 1 else tuple(str(number) for number in range(1, count + 1))
