"""The HTML report of an evaluation: one file, no network, tables and pictures of the worst cases."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from scripts.errors import VolumenError

if TYPE_CHECKING:
    from scripts.inference.evaluation import Evaluation, ScoredCase

logger = logging.getLogger(__name__)

PICTURE_SIDE = 480
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } td.low { color: #b00020 }
figure { display: inline-block; margin: 1rem 1rem 1rem 0 } figcaption { font-size: 13px }
img { image-rendering: pixelated; border: 1px solid #ccc }
.key i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
small { color: #666 }
"""
_COLOURS = {"both": (90, 200, 90), "missed": (60, 120, 255), "false": (255, 70, 60)}


def render_report(evaluation: Evaluation, *, worst: int = 3) -> str:
    """Return the report as one HTML page.

    Args:
        evaluation: the scores.
        worst: cases of lowest Dice with a picture, per target.
    """
    settings = ", ".join(f"{key} {value}" for key, value in evaluation.settings.items() if value is not None)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>",
        f"<style>{_STYLE}</style><h1>Evaluation</h1>",
        f"<p>{len(evaluation.cases)} cases. <small>{html.escape(settings)}</small></p>",
        _summary(evaluation),
        _case_table(evaluation),
        _pictures(evaluation, worst),
        "</html>",
    ]
    return "\n".join(parts)


def _summary(evaluation: Evaluation) -> str:
    rows = []
    for key, value in evaluation.mean.items():
        bounds = evaluation.interval[key]
        interval = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "one case"
        rows.append(f"<tr><td>{html.escape(key)}<td>{_number(value)}<td>{interval}")
    return (
        "<table><caption>Mean over cases</caption><tr><th>metric<th>mean<th>95 % bootstrap interval"
        + "".join(rows)
        + "</table>"
    )


def _case_table(evaluation: Evaluation) -> str:
    keys = [key for key in evaluation.mean if key != "mean_dice"]
    head = "".join(f"<th>{html.escape(key)}" for key in keys)
    rows = []
    for name, row in evaluation.cases.items():
        cells = "".join(f"<td>{_number(row.get(key, math.nan))}" for key in keys)
        rows.append(f"<tr><td>{html.escape(name)}{cells}")
    return f"<table><caption>Cases</caption><tr><th>case{head}{''.join(rows)}</table>"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _pictures(evaluation: Evaluation, worst: int) -> str:
    key = "".join(
        f"<i style='background:rgb{colour}'></i>{name}"
        for name, colour in (
            ("found", _COLOURS["both"]),
            ("missed", _COLOURS["missed"]),
            ("false", _COLOURS["false"]),
        )
    )
    parts = [f"<h2>Worst cases</h2><p class=key>In colour:{key}</p>"]
    for target in sorted({case.target for case in evaluation.scored}):
        cases = [case for case in evaluation.scored if case.target == target]
        cases.sort(key=lambda case: _dice(evaluation, case))
        for case in cases[:worst]:
            picture = case_picture(case, evaluation.settings["threshold"])
            label = f"{case.name}, {target}: Dice {_number(_dice(evaluation, case, math.nan))}"
            encoded = base64.b64encode(picture).decode()
            parts.append(
                f"<figure><img alt='{html.escape(label)}' src='data:image/png;base64,{encoded}'>"
                f"<figcaption>{html.escape(label)}</figcaption></figure>"
            )
    return "\n".join(parts)


def _dice(evaluation: Evaluation, case: ScoredCase, undefined: float = 2.0) -> float:
    value = evaluation.cases.get(case.name, {}).get(f"{case.target}/dice", math.nan)
    return undefined if math.isnan(value) else value


def case_picture(case: ScoredCase, threshold: float) -> bytes:
    """Return a PNG of the slice with most errors: the image in grey, agreement and errors in colour."""
    from PIL import Image

    section, found, truth, known = _worst_slice(case, threshold)
    grey = _image_slice(case, section)
    canvas = np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)
    canvas[~known] *= 0.4
    for name, where in (("both", found & truth), ("missed", ~found & truth), ("false", found & ~truth)):
        where = where & known
        canvas[where] = 0.4 * canvas[where] + 0.6 * np.array(_COLOURS[name], np.float32)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    factor = PICTURE_SIDE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX).save(stream, "PNG")
    return stream.getvalue()


def _worst_slice(
    case: ScoredCase, threshold: float
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray, np.ndarray]:
    best: tuple[int, tuple[slice, ...], np.ndarray, np.ndarray, np.ndarray] | None = None
    shape = case.prediction.shape
    for start in range(shape[0]) if len(shape) == 3 else (0,):
        box = tuple(slice(0, n) for n in shape)
        if len(shape) == 3:
            box = (slice(start, start + 1), *box[1:])
        values, truth, known = case.read(box)
        found = _foreground(values, case, threshold)
        wanted = np.asarray(truth.any(axis=0))
        errors = int(np.count_nonzero((found ^ wanted) & known))
        if best is None or errors > best[0]:
            best = (errors, box, found, wanted, known)
    assert best is not None
    _, box, found, wanted, known = best
    if len(shape) == 3:
        found, wanted, known = found[0], wanted[0], known[0]
    return box, found, wanted, known


def _foreground(values: np.ndarray, case: ScoredCase, threshold: float) -> np.ndarray:
    """Return the voxels of any class but the background."""
    if case.kind == "multiclass":
        return np.asarray((values[0] if len(values) == 1 else values.argmax(axis=0)) > 0)
    return np.asarray((values > (threshold if case.scale else 0)).any(axis=0))


def _image_slice(case: ScoredCase, box: tuple[slice, ...]) -> np.ndarray:
    """Return the image's slice as grey values 0 to 255, or a plain grey where the image is gone."""
    from scripts.data.volumes import open_volume

    plane = tuple(part.stop - part.start for part in box)[-2:]
    if case.image is None:
        return np.full(plane, 128, np.float32)
    there = tuple(slice(b.start + r.start, b.stop + r.start) for b, r in zip(box, case.region, strict=True))
    try:
        values = open_volume(case.image, ndim=len(there)).read(there).astype(np.float32).mean(axis=0)
    except (VolumenError, OSError) as error:
        logger.warning("%s: no image in the report (%s)", case.image, error)
        return np.full(plane, 128, np.float32)
    low, high = np.percentile(values, [1, 99])
    return ((values.reshape(plane) - low) / max(high - low, 1e-6) * 255).clip(0, 255)
