"""Choice of prediction settings by a score: one prediction of the validation part, many settings tried on it."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import score
from volumen.inference.output.block_log import read_provenance
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.predictor import Predictor, load_predictor
from volumen.inference.request import PredictRequest
from volumen.inference.rules import offsets_of
from volumen.inference.settings import request_fields
from volumen.tuning.grid import Grid, Trial, candidates, choose, make_grid
from volumen.tuning.instance_maps import InstanceMaps
from volumen.tuning.label_maps import LabelMaps
from volumen.tuning.request import TuneRequest
from volumen.tuning.result import store, write_trials
from volumen.tuning.subject import Subject, find_subject
from volumen.tuning.validation_part import (
    PredictedRegion,
    kept_checkpoints,
    model_name,
    predict_part,
    untouched,
    validation_part,
)
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.evaluation.cases import Evaluation

logger = logging.getLogger(__name__)

THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
SIZES = (0, 100, 1000)
MERGE_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
WALL_THRESHOLDS = (0.3, 0.5, 0.7)
"""Of instances, where every value costs a segmentation for each merge threshold."""

Maps = Callable[[Mapping[str, float]], np.ndarray]


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Args:
        subject: what was tuned.
        best: the chosen trial.
        default: the trial with the default settings of the checkpoint that was given.
        trials: all trials.
        checkpoint: the file with the chosen settings.
        table: CSV of the trials.
    """

    subject: Subject
    best: Trial
    default: Trial
    trials: tuple[Trial, ...]
    checkpoint: Path
    table: Path

    @property
    def at_end(self) -> tuple[str, ...]:
        """Settings of which the best value is the last one tried, beyond which a better one may lie."""
        ends = {}
        for name in self.subject.default:
            values = {trial.settings[name] for trial in self.trials}
            # Below a size of 0 there is nothing.
            ends[name] = {max(values), *({min(values)} if name.endswith("threshold") else ())}
        return tuple(
            name
            for name, value in self.best.settings.items()
            if value in ends[name] and value != self.default.settings[name]
        )


def tune(request: TuneRequest, *, progress: Callable[[str, int, int], None] | None = None) -> Tuning:
    """Choose settings by a score on the validation part, and store them in a checkpoint.

    The part is predicted once for each checkpoint. Only its voxels are scored.

    Args:
        request: what to tune.
        progress: called with a volume's name, windows done and all windows.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    first = Path(request.checkpoint)
    predictor = load_predictor(first, choose_device(request.device))
    asked = prediction_of(predictor, request)
    subject = find_subject(predictor, asked, request.score, request.target, request.instances, request.truth)
    grid = make_grid(_values(request, subject), subject.default)
    part = validation_part(first, request.input, subject.truth, predictor)
    folder = Path(request.output) if request.output else first.parent
    results = results_of(request, first, folder)
    paths = [first]
    if request.epochs:
        paths += [path for path in kept_checkpoints(first) if not path.samefile(first)]
    trials: list[Trial] = []
    for path in paths:
        with scratch_folder(folder, model_name(first)) as scratch:
            if path != first:
                predictor = load_predictor(path, choose_device(request.device))
            regions = predict_part(
                predictor,
                replace(stored_request(asked, subject), checkpoint=str(path), output=str(scratch / "found")),
                part,
                subject.target,
                progress,
            )
            regions = with_truths(predictor, subject, regions)
            trials += _try_all(predictor, subject, regions, grid, path, scratch)
    default = next(trial for trial in trials if trial.settings == subject.default)
    best = choose(trials, default, grid, smaller=subject.smaller)
    if math.isnan(best.value):
        raise VolumenError(
            f"--score {request.score}",
            f"it is undefined for every setting on the validation part of {subject.target}",
            remedy="its label there may be empty: give another score, or train with another split",
        )
    write_trials(trials, subject, results[1])
    store(best, default, subject, results[0])
    return Tuning(subject, best, default, tuple(trials), *results)


def prediction_of(predictor: Predictor, request: TuneRequest) -> PredictRequest:
    """Return a prediction with the settings of the checkpoint."""
    fields: dict[str, Any] = request_fields(predictor.config.get("inference_config") or {})
    data = request.input if isinstance(request.input, str) else request.input[0]
    given = {"input": data, "checkpoint": request.checkpoint, "output": "", "device": request.device}
    return PredictRequest(**{**fields, **given})


def stored_request(asked: PredictRequest, subject: Subject) -> PredictRequest:
    """Return the prediction whose probabilities all settings are tried on."""
    # Instances are made from uint8 by a prediction, labels from the probabilities themselves.
    return untouched(asked, subject.heads, "float16" if subject.rules is None else "uint8", subject.rules)


def _values(request: TuneRequest, subject: Subject) -> dict[str, tuple[float, ...]]:
    """Return the values to try of each setting.

    Raises:
        VolumenError: values out of range, or of a setting that the target does not have.
    """
    given = {
        "threshold": request.thresholds,
        "merge_threshold": request.merge_thresholds,
        "fill_holes": request.fill_holes,
        "min_size": request.min_sizes,
    }
    usual: dict[str, tuple[float, ...]] = {
        "threshold": THRESHOLDS if subject.rules is None else WALL_THRESHOLDS,
        "merge_threshold": MERGE_THRESHOLDS,
        "fill_holes": (0,) if subject.unfilled else SIZES,
        "min_size": SIZES,
    }
    for name, values in given.items():
        flag = f"--{name.replace('_', '-')}{'' if name == 'fill_holes' else 's'}"
        if values is None:
            continue
        if name not in subject.default:
            usable = ", ".join(subject.default)
            raise VolumenError(flag, expected=f"settings of {subject.target}: {usable}", found=name)
        low, high, words = (0, math.inf, "sizes of at least 0")
        if name.endswith("threshold"):
            low, high, words = 0, 1, "probabilities above 0 and below 1"
        sharp = name.endswith("threshold")
        if not values or any(not low <= v <= high or (sharp and v in (low, high)) for v in values):
            raise VolumenError(flag, expected=words, found=", ".join(f"{v:g}" for v in values) or "none")
        if name == "fill_holes" and subject.unfilled and any(values):
            raise VolumenError(
                flag, f"{subject.unfilled}, which is predicted too, has several classes, and a hole belongs to none"
            )  # fmt: skip
        usual[name] = values
    return usual


def results_of(request: TuneRequest, checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """Return the paths of the checkpoint and of the table that are written.

    Raises:
        VolumenError: one of them exists already, or the weights of the checkpoint could be replaced.
    """
    if request.in_place and request.epochs:
        raise VolumenError(
            "--in-place",
            "the settings may be best for the weights of another epoch, which would replace these",
            remedy="leave out --in-place or --epochs",
        )
    name = model_name(checkpoint)
    target = checkpoint if request.in_place else folder / f"{name}_tuned.pth"
    table = folder / f"{name}_tuning.csv"
    for path in (table,) if request.in_place else (target, table):
        if path.exists() and not request.overwrite:
            raise VolumenError(
                path, "exists already", remedy="give another -o, or --overwrite to replace an earlier result"
            )
    if not request.in_place and target.resolve() == checkpoint.resolve():
        raise VolumenError(
            checkpoint, "would be replaced by the result", remedy="give another -o, or --in-place"
        )
    return target, table


@contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """Give a new folder that is removed when the block ends.

    Raises:
        VolumenError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}_tuning_", dir=folder))
    except OSError as error:
        raise VolumenError(
            folder, expected="a folder that can be written to", found=error.strerror, remedy="give another -o"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _try_all(
    predictor: Predictor,
    subject: Subject,
    regions: Sequence[PredictedRegion],
    grid: Grid,
    checkpoint: Path,
    scratch: Path,
) -> list[Trial]:
    """Return a trial for each combination of settings, on the stored predictions of one checkpoint."""
    from tqdm import tqdm

    from volumen.utils.terminal.progress import hidden

    makers = [
        maps_of(predictor, subject, region, scratch / f"maps_{number}")
        for number, region in enumerate(regions)
    ]
    known: dict[bytes, float] = {}
    trials: list[Trial] = []
    # The default comes first, so that warnings are about that.
    tried = sorted(candidates(grid), key=lambda settings: settings != subject.default)
    for settings in tqdm(tried, desc="trying settings", unit="setting", leave=False, disable=hidden(True)):
        maps = [maker(settings) for maker in makers]
        # Many settings give the same labels, which are scored once.
        digest = _digest(maps)
        if digest not in known:
            with warnings_allowed("volumen.evaluation", allowed=not trials):
                found = evaluation_of(subject, regions, maps, scratch)
                known[digest] = found.mean.get(subject.key, math.nan)
        trials.append(Trial(str(checkpoint), settings, known[digest]))
    return trials


def with_truths(
    predictor: Predictor, subject: Subject, regions: Sequence[PredictedRegion]
) -> list[PredictedRegion]:
    """Return the regions with the ignore label of their truth, after checking that it numbers instances.

    Raises:
        VolumenError: instances are compared with a mask.
    """
    if subject.rules is None:
        return list(regions)
    targets = predictor.config.get("dataset_config", {}).get("targets", {})
    ignore = targets.get(subject.truth, {}).get("ignore_label")
    regions = [replace(region, case=replace(region.case, ignore=ignore)) for region in regions]
    highest = 0
    for case in (region.case for region in regions):
        for box in case.pieces():
            _, truth, known = case.read(box)
            highest = max(highest, int(truth[0].max(initial=0, where=known)))
    if highest == 1:
        raise VolumenError(
            regions[0].case.label.path,
            expected="numbers of instances",
            found="the value 1 alone, as of a mask",
            remedy="name the labelled target that numbers them with --truth",
        )
    return regions


def maps_of(predictor: Predictor, subject: Subject, region: PredictedRegion, folder: Path) -> Maps:
    """Return what makes the labels or instances of a region by settings."""
    output = region.job.output
    heads = {name: open_volume(str(find_target(output, name))) for name in subject.heads}
    rules = subject.rules
    if rules is None:
        return LabelMaps(
            heads[subject.target], softmax=subject.softmax, keep_largest=subject.keep_largest, folder=folder
        )
    ndim = len(region.box)
    tasks = predictor.config.get("auxiliary_tasks") or {}
    recipe = read_provenance(output)
    assert recipe is not None
    return InstanceMaps(
        heads,
        rules,
        region.job.image.spacing or predictor.spacing or (1.0,) * ndim,
        offsets_of(tasks.get(rules.affinities, {}), ndim) if rules.affinities else (),
        recipe["blocks"],
        folder,
        region.job.mask,
        [start for start, _ in region.box],
    )


def evaluation_of(
    subject: Subject, regions: Sequence[PredictedRegion], maps: Sequence[np.ndarray], scratch: Path
) -> Evaluation:
    """Return the scores of labels or instances, as an evaluation of them gives them."""
    cases = []
    for region, labels in zip(regions, maps, strict=True):
        axes = "c" + "zyx"[-len(region.box) :]
        volume = ArrayVolume(labels, axes=axes, path=region.case.prediction.path)
        cases.append(replace(region.case, prediction=volume, scale=0.0))
    request = EvaluateRequest(str(scratch), str(scratch), str(scratch), metrics=(subject.score,))
    return score(cases, request)


@contextmanager
def warnings_allowed(name: str, *, allowed: bool) -> Iterator[None]:
    """Leave out a logger's warnings unless they are allowed: extreme settings give empty predictions on purpose."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(level if allowed else logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _digest(maps: Sequence[np.ndarray]) -> bytes:
    """Return a hash of labels, read plane by plane."""
    digest = hashlib.blake2b(digest_size=16)
    for labels in maps:
        for channel in labels:
            for plane in channel:
                digest.update(np.ascontiguousarray(plane).data)
    return digest.digest()
