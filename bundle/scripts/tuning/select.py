"""Choice among runs, ensembles, test-time augmentation and post-processing by a score on what none of them has seen.

A run with folds predicts each region by the network that was not trained on it, so what is compared are out-of-fold
predictions. nnU-Net's `find_best_configuration` compares stored probabilities of whole data sets; here each candidate's
prediction of a region is scored and removed.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.evaluation.differences import differences
from volumen.evaluation.pairing import find_cases
from volumen.evaluation.request import EvaluateRequest
from volumen.inference.jobs import make_job
from volumen.inference.request import PredictRequest
from volumen.inference.run_files import SELECTION
from volumen.inference.settings import request_fields
from volumen.inference.windows.tta import MODES, transforms
from volumen.tuning.candidates import Candidate, common_regions, load_runs, make_candidates
from volumen.tuning.grid import candidates as combinations
from volumen.tuning.grid import make_grid
from volumen.tuning.held_out import HeldOut, experiment_of, held_out_regions, predict_region
from volumen.tuning.selection import Entry, Selection
from volumen.tuning.selection_report import render_selection
from volumen.tuning.subject import Subject, find_subject
from volumen.tuning.tune import evaluation_of, maps_of, stored_request, warnings_allowed
from volumen.tuning.validation_part import PredictedRegion
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager
    from volumen.evaluation.cases import Evaluation
    from volumen.inference.predictor import Predictor

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]
THRESHOLDS, SIZES = (0.4, 0.5, 0.6), (0, 100)
"""Few values, since the choice is scored on the voxels that it is made on."""


@dataclass(frozen=True)
class SelectRequest:
    """What to choose among, and how.

    Args:
        runs: checkpoints, or folders of runs.
        data: the data of the runs; None: as their checkpoints record them.
        score: name of the score; None: that of the runs' key metric, else dice.
        target: name of the target; None: that of the key metric, else the only labelled target.
        output: folder of the result; None: the first run's.
        tta: augmentations to try.
        postprocess: whether thresholds and sizes are tried.
        device: auto, cpu, cuda or cuda:N.
        overwrite: whether an earlier result may be replaced.
    """

    runs: tuple[str, ...]
    data: tuple[str, ...] = ()
    score: str | None = None
    target: str | None = None
    output: str | None = None
    tta: tuple[str, ...] = ("none", "mirror")
    postprocess: bool = True
    device: str = "auto"
    overwrite: bool = False


def select(request: SelectRequest, tell: ProgressCallback | None = None) -> Selection:
    """Choose by a score, and write what `volumen predict` uses.

    Args:
        request: what to choose among.
        tell: called with what is predicted, windows done and all windows.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    for mode in request.tta:
        if mode not in MODES:
            raise VolumenError("--tta", expected=f"among {', '.join(MODES)}", found=mode)
    output = Path(request.output or _folder_of(request.runs[0]))
    file = output / SELECTION
    if file.exists() and not request.overwrite:
        raise VolumenError(file, "exists already", remedy="give another -o, or --overwrite to replace it")
    runs = load_runs(request.runs, choose_device(request.device))
    first = runs[0].members[0]
    config = experiment_of(first.predictor, list(request.data) or None)
    score, target = _key_score(request, first.predictor)
    asked = _prediction(first.predictor, request.device)
    subject = find_subject(first.predictor, asked, score, target, None)
    keys = common_regions(runs)
    regions = _regions(config, keys, runs, subject)
    grid = _grid(subject, request.postprocess)
    output.mkdir(parents=True, exist_ok=True)
    entries = []
    for candidate in make_candidates(runs, request.tta):
        with tempfile.TemporaryDirectory(prefix="selection_", dir=output) as scratch:
            settings, evaluation = _best(candidate, regions, subject, asked, grid, Path(scratch), tell)
        entries.append(
            Entry(
                candidate, settings, evaluation, None,
                _passes(candidate), sum(member.patches for member in candidate.members),
            )
        )  # fmt: skip
    ordered = _ordered(entries, subject)
    if math.isnan(_value(ordered[0], subject)):
        raise VolumenError(
            f"--score {score}", "it is undefined for every candidate", remedy="give another score"
        )
    _write(file, ordered, subject, len(regions))
    found = Selection(subject, len(regions), tuple(ordered), file)
    write_atomically(file.with_suffix(".html"), render_selection(found).encode())
    return found


def _folder_of(run: str) -> str:
    return run if Path(run).is_dir() else str(Path(run).parent)


def _key_score(request: SelectRequest, predictor: Predictor) -> tuple[str, str | None]:
    """Return score and target: as given, else those of the run's key metric, "val/<target>/<score>"."""
    key = (predictor.config.get("tr_config") or {}).get("key_metric") or ""
    parts = key.removeprefix("val/").split("/")
    score, target = (
        (parts[-1], "/".join(parts[:-1])) if len(parts) > 1 and parts[0] != "loss" else ("dice", None)
    )
    return request.score or score, request.target or (target if request.score is None else None)


def _prediction(predictor: Predictor, device: str) -> PredictRequest:
    fields: dict[str, Any] = request_fields(predictor.config.get("inference_config") or {})
    return PredictRequest(
        **{
            **fields,
            "input": "",
            "checkpoint": predictor.path,
            "output": "",
            "device": device,
            "instances": None,
        }
    )


def _grid(subject: Subject, postprocess: bool) -> dict[str, tuple[float, ...]]:
    usual: dict[str, tuple[float, ...]] = {
        "threshold": THRESHOLDS,
        "fill_holes": (0,) if subject.unfilled else SIZES,
        "min_size": SIZES,
    }
    return make_grid({name: usual[name] if postprocess else () for name in subject.default}, subject.default)


@dataclass(frozen=True)
class _Region:
    """A region with its label.

    Args:
        held_out: the region and its files.
        label, mask: paths of the truth, and of where it is known.
    """

    held_out: HeldOut
    label: str
    mask: str | None


def _regions(
    config: ConfigManager, keys: Sequence[Any], runs: Sequence[Any], subject: Subject
) -> list[_Region]:
    """Return the regions that are scored: those whose image has a label.

    Raises:
        VolumenError: none has.
    """
    splits = {id(member): member.split for run in runs for member in run.members}.values()
    found = {region.key: region for split in splits for region in held_out_regions(config, split)}
    regions = [
        _Region(found[key], label, found[key].files.masks.get(subject.truth))
        for key in keys
        if (label := found[key].files.labels.get(subject.truth))
    ]
    if not regions:
        raise VolumenError(
            config.layout.root, expected=f"labels of {subject.truth} in the validation part", found="none"
        )
    return regions


def _best(
    candidate: Candidate,
    regions: Sequence[_Region],
    subject: Subject,
    asked: PredictRequest,
    grid: Mapping[str, tuple[float, ...]],
    scratch: Path,
    tell: ProgressCallback | None,
) -> tuple[dict[str, float], Evaluation]:
    """Predict the regions once, try all settings, and return the best ones with their scores."""
    changed: dict[str, Any] = {"tta": candidate.tta}
    request = replace(stored_request(asked, subject), **changed)
    predicted, makers = [], []
    for number, region in enumerate(regions):
        held_out = region.held_out
        predictor = candidate.predictor_for(*held_out.key)
        path = scratch / f"region_{number}" / f"{held_out.name}.zarr"
        with warnings_allowed("volumen.inference", allowed=False):
            predict_region(predictor, held_out, request, path, tell)
        (case,) = find_cases(
            EvaluateRequest(
                str(path), region.label, str(path), masks=region.mask, targets=(subject.target,), metrics=()
            )
        )
        name = held_out.name if held_out.whole else f"{held_out.name} {number}"
        job = make_job(_image_of(held_out), None, str(path), (subject.target,), "zarr")
        entry = PredictedRegion(replace(case, name=name), job, held_out.stored)
        predicted.append(entry)
        makers.append(maps_of(predictor, subject, entry, scratch / f"maps_{number}"))
    best: tuple[float, dict[str, float], Evaluation] | None = None
    # The default comes first, and stays where others are only as good.
    for settings in sorted(combinations(dict(grid)), key=lambda tried: tried != subject.default):
        with warnings_allowed("volumen.evaluation", allowed=False):
            found = evaluation_of(subject, predicted, [maker(settings) for maker in makers], scratch)
        value = found.mean.get(subject.key, math.nan)
        ranked = math.inf if math.isnan(value) else (value if subject.smaller else -value)
        if best is None or ranked < best[0] - 1e-9:
            best = (ranked, settings, found)
    assert best is not None
    for number in range(len(regions)):
        shutil.rmtree(scratch / f"region_{number}", ignore_errors=True)
    return best[1], replace(best[2], scored=())


def _image_of(held_out: HeldOut) -> Any:
    from volumen.data.formats.opening import open_volume

    return open_volume(held_out.files.image, axes=held_out.axes, level=held_out.level)


def _passes(candidate: Candidate) -> int:
    return sum(
        len(transforms(candidate.tta, member.predictor.patch_size, member.predictor.spacing))
        for member in candidate.members
    )


def _value(entry: Entry, subject: Subject) -> float:
    return entry.evaluation.mean.get(subject.key, math.nan)


def _ordered(entries: Sequence[Entry], subject: Subject) -> list[Entry]:
    """Return the candidates, the best first, the cheaper one of equals; with their differences to the best."""

    def rank(entry: Entry) -> tuple[float, int]:
        value = _value(entry, subject)
        return (math.inf if math.isnan(value) else (value if subject.smaller else -value)), entry.passes

    first, *others = sorted(entries, key=rank)
    return [
        first,
        *(
            replace(entry, difference=differences(first.evaluation, entry.evaluation).get(subject.key))
            for entry in others
        ),
    ]


def _write(file: Path, entries: Sequence[Entry], subject: Subject, regions: int) -> None:
    """Write the choice for `volumen predict`, with the scores of all candidates for the reader."""
    chosen = entries[0]
    folder = file.parent.resolve()
    # The default settings leave it to the prediction whether it writes probabilities or labels.
    settings = subject.as_config(chosen.settings) if chosen.settings != subject.default else {}
    if chosen.candidate.fused is not None:
        settings = {**settings, "fuse": chosen.candidate.fused}
    content: dict[str, Any] = {
        "members": [
            os.path.relpath(member.checkpoint.resolve(), folder) for member in chosen.candidate.members
        ],
        "inference_config": {"tta": chosen.candidate.tta, **settings},
        "score": subject.key,
        "regions": regions,
        "candidates": [
            {
                "name": entry.candidate.name,
                "settings": entry.settings,
                "mean": _value(entry, subject),
                "interval_95": entry.evaluation.interval.get(subject.key),
                "difference_to_chosen": entry.difference and entry.difference.mean,
                "difference_interval_95": entry.difference and entry.difference.interval,
                "networks": len(entry.candidate.members),
                "passes_per_window": entry.passes,
                "training_patches": entry.patches,
                "cases": {name: row.get(subject.key) for name, row in entry.evaluation.cases.items()},
            }
            for entry in entries
        ],
    }
    write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".csv"), _table_text(content["candidates"]).encode())


def _table_text(candidates: Sequence[Mapping[str, Any]]) -> str:
    """Return the candidates as CSV: a row each, with the score of each region."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    cases = sorted({name for entry in candidates for name in entry["cases"]})
    columns = ("name", "mean", "difference_to_chosen", "networks", "passes_per_window", "training_patches")
    intervals = ("interval_95", "difference_interval_95")
    table.writerow([*columns, *(f"{key}_{end}" for key in intervals for end in ("low", "high")), *cases])
    for entry in candidates:
        ends = [end for key in intervals for end in (entry[key] or ("", ""))]
        table.writerow(
            [*(entry[key] for key in columns), *ends, *(entry["cases"].get(name) for name in cases)]
        )
    return text.getvalue()
