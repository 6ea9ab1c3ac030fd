"""Rules for postprocessing: cleaning of label maps, and instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest


@dataclass(frozen=True)
class CleaningRules:
    """How a label map is cleaned; holes are filled before components are counted.

    Args:
        min_size: components of fewer voxels are removed.
        keep_largest: number of largest components of each class that remain; None: all.
        fill_holes: holes of up to this many voxels are filled; 0: none. A hole is a component of the background that
            does not touch the border of the volume. Only for maps with one class.
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


HEADS = ("boundary", "foreground", "affinities", "distance", "normals", "descriptors")
"""The keys of `InstanceRules` that name heads."""
SHEETS = "sheets"
"""Stands for the foreground, normals and distance of a label, see `resolve_rules`."""
AGGLOMERATIONS = ("auto", "mean", "mutex", "multicut")


@dataclass(frozen=True)
class InstanceRules:
    """The heads from which instances are computed, and the parameters.

    Args:
        boundary: head with the probability of a wall between instances.
        foreground: head with the probability of being inside any instance; None: all voxels are inside, or those with
            a negative distance.
        affinities: head of `affinities`, instead of walls.
        distance: head with the signed distance to the border of the voxel's instance, negative inside.
        normals: head with the unit normals of the instances, outwards: walls stand where they meet.
        descriptors: head of `local_shape_descriptors`: walls stand where the mean offsets part.
        threshold: smallest probability at which a voxel is wall, and foreground.
        merge_threshold: fragments merge while the mean wall probability between them is below this.
        min_size: instances of fewer voxels are removed.
        agglomeration: how fragments merge: "mean", "mutex" or "multicut"; "auto": mutex for affinities with distant
            offsets, else mean.
        block: voxels per axis that are segmented at once; (): chosen automatically. The result does not depend on it.
        halo: distances to walls count up to this, in units of the smallest voxel side.
    """

    boundary: str | None = None
    foreground: str | None = None
    affinities: str | None = None
    distance: str | None = None
    normals: str | None = None
    descriptors: str | None = None
    threshold: float = 0.5
    merge_threshold: float = 0.5
    min_size: int = 0
    block: tuple[int, ...] = ()
    halo: int = 16
    agglomeration: str = "auto"

    def __post_init__(self) -> None:
        others = self.boundary or self.distance or self.normals or self.descriptors
        if not self.sources or (self.affinities and others):
            raise VolumenError(
                "instances",
                expected="boundary=TARGET, foreground=TARGET, distance=TARGET, normals=TARGET, descriptors=TARGET or "
                "several of them, or affinities=TARGET",
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
        if self.agglomeration not in AGGLOMERATIONS:
            raise VolumenError(
                "instances.agglomeration", expected=", ".join(AGGLOMERATIONS), found=self.agglomeration
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The heads that are read."""
        heads = (
            self.foreground, self.affinities, self.boundary, self.distance, self.normals, self.descriptors
        )  # fmt: skip
        return tuple(name for name in heads if name)

    @property
    def name(self) -> str:
        """Name of the array of instances."""
        return f"{self.sources[0]}_instances"

    def plain(self) -> dict[str, Any]:
        """Return the rules as plain values, which `read_rules` can read again."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def read_rules(value: str | Mapping[str, Any] | InstanceRules | None) -> InstanceRules | None:
    """Return the rules that a flag or a setting states.

    Args:
        value: "membrane" (a boundary; `resolve_rules` detects a head of affinities), "key=value,key=value" with the
            keys of `InstanceRules`, block as 128x256x256, or a mapping with the same keys.

    Raises:
        VolumenError: an unknown key, or an impossible value.
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


def resolve_rules(
    rules: InstanceRules, tasks: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str] | None = None
) -> InstanceRules:
    """Return rules that use each head according to its task.

    A boundary that is a head of affinities, distances, normals or descriptors becomes that. For a derived head other
    than affinities, the foreground is the head of its source unless the rules name another one or it has none. The
    boundary "sheets", where no head has this name, becomes the foreground, normals and distance of a label.

    Args:
        rules: the rules that the user gave.
        tasks: the network's derived targets by name.
        kinds: kind of each head by name; None: unknown.

    Raises:
        VolumenError: no label, or several, have heads for sheets.
    """
    name, kinds = rules.boundary or "", kinds or {}
    if name == SHEETS and name not in {*tasks, *kinds}:
        return _of_sheets(rules, tasks)
    task = tasks.get(name, {})
    key = {
        "affinities": "affinities",
        "distance_transform": "distance",
        "surface_normals": "normals",
        "local_shape_descriptors": "descriptors",
    }.get(task.get("type", ""), "distance" if kinds.get(name) == "distance" else "boundary")
    if key == "affinities":
        return replace(rules, boundary=None, affinities=name)
    if key != "boundary":
        named: dict[str, Any] = {"boundary": None, key: name}
        rules = replace(rules, **named)
    source = task.get("source_target")
    if source and rules.foreground is None and kinds.get(source, "binary") == "binary":
        return replace(rules, foreground=source)
    return rules


def _of_sheets(rules: InstanceRules, tasks: Mapping[str, Mapping[str, Any]]) -> InstanceRules:
    """Return the rules of a label with normals, and its distance where a head predicts it."""
    found: dict[str, dict[str, str]] = {}
    for name, task in tasks.items():
        if task.get("head", True) and task.get("type") in ("surface_normals", "distance_transform"):
            found.setdefault(task["source_target"], {})[task["type"]] = name
    usable = {source: heads for source, heads in found.items() if "surface_normals" in heads}
    chosen = [source for source in usable if rules.foreground in (None, source)]
    if len(chosen) != 1:
        raise VolumenError(
            "--instances sheets",
            expected="one label with derived surface_normals and, better, distance_transform",
            found=", ".join(chosen) or "none",
            remedy="train with auxiliary_tasks of these types, or write foreground=TARGET,normals=HEAD,distance=HEAD",
        )
    heads = usable[chosen[0]]
    return replace(
        rules,
        boundary=None,
        foreground=chosen[0],
        normals=heads["surface_normals"],
        distance=heads.get("distance_transform"),
    )


def offsets_of(task: Mapping[str, Any], ndim: int) -> tuple[tuple[int, ...], ...]:
    """Return the offsets of an affinities task; by default those of the previous voxel on each axis."""
    given = task.get("offsets") or [[-int(a == b) for b in range(ndim)] for a in range(ndim)]
    return tuple(tuple(int(step) for step in offset) for offset in given)


def _split(text: str) -> dict[str, Any]:
    parts = [part for part in text.replace(" ", "").split(",") if part]
    if len(parts) == 1 and "=" not in parts[0]:
        return {"boundary": parts[0]}
    pairs = [part.partition("=") for part in parts]
    return {key: value for key, _, value in pairs}


def _typed(key: str, value: Any) -> Any:
    if key in (*HEADS, "agglomeration"):
        return None if value is None else str(value)
    if key == "block":
        return tuple(int(side) for side in (value.split("x") if isinstance(value, str) else value or ()))
    if isinstance(value, bool):
        raise ValueError(key)
    return float(value) if key.endswith("threshold") else int(value)
