"""The array of instances that a prediction leaves beside the heads it is made from."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.errors import VolumenError
from scripts.inference.heads import Head
from scripts.inference.instances import InstanceRules, InstanceSegmenter, offsets_of, settle_rules
from scripts.inference.postprocess import Region
from scripts.inference.results import Stored
from scripts.inference.stitch import label_volume

if TYPE_CHECKING:
    from scripts.data.volumes import Volume
    from scripts.inference.predict import PredictRequest
    from scripts.inference.predictor import Predictor
    from scripts.inference.writers import ZarrOutput

BLOCK_VOXELS = 1 << 23
"""Voxels that are segmented at once without their halo; mutex watershed needs several times the memory."""
MUTEX_BLOCK_VOXELS = 1 << 21


@dataclass(frozen=True)
class StoredInstances(Stored):
    """Instance numbers: uint32, 0 for none; coarser levels keep the first voxel of each cell."""

    @property
    def is_labels(self) -> bool:
        return True

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("uint32")


def instance_stored(rules: InstanceRules | None) -> tuple[Stored, ...]:
    """Return what is stored of the instances, nothing where none are asked for."""
    if rules is None:
        return ()
    return (StoredInstances(Head(rules.name, 1, "none", "instances")),)


def settle_request(request: PredictRequest, predictor: Predictor) -> PredictRequest:
    """Return a request whose instance rules fit the network.

    Raises:
        VolumenError: a head that is missing, not predicted or no probability, or the package is not installed.
    """
    if request.instances is None:
        return request
    rules = settle_rules(request.instances, predictor.config.get("auxiliary_tasks") or {})
    heads = {head.name: head for head in predictor.heads(request.targets)}
    for name in rules.sources:
        if name not in heads or heads[name].activation != "sigmoid":
            usable = [head.name for head in heads.values() if head.activation == "sigmoid"]
            raise VolumenError(
                "--instances",
                expected=f"predicted targets with a sigmoid: {', '.join(usable) or 'there is none'}",
                found=name,
                remedy="name one, or add it to --targets",
            )
    if rules.block and len(rules.block) != len(predictor.patch_size):
        raise VolumenError(
            "instances.block", expected=f"{len(predictor.patch_size)} numbers", found=rules.block
        )
    if importlib.util.find_spec("bioimage_cpp") is None:
        raise VolumenError(
            "--instances", "bioimage-cpp is not installed", remedy='pip install "volumen[instances]"'
        )
    return replace(request, instances=rules)


def make_instances(
    rules: InstanceRules,
    final: ZarrOutput,
    working: ZarrOutput,
    recipe: Mapping[str, Any],
    *,
    mask: Volume | None = None,
    workers: int = 1,
) -> int:
    """Make the instances of a finished prediction, block by block.

    Args:
        rules: how; settled.
        final: the prediction's arrays, that of the instances among them.
        working: an array of the same shape and name for numbers that hold within blocks.
        recipe: the prediction's record.
        mask: no instance where it is 0, or None.
        workers: blocks at a time.

    Returns:
        The number of instances.
    """
    shape = final.shape
    offsets: tuple[tuple[int, ...], ...] = ()
    if rules.affinities is not None:
        tasks = recipe.get("made_of", {}).get("auxiliary_tasks", {})
        offsets = offsets_of(tasks.get(rules.affinities, {}), len(shape))
    segmenter = InstanceSegmenter(rules, final.spacing, offsets)
    most = MUTEX_BLOCK_VOXELS if rules.affinities else BLOCK_VOXELS
    block = aligned_block(rules.block or (), shape, final.block_shape, most)

    def probabilities(name: str, region: Region) -> np.ndarray:
        values = final.read(name, region)
        return values.astype(np.float32) / (255.0 if values.dtype == np.uint8 else 1.0)

    def segment(region: Region) -> np.ndarray:
        found = segmenter({name: probabilities(name, region) for name in rules.sources})
        if mask is not None:
            there = tuple(
                slice(part.start + first, part.stop + first)
                for part, first in zip(region, final.origin, strict=True)
            )
            found[~mask.read(there).any(axis=0)] = 0
        return found

    name = rules.name
    return label_volume(
        segment,
        (
            lambda region: working.read(name, region)[0],
            lambda region, v: working.write(name, region, v[None]),
        ),
        lambda region, values: final.write(name, region, values[None]),
        shape,
        block,
        segmenter.halo,
        Path(working.root) / "blocks",
        min_size=rules.min_size,
        workers=workers,
    )


def aligned_block(
    wanted: Sequence[int], shape: Sequence[int], chunk: Sequence[int], most: int
) -> tuple[int, ...]:
    """Return voxels per axis to segment at once: whole chunks, so that no two blocks write one.

    Args:
        wanted: voxels per axis, rounded up to chunks; () to choose, the whole volume if it is not too large.
        shape: shape of the volume.
        chunk: shape of a stored chunk.
        most: voxels of a chosen block, unless a single chunk has more.
    """
    if wanted:
        return tuple(math.ceil(w / c) * c for w, c in zip(wanted, chunk, strict=True))
    if math.prod(shape) <= most:
        return tuple(math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True))
    block = list(chunk)
    while True:
        # The axis on which the block is smallest for its share of the volume, so that blocks stay compact.
        grow = [axis for axis in range(len(shape)) if block[axis] < shape[axis]]
        axis = min(grow, key=lambda a: block[a], default=None)
        if axis is None or math.prod(block) // block[axis] * (block[axis] + chunk[axis]) > most:
            return tuple(block)
        block[axis] += chunk[axis]
