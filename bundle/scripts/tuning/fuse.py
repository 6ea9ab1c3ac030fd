"""Fits how a label is read from several heads on the validation part of a run, and scores it on what did not fit it."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.checkpoints.file import save_checkpoint, write_run_file
from volumen.config.fusions import fusible_heads
from volumen.data.formats.opening import open_volume
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.postprocess.blocks import block_box, block_counts
from volumen.inference.predictor import load_predictor, read_checkpoint
from volumen.metrics.fusion import HALVES, VoxelSample, best_threshold, fitted_rule
from volumen.tuning.result import RECORD
from volumen.tuning.scratch import scratch_array
from volumen.tuning.subject import Subject, find_subject
from volumen.tuning.tune import evaluation_of, prediction_of, results_of, scratch_folder
from volumen.tuning.validation_part import (
    PredictedRegion,
    model_name,
    predict_part,
    untouched,
    validation_part,
)
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.inference.predictor import Predictor
    from volumen.tuning.request import TuneRequest

SIDE = 64
"""Largest side of the blocks that are read at once."""
ALONE, MOVED, FUSED = "own head alone", "own head, best threshold", "fused"
_EPS = 1e-7


@dataclass(frozen=True)
class FusionTuning:
    """What was found.

    Args:
        subject: what was scored.
        heads: the heads that the label is read from.
        scores: score of each way to read the label; what is fitted is scored on the half that did not fit it.
        rule: the rule that both halves together fit.
        checkpoint: the file with the rule; None if the fusion is not better, so nothing was stored.
        table: CSV of the scores.
    """

    subject: Subject
    heads: tuple[str, ...]
    scores: dict[str, float]
    rule: dict[str, Any]
    checkpoint: Path | None
    table: Path

    @property
    def gain(self) -> float:
        """How much better the fusion is than the better of the two ways with the own head alone; negative: worse."""
        sign = -1 if self.subject.smaller else 1
        return min(sign * (self.scores[FUSED] - self.scores[name]) for name in (ALONE, MOVED))


class _Half:
    """What one half fitted: the fusion, and the best threshold of the own logit."""

    def __init__(self, sample: VoxelSample, number: int, heads: Mapping[str, Sequence[int]]) -> None:
        self.rule = fitted_rule(sample, heads, (number,))
        evidence, labels = sample.half(number)
        self.threshold = best_threshold(evidence[:, 0], labels)


def tune_fusion(
    request: TuneRequest, *, progress: Callable[[str, int, int], None] | None = None
) -> FusionTuning:
    """Fit a fusion on the validation part, score it crosswise on two halves of it, and store it if it is better.

    The part is predicted once, with all heads. Its blocks form two halves in their order. Each half is decided by what
    the other one fitted, and both together are scored, against the own head with threshold 0.5 and with the threshold
    that is best on the other half. The stored rule is fitted on both halves.

    Args:
        request: what to tune; `fuse` is ("auto",) or heads, whose fusion is stored whether or not it is better.
        progress: called with a volume's name, windows done and all windows.

    Raises:
        VolumenError: an error that the user can correct, such as settings to try beside `fuse`.
    """
    for name in ("instances", "truth", "thresholds", "merge_thresholds", "fill_holes", "min_sizes", "epochs"):
        if getattr(request, name):
            raise VolumenError(
                f"--{name.replace('_', '-')}",
                "does not go with --fuse",
                remedy="run volumen tune again for it",
            )
    fuse = "auto" if request.fuse in (None, ("auto",)) else request.fuse
    first = Path(request.checkpoint)
    predictor = load_predictor(first, choose_device(request.device), fuse=False)
    asked = replace(prediction_of(predictor, request), instances=None, fuse=False)
    subject = find_subject(predictor, asked, request.score, request.target, None)
    heads = _heads(predictor, subject.target, fuse)
    part = validation_part(first, request.input, subject.truth, predictor)
    folder = Path(request.output) if request.output else first.parent
    target, table = results_of(request, first, folder)
    with scratch_folder(folder, model_name(first)) as scratch:
        plain = untouched(asked, tuple(heads), "float32")
        stored = replace(plain, checkpoint=str(first), output=str(scratch / "found"))
        regions = predict_part(predictor, stored, part, subject.target, progress)
        fusing = _Fusing(predictor, regions, heads)
        sample = fusing.sample()
        sample.check("--fuse")
        halves = [_Half(sample, number, heads) for number in HALVES]
        scores = {
            name: evaluation_of(subject, regions, fusing.maps(halves, name, scratch), scratch).mean.get(
                subject.key, math.nan
            )
            for name in (ALONE, MOVED, FUSED)
        }
        rule = fitted_rule(sample, heads)
    found = FusionTuning(subject, tuple(heads), scores, rule, None, table)
    if math.isnan(found.gain):
        raise VolumenError(
            f"--score {request.score}",
            f"it is undefined on the validation part of {subject.target}",
            remedy="its label there may be empty: give another score, or train with another split",
        )
    _write_table(found, table)
    if found.gain <= 0 and fuse == "auto":
        return found
    _store(found, first, target)
    return replace(found, checkpoint=target)


def _heads(predictor: Predictor, target: str, fuse: str | Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    tasks: Mapping[str, Any] = predictor.config.get("auxiliary_tasks") or {}
    entry = predictor.config.get("dataset_config", {}).get("targets", {}).get(target, {})
    if target in tasks:
        raise VolumenError("--target", expected="a labelled target", found=f"{target}, which is derived")
    heads = fusible_heads(
        target,
        fuse or "auto",
        kind=predictor.targets[target].kind,
        instances=entry.get("instances"),
        tasks={name: task for name, task in tasks.items() if name in predictor.targets},
        ndim=len(predictor.patch_size),
        where="--fuse",
    )
    if len(heads) == 1:
        raise VolumenError(
            "--fuse",
            expected=f"a head that speaks for {target} besides its own",
            found="none in the network",
            remedy="train with a distance, affinities or a skeleton derived from it",
        )
    return heads


class _Fusing:
    """Reads the stored outputs of all heads block by block.

    Args:
        predictor: knows the kinds of the heads.
        regions: the predicted validation part.
        heads: head to the sign of each channel, the own head first.
    """

    def __init__(
        self,
        predictor: Predictor,
        regions: Sequence[PredictedRegion],
        heads: Mapping[str, Sequence[int]],
    ) -> None:
        self._regions, self._heads = regions, heads
        self._logits = {name: predictor.targets[name].is_probability for name in heads}
        self._volumes = [
            {name: open_volume(str(find_target(region.job.output, name))) for name in heads}
            for region in regions
        ]
        blocks = [
            (number, box)
            for number, region in enumerate(regions)
            for box in _boxes(tuple(region.case.prediction.shape))
        ]
        middle = len(blocks) / 2
        self._blocks = [(number, box, int(place >= middle)) for place, (number, box) in enumerate(blocks)]

    def sample(self) -> VoxelSample:
        """Return a sample of the known voxels of both halves."""
        sample = VoxelSample(sum(map(len, self._heads.values())))
        for number, box, half in self._blocks:
            _, truth, known = self._regions[number].case.read(box)
            evidence = self._evidence(number, box)
            sample.add(evidence[:, known], truth[0][known] > 0, half)
        return sample

    def maps(self, halves: Sequence[_Half], way: str, scratch: Path) -> list[np.ndarray]:
        """Return the labels (1, *space) uint8 of every region; each half is decided by what the other one fitted."""
        maps = [
            scratch_array(
                scratch / f"{way.replace(' ', '_').replace(',', '')}_{number}.npy",
                np.uint8,
                (1, *region.case.prediction.shape),
            )
            for number, region in enumerate(self._regions)
        ]
        for number, box, half in self._blocks:
            evidence, other = self._evidence(number, box), halves[1 - half]
            if way == FUSED:
                weights = itertools.chain.from_iterable(other.rule["weights"].values())
                signs = itertools.chain.from_iterable(self._heads.values())
                positive = [sign * weight for sign, weight in zip(signs, weights, strict=True)]
                decided = np.tensordot(positive, evidence, 1) + other.rule["bias"] >= 0
            else:
                decided = evidence[0] >= (other.threshold if way == MOVED else 0.0)
            maps[number][(0, *box)] = decided
        return maps

    def _evidence(self, number: int, box: tuple[slice, ...]) -> np.ndarray:
        """Return the outputs of all heads as evidence, (columns, *box) float32."""
        columns = []
        for name, signs in self._heads.items():
            values = self._volumes[number][name].read(box).astype(np.float32)
            if self._logits[name]:
                inside = np.clip(values, _EPS, 1 - _EPS)
                values = np.log(inside / (1 - inside))
            columns += [sign * channel for sign, channel in zip(signs, values, strict=True)]
        return np.stack(columns)


def _boxes(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Return blocks of a region, at least two along every axis of more than one voxel."""
    block = tuple(max(1, min(SIDE, -(-n // 2))) for n in shape)
    return [block_box(number, shape, block) for number in range(math.prod(block_counts(shape, block)))]


def _store(found: FusionTuning, first: Path, target: Path) -> None:
    content = read_checkpoint(first)
    model_config = dict(content["model_config"])
    model_config["fusion"] = {**(model_config.get("fusion") or {}), found.subject.target: found.rule}
    record = {
        "from": first.name,
        "score": found.subject.key,
        "value": found.scores[FUSED],
        "default": found.scores[ALONE],
        "fused": list(found.heads),
    }
    save_checkpoint({**content, "model_config": model_config, RECORD: record}, target)


def _write_table(found: FusionTuning, path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["label", found.subject.key])
    table.writerows([name, f"{value:.10g}"] for name, value in found.scores.items())
    write_run_file(path, text.getvalue().encode())
