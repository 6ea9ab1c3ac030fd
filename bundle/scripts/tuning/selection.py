"""What a selection found: every candidate with its scores, the chosen one first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from volumen.evaluation.cases import Evaluation
    from volumen.evaluation.differences import Difference
    from volumen.tuning.candidates import Candidate, Run
    from volumen.tuning.subject import Subject

AS_LONG = 0.9
"""Share of the training patches of several networks from which one network counts as trained as long as all of them."""


@dataclass(frozen=True)
class Entry:
    """A candidate with its best settings.

    Args:
        candidate: the runs and the augmentation.
        settings: of the label map.
        evaluation: its scores by region.
        difference: to the chosen one, over the same regions; None of the chosen one.
        passes: forward passes per window of a new image.
        patches: training patches of all its networks.
    """

    candidate: Candidate
    settings: dict[str, float]
    evaluation: Evaluation
    difference: Difference | None
    passes: int
    patches: int


@dataclass(frozen=True)
class Selection:
    """What was found.

    Args:
        subject: what was scored.
        regions: number of scored regions.
        entries: all candidates, the chosen one first, then by their score.
        file: what `volumen predict -m` takes.
    """

    subject: Subject
    regions: int
    entries: tuple[Entry, ...]
    file: Path

    @property
    def several(self) -> tuple[Run, ...]:
        """The runs of several networks, such as folds."""
        return tuple(run for run in self._runs if len(run.members) > 1)

    @property
    def as_long(self) -> tuple[Run, ...]:
        """The runs of one network that was trained as long as the largest run of several networks altogether."""
        longest = max((sum(member.patches for member in run.members) for run in self.several), default=0)
        return tuple(
            run
            for run in self._runs
            if self.several and len(run.members) == 1 and run.members[0].patches >= AS_LONG * longest
        )

    @property
    def _runs(self) -> list[Run]:
        return list({run.path: run for entry in self.entries for run in entry.candidate.runs}.values())

    def value(self, entry: Entry) -> float:
        """Return the mean score of a candidate; NaN if it is undefined."""
        return entry.evaluation.mean.get(self.subject.key, math.nan)

    def reason(self) -> str:
        """Return in words why the first entry was chosen."""
        first, *others = self.entries
        key = self.subject.key
        said = f"{first.candidate.name} has the best mean {key}, {self.value(first):.4f}"
        if not others:
            return f"{said}: it is the only candidate."
        second = others[0]
        said += f"; the next is {second.candidate.name} with {self.value(second):.4f}"
        if self.value(second) == self.value(first):
            return f"{said}, which needs {second.passes} forward passes per window instead of {first.passes}."
        interval = second.difference.interval if second.difference is not None else None
        if interval is None:
            return f"{said}. There are too few regions for an interval of the difference."
        clear = interval[0] > 0 or interval[1] < 0
        bounds = f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        return f"{said}, a difference of {bounds} (95 %): " + (
            "the difference is clear." if clear else "the difference may be chance."
        )
