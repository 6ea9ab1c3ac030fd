"""What `volumen select` compares: runs and ensembles of them, each predicting only what it has not been trained on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.inference.ensemble import find_members, join
from volumen.inference.predictor import Predictor, load_predictor
from volumen.tuning.held_out import split_of
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    import torch

    from volumen.data.sampling.split import Split
    from volumen.utils.boxes import Box


@dataclass(frozen=True)
class Member:
    """A network of a run, and what it was trained on.

    Args:
        checkpoint: its file.
        split: of its run.
        predictor: the network.
        fusion: the rules by which it reads labels from several heads; None: it has none.
    """

    checkpoint: Path
    split: Split
    predictor: Predictor
    fusion: Mapping[str, Any] | None = None

    def reading(self, fused: bool | None) -> Predictor:
        """Return the network after it was set to read its labels from several heads, or each from its own alone.

        Args:
            fused: by its rules; False: without them; None: as it is.
        """
        if self.fusion is None or fused is None:
            return self.predictor
        network: Any = self.predictor.network
        network.fuse(self.fusion if fused else None)
        return self.predictor if fused else replace(self.predictor, fused={})

    def has_seen(self, name: str, box: Box) -> bool:
        """Whether it was trained on a voxel of a region."""
        return any(
            all(a < d and c < b for (a, b), (c, d) in zip(box, trained, strict=True))
            for trained in self.split.train.get(name, ())
        )

    @property
    def patches(self) -> int:
        """Patches that it was trained on: epochs, steps and batch of its run multiplied."""
        training = self.predictor.config.get("tr_config", {})
        steps = training.get("max_steps_per_epoch") or 0
        return int(training.get("max_epoch") or 0) * int(steps) * int(training.get("batch_size") or 0)


@dataclass(frozen=True)
class Run:
    """A run: one network, or those of its folds.

    Args:
        name: what it is called.
        path: as it was given.
        members: its networks.
    """

    name: str
    path: str
    members: tuple[Member, ...]

    def unseen_by(self, name: str, box: Box) -> tuple[Member, ...]:
        """Return the members that were not trained on a voxel of a region."""
        return tuple(member for member in self.members if not member.has_seen(name, box))


@dataclass(frozen=True)
class Candidate:
    """Runs whose outputs are averaged, and test-time augmentation.

    Args:
        runs: at least one.
        tta: none, mirror or rotate.
        fused: whether labels are read from several heads, by the rules of networks that have some; None: none has.
    """

    runs: tuple[Run, ...]
    tta: str
    fused: bool | None = None

    @property
    def name(self) -> str:
        """What it is called in tables."""
        fused = ", fused heads" if self.fused else ""
        tta = "" if self.tta == "none" else f", tta {self.tta}"
        return " + ".join(run.name for run in self.runs) + fused + tta

    @property
    def members(self) -> tuple[Member, ...]:
        """The networks that predict new images."""
        return tuple(member for run in self.runs for member in run.members)

    def predictor_for(self, name: str, box: Box) -> Predictor:
        """Return the members that have not seen a region, as one network or an ensemble."""
        unseen = [member.reading(self.fused) for run in self.runs for member in run.unseen_by(name, box)]
        return unseen[0] if len(unseen) == 1 else join(unseen)


def load_runs(paths: Sequence[str], device: torch.device) -> tuple[Run, ...]:
    """Load the networks of runs.

    Args:
        paths: checkpoints, or folders of runs; none of them what an earlier selection chose.
        device: where they predict.

    Raises:
        VolumenError: nothing to load, or a run without the file of its split.
    """
    runs = []
    for path, name in zip(paths, _names(paths), strict=True):
        members = tuple(_member(checkpoint, device) for checkpoint, _ in find_members(path, selected=False))
        runs.append(Run(name, path, members))
    first = runs[0].members[0].predictor
    for run in runs:
        for member in run.members:
            if member.predictor is not first:
                join([first, member.predictor])  # refuses what cannot be averaged
                check_one_grid(first, member.predictor)
    return tuple(runs)


def _member(checkpoint: Path, device: torch.device) -> Member:
    predictor = load_predictor(checkpoint, device, fuse=True)
    network: Any = predictor.network
    rules = dict(network.final_config["fusion"]) if predictor.fused else None
    return Member(checkpoint, split_of(checkpoint), predictor, rules)


def check_one_grid(first: Predictor, other: Predictor) -> None:
    """Refuse networks whose splits count other voxels: their regions could not be compared.

    Raises:
        VolumenError: they were trained at different voxel sizes or levels of their volumes.
    """
    grids = [(p.trained_grid, _level(p)) for p in (first, other)]
    if grids[0] != grids[1]:
        expected, found = (
            f"level {level}, "
            + ("no target_spacing" if grid is None else f"target_spacing {grid.geometry.text()}")
            for grid, level in grids
        )
        raise VolumenError(
            other.path,
            expected=f"{expected}, as {first.path}, since regions are in voxels of the training",
            found=found,
            remedy="predict with each and compare them by volumen evaluate -p A -p B",
        )


def _level(predictor: Predictor) -> int:
    return int((predictor.config.get("dataset_config") or {}).get("ome_zarr_resolution") or 0)


def make_candidates(runs: Sequence[Run], ttas: Sequence[str]) -> list[Candidate]:
    """Return every run, every pair, and all of them together, with each augmentation; the plainest first.

    Where networks have rules for fused heads, each is there without and with them.
    """
    sets: list[tuple[Run, ...]] = [(run,) for run in runs]
    if len(runs) > 1:
        sets += list(itertools.combinations(runs, 2))
    if len(runs) > 2:
        sets.append(tuple(runs))
    return [Candidate(chosen, tta, fused) for tta in ttas for chosen in sets for fused in _readings(chosen)]


def _readings(runs: Sequence[Run]) -> tuple[bool | None, ...]:
    has_rules = any(member.fusion is not None for run in runs for member in run.members)
    return (False, True) if has_rules else (None,)


def common_regions(runs: Sequence[Run]) -> list[tuple[str, Box]]:
    """Return the regions that each run can predict by a network that has not seen them.

    Raises:
        VolumenError: there is none.
    """
    every = {
        (name, tuple(box)): None
        for run in runs
        for member in run.members
        for name, boxes in member.split.val.items()
        for box in boxes
    }
    found = [key for key in every if all(run.unseen_by(*key) for run in runs)]
    if not found:
        raise VolumenError(
            " and ".join(run.path for run in runs),
            "have no validation voxel in common, so nothing can be compared",
            remedy="train them with one --split file, or the single run with --split RUN/splits.json --fold 0/K",
        )
    # A region inside of another one would count its voxels twice.
    return [key for key in found if not any(_inside(key, other) for other in found if other != key)]


def _inside(inner: tuple[str, Box], outer: tuple[str, Box]) -> bool:
    return inner[0] == outer[0] and all(
        c <= a and b <= d for (a, b), (c, d) in zip(inner[1], outer[1], strict=True)
    )


def _names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each path: as few of its last parts as tell it from the others.

    Raises:
        VolumenError: the same path twice.
    """
    parts = [Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise VolumenError("RUN", "the same run is given twice", remedy="give each once")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
