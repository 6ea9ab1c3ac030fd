"""What is done to predictions besides storing them: cleaning of label maps, and instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest


@dataclass(frozen=True)
class CleaningRules:
    """What is done to a label map; holes are filled before components are counted.

    Args:
        min_size: components of fewer voxels are removed.
        keep_largest: components kept of each class, the largest ones; None for all.
        fill_holes: background that the border of the volume cannot be reached from is filled, up to this
            many voxels a hole; 0 for none. Only where there is one class.
    """

    min_size: int = 0
    keep_largest: int | None = None
    fill_holes: int = 0

    def __post_init__(self) -> None:
        if (
            self.min_size < 0
            or self.fill_holes < 0
            or (self.keep_largest is not None and self.keep_largest < 1)
        ):
            raise VolumenError(
                "postprocess",
                expected="min_size and fill_holes of at least 0, keep_largest of at least 1",
                found=f"{self.min_size}, {self.fill_holes}, {self.keep_largest}",
            )

    @property
    def does_nothing(self) -> bool:
        return not (self.min_size or self.keep_largest or self.fill_holes)


@dataclass(frozen=True)
class InstanceRules:
    """What instances are made from, and how.

    Args:
        boundary: head that gives the probability of a wall between instances.
        foreground: head that gives the probability of being inside any instance; None: everything is.
        affinities: head of `affinities`, instead of `boundary`.
        threshold: probability from which on a voxel is wall, and foreground.
        merge_threshold: fragments merge while the mean wall probability between them is below this.
        min_size: instances of fewer voxels are removed.
        block: voxels per axis that are segmented at once; () chooses.
        halo: context around a block, in smallest voxels.
    """

    boundary: str | None = None
    foreground: str | None = None
    affinities: str | None = None
    threshold: float = 0.5
    merge_threshold: float = 0.5
    min_size: int = 0
    block: tuple[int, ...] = ()
    halo: int = 32

    def __post_init__(self) -> None:
        if not self.sources or (self.affinities and self.boundary):
            raise VolumenError(
                "instances",
                expected="boundary=TARGET, foreground=TARGET or both, or affinities=TARGET",
                found=", ".join(f"{key}={value}" for key, value in self.plain().items() if value),
            )
        for name in ("threshold", "merge_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise VolumenError(
                    f"instances.{name}", expected="a probability between 0 and 1", found=getattr(self, name)
                )
        if self.min_size < 0 or self.halo < 1 or any(side < 1 for side in self.block):
            raise VolumenError(
                "instances", expected="min_size of at least 0, halo and block of at least 1",
                found=f"{self.min_size}, {self.halo}, {self.block}",
            )  # fmt: skip

    @property
    def sources(self) -> tuple[str, ...]:
        """The heads that are read."""
        return tuple(name for name in (self.foreground, self.affinities, self.boundary) if name)

    @property
    def name(self) -> str:
        """What the array of instances is called."""
        return f"{self.sources[0]}_instances"

    def plain(self) -> dict[str, Any]:
        """Return the rules as plain values, from which `read_rules` makes them again."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def read_rules(value: str | Mapping[str, Any] | InstanceRules | None) -> InstanceRules | None:
    """Return the rules that a flag or a setting says.

    Args:
        value: "membrane" (a boundary; `settle_rules` sees to a head of affinities), "key=value,key=value" with the
            keys of `InstanceRules`, block as 128x256x256, or a mapping with the same keys.

    Raises:
        VolumenError: an unknown key, or a value that cannot be.
    """
    if value is None or isinstance(value, InstanceRules):
        return value
    given = dict(value) if isinstance(value, Mapping) else _split(value)
    known = {item.name: item for item in fields(InstanceRules)}
    for key, content in given.items():
        if key not in known:
            raise VolumenError(
                f"instances.{key}", "unknown key",
                remedy=closest(key, known) or f"known keys: {', '.join(known)}",
            )  # fmt: skip
        try:
            given[key] = _typed(key, content)
        except (TypeError, ValueError):
            raise VolumenError(
                f"instances.{key}", expected=f"a value like {known[key].default!r}", found=repr(content)
            ) from None
    return InstanceRules(**given) if given else None


def settle_rules(rules: InstanceRules, tasks: Mapping[str, Mapping[str, Any]]) -> InstanceRules:
    """Return rules that read each head as what it is.

    A boundary that is a head of affinities is read as such; a head of task `boundary` has its source's head as
    the foreground unless another one is named.

    Args:
        rules: what was asked for.
        tasks: the network's auxiliary tasks by name.
    """
    task = tasks.get(rules.boundary or "", {})
    if task.get("type") == "affinities":
        return replace(rules, boundary=None, affinities=rules.boundary)
    if task.get("type") == "boundary" and rules.foreground is None:
        return replace(rules, foreground=task["source_target"])
    return rules


def offsets_of(task: Mapping[str, Any], ndim: int) -> tuple[tuple[int, ...], ...]:
    """Return the offsets of an affinities task, those of the previous voxels where it names none."""
    given = task.get("offsets") or [[-int(a == b) for b in range(ndim)] for a in range(ndim)]
    return tuple(tuple(int(step) for step in offset) for offset in given)


def _split(text: str) -> dict[str, Any]:
    parts = [part for part in text.replace(" ", "").split(",") if part]
    if len(parts) == 1 and "=" not in parts[0]:
        return {"boundary": parts[0]}
    pairs = [part.partition("=") for part in parts]
    return {key: value for key, _, value in pairs}


def _typed(key: str, value: Any) -> Any:
    if key in ("boundary", "foreground", "affinities"):
        return None if value is None else str(value)
    if key == "block":
        return tuple(int(side) for side in (value.split("x") if isinstance(value, str) else value or ()))
    if isinstance(value, bool):
        raise ValueError(key)
    return float(value) if key.endswith("threshold") else int(value)
