"""Computes the array of instances of a prediction from its heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.inference.arrays import final_arrays, local_arrays
from volumen.inference.postprocess.block_files import BlockFiles
from volumen.inference.postprocess.blocks import Region, aligned_block
from volumen.inference.postprocess.instances import InstanceSegmenter
from volumen.inference.postprocess.passes import CancellationCheck, Run
from volumen.inference.postprocess.stitch import Stitching
from volumen.inference.rules import InstanceRules, offsets_of, resolve_rules
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.inference.output.ome_zarr import ZarrOutput
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.volume_work import VolumeWork

BLOCK_VOXELS = 1 << 23
"""Voxels that are segmented at once without their halo; mutex watershed needs several times the memory."""
MUTEX_BLOCK_VOXELS = 1 << 21


def resolve_request(request: PredictRequest, predictor: Predictor) -> PredictRequest:
    """Return the request with instance rules that match the network's heads.

    Raises:
        VolumenError: a head is missing, not predicted or no probability, or the package is not installed.
    """
    if request.instances is None:
        return request
    rules = resolve_rules(request.instances, predictor.config.get("auxiliary_tasks") or {})
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


@dataclass(frozen=True)
class _InstancePass:
    """A pass over the blocks in which instances are segmented.

    Args:
        work: the volume's prediction.
        offsets: offsets of the affinities, () for boundaries.
    """

    work: VolumeWork
    offsets: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return self.stitching.count

    @property
    def rules(self) -> InstanceRules:
        """The resolved rules of the request."""
        assert self.work.request.instances is not None
        return self.work.request.instances

    @property
    def segmenter(self) -> InstanceSegmenter:
        """The function that segments a region."""
        return InstanceSegmenter(self.rules, self.work.voxel_size, self.offsets)

    @property
    def stitching(self) -> Stitching:
        """The blocks and their files."""
        shape, rules = self.work.plan.output_shape, self.rules
        most = MUTEX_BLOCK_VOXELS if rules.affinities else BLOCK_VOXELS
        block = aligned_block(rules.block or (), shape, self.work.plan.block_shape, most)
        folder = local_arrays(self.work).root / "blocks"
        return Stitching(shape, block, self.segmenter.halo, BlockFiles(folder))


class SegmentPass(_InstancePass):
    """Segments every block with its halo."""

    title = "segmenting instances"
    is_light = False

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        local, name = local_arrays(self.work), self.rules.name
        self.stitching.segment(
            number,
            self._segment,
            lambda box, values: local.write(name, box, values[None]),
            raise_if_cancelled,
        )

    def _segment(self, region: Region) -> np.ndarray:
        final, mask = final_arrays(self.work), self.work.job.mask
        found = self.segmenter({name: _probabilities(final, name, region) for name in self.rules.sources})
        if mask is not None:
            in_volume = tuple(
                slice(part.start + first, part.stop + first)
                for part, first in zip(region, final.origin, strict=True)
            )
            found[~mask.read(in_volume).any(axis=0)] = 0
        return found


class NumberPass(_InstancePass):
    """Replaces the instance numbers of every block by those of the whole volume."""

    title = "numbering instances"
    is_light = True

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        local, final, name = local_arrays(self.work), final_arrays(self.work), self.rules.name
        box, numbers = self.stitching.numbered(number, lambda box: local.read(name, box)[0])
        raise_if_cancelled()
        final.write(name, box, numbers[None])


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
    segment = SegmentPass(work, offsets)
    segment.stitching.files.folder.mkdir(parents=True, exist_ok=True)
    run(segment)
    segment.stitching.join(rules.min_size)
    run(NumberPass(work, offsets))


def _probabilities(arrays: ZarrOutput, name: str, region: Region) -> np.ndarray:
    values = arrays.read(name, region)
    return values.astype(np.float32) / (255.0 if values.dtype == np.uint8 else 1.0)
