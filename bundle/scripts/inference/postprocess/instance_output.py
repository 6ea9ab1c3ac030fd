"""Computes the array of instances of a prediction from its heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.inference.arrays import final_arrays, local_arrays
from volumen.inference.postprocess.blocks import Region, aligned_block
from volumen.inference.postprocess.graph.sources import Source, is_step
from volumen.inference.postprocess.graph.volume import VolumeGraph
from volumen.inference.postprocess.passes import CancellationCheck, Run
from volumen.inference.rules import HEADS, InstanceRules, offsets_of, resolve_rules
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.volume_work import VolumeWork
    from volumen.inference.windows.heads import Head

BLOCK_VOXELS = 1 << 23
"""Voxels of a chosen block without its halo; a thread needs about 30 bytes for each voxel of both, and the heads."""


def resolve_request(request: PredictRequest, predictor: Predictor) -> PredictRequest:
    """Return the request with instance rules that match the network's heads.

    Raises:
        VolumenError: a head is missing, not predicted or no probability, or the package is not installed.
    """
    if request.instances is None:
        return request
    rules = resolve_rules(
        request.instances, predictor.config.get("auxiliary_tasks") or {}, head_kinds(predictor)
    )
    heads = {head.name: head for head in predictor.heads(request.targets)}
    for key in HEADS:
        name = getattr(rules, key)
        if name is not None and (name not in heads or not _can_be(heads[name], key)):
            usable = [head.name for head in heads.values() if _can_be(head, key)]
            raise VolumenError(
                "--instances",
                expected=f"{_kind(key)}: {', '.join(usable) or 'there is none'}",
                found=name,
                remedy="name one, or add it to --targets",
            )
    if rules.block and len(rules.block) != len(predictor.patch_size):
        raise VolumenError(
            "instances.block", expected=f"{len(predictor.patch_size)} numbers", found=rules.block
        )
    if rules.affinities is not None:
        _check_offsets(rules.affinities, predictor)
    if importlib.util.find_spec("bioimage_cpp") is None:
        raise VolumenError(
            "--instances", "bioimage-cpp is not installed", remedy='pip install "volumen[instances]"'
        )
    return replace(request, instances=rules)


def head_kinds(predictor: Predictor) -> dict[str, str]:
    """Return the kind of each head; "boundary" for one that learned borders of instances, which is no foreground."""
    targets = (predictor.config.get("dataset_config") or {}).get("targets") or {}
    borders = {name for name, target in targets.items() if (target or {}).get("instances") == "boundary"}
    return {head.name: "boundary" if head.name in borders else head.kind for head in predictor.heads()}


def _can_be(head: Head, key: str) -> bool:
    """Whether the rules can use a head under a key of `HEADS`."""
    if key in ("boundary", "foreground", "affinities"):
        return head.activation == "sigmoid"
    return head.kind == {"distance": "distance", "normals": "vector", "descriptors": "field"}[key]


def _kind(key: str) -> str:
    """Return what heads a key of `HEADS` names, in words."""
    words = {"distance": "a distance", "normals": "normals", "descriptors": "shape descriptors"}
    return f"predicted targets with {words.get(key, 'a sigmoid')}"


def _check_offsets(name: str, predictor: Predictor) -> None:
    """Check that affinities tell apart neighbours along every axis.

    Raises:
        VolumenError: they do not.
    """
    task = (predictor.config.get("auxiliary_tasks") or {}).get(name, {})
    ndim = len(predictor.patch_size)
    offsets = offsets_of(task, ndim)
    along = {axis for offset in offsets if is_step(offset) for axis, step in enumerate(offset) if step}
    if len(along) < ndim:
        raise VolumenError(
            f"auxiliary_tasks.{name}.offsets",
            expected="an offset of one voxel along every axis, for instances",
            found=[list(offset) for offset in offsets],
            remedy="train with these offsets too, or take instances from another head",
        )


@dataclass(frozen=True)
class _InstancePass:
    """A pass over the blocks in which instances are found.

    Args:
        work: the volume's prediction.
        offsets: offsets of the affinities, () for other heads.
    """

    work: VolumeWork
    offsets: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return self.graph.count

    @property
    def rules(self) -> InstanceRules:
        """The resolved rules of the request."""
        assert self.work.request.instances is not None
        return self.work.request.instances

    @property
    def graph(self) -> VolumeGraph:
        """The blocks and their files."""
        shape = self.work.plan.output_shape
        block = aligned_block(self.rules.block or (), shape, self.work.plan.block_shape, BLOCK_VOXELS)
        source = Source(self.rules, self.work.voxel_size, self.offsets)
        return VolumeGraph(shape, block, source, local_arrays(self.work).root)

    def heads(self, region: Region) -> dict[str, np.ndarray]:
        """Read the stored outputs of the heads in a region."""
        final = final_arrays(self.work)
        return {name: final.read(name, region) for name in self.rules.sources}

    def labels(self, region: Region) -> np.ndarray:
        """Read the numbers of the pieces in a region."""
        return local_arrays(self.work).read(self.rules.name, region)[0]

    def mask(self, region: Region) -> np.ndarray | None:
        """Read where the mask of the prediction allows instances; None: everywhere."""
        mask, origin = self.work.job.mask, final_arrays(self.work).origin
        if mask is None:
            return None
        place = tuple(
            slice(part.start + first, part.stop + first) for part, first in zip(region, origin, strict=True)
        )
        return np.asarray(mask.read(place).any(axis=0))


class FragmentPass(_InstancePass):
    """Finds the fragments of every block."""

    title = "finding fragments"
    is_light = False

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        local, name = local_arrays(self.work), self.rules.name
        self.graph.find_fragments(
            number,
            self.heads,
            self.mask,
            lambda box, values: local.write(name, box, values[None]),
            raise_if_cancelled,
        )


class EdgePass(_InstancePass):
    """Sums the statistics of the edges between fragments in every block."""

    title = "measuring edges"
    is_light = False

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        self.graph.find_edges(number, self.labels, self.heads, self.mask, raise_if_cancelled)


class NumberPass(_InstancePass):
    """Replaces the numbers of the pieces of every block by those of the volume's instances."""

    title = "numbering instances"
    is_light = True

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        final = final_arrays(self.work)
        box, numbers = self.graph.numbered(number, self.labels)
        raise_if_cancelled()
        final.write(self.rules.name, box, numbers[None])


def make_instances(work: VolumeWork, provenance: Mapping[str, Any], run: Run) -> None:
    """Compute the instances of a volume, block by block.

    Args:
        work: the volume's prediction, of which all heads are finished.
        provenance: the prediction's provenance.
        run: computes the blocks of a pass.
    """
    rules = work.request.instances
    assert rules is not None
    offsets: tuple[tuple[int, ...], ...] = ()
    if rules.affinities is not None:
        tasks = provenance.get("made_of", {}).get("auxiliary_tasks", {})
        offsets = offsets_of(tasks.get(rules.affinities, {}), work.plan.ndim)
    graph = FragmentPass(work, offsets).graph
    graph.create()
    run(FragmentPass(work, offsets))
    graph.join()
    run(EdgePass(work, offsets))
    graph.agglomerate()
    run(NumberPass(work, offsets))
