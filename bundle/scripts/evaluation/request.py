"""What to score and how: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from volumen.config.described import Described, document_fields


@document_fields
@dataclass(frozen=True)
class EvaluateRequest:
    """What to score, and how.

    Each field's type and description stand beside it; `docs/configuration.md` lists them under `evaluate_config`.
    Values are checked when the evaluation starts.
    """

    predictions: Annotated[
        str,
        Described(
            "Output of a prediction, or a folder of them, of IMAGE_TARGET files, or of the slices of one volume; given "
            "several times, models are compared with the first.",
            "PREDICTIONS",
            short="-p",
            several=True,
        ),
    ]
    labels: Annotated[
        str,
        Described(
            "Dataset with a labels/ folder, or folder of IMAGE_TARGET labels; for a single prediction also a label, or "
            "the folder of its slices.",
            short="-l",
            once=True,
        ),
    ]
    output: Annotated[
        str, Described("Folder for metrics.json, metrics.csv, report.html.", "REPORT", short="-o", once=True)
    ]
    masks: Annotated[
        str | None,
        Described(
            "Folder of masks (IMAGE_TARGET, IMAGE_mask or IMAGE), scored where above 0; of a single image also one "
            "mask of any name, or its slices; null: masks/ beside labels/.",
            "PATH",
            once=True,
        ),
    ] = None
    targets: Annotated[
        tuple[str, ...] | None, Described("Targets to score; null: all with labels.", "NAMES")
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        Described(
            "Scores, such as dice, hd95, b1_error, voi_merge, f1@0.75, or all; docs/scores.md has the names; null: all "
            "that make sense but for a few that are expensive.",
            "NAMES",
        ),
    ] = None
    tolerance: Annotated[
        Annotated[float, Ge(0.0)] | None,
        Described("Tolerance of the surface Dice, in the spacing's unit; null: one voxel.", "LENGTH"),
    ] = None
    threshold: Annotated[
        Annotated[float, Gt(0.0), Le(1.0)], Described("Foreground from this probability on.", "P")
    ] = 0.5
    spacing: Annotated[
        tuple[Annotated[float, Gt(0.0)], ...] | None,
        Described("Voxel size per axis; null: from the files.", "Z,Y,X"),
    ] = None
    worst: Annotated[int, Described("Cases with a picture in the report, per target.", "N")] = 3
    seed: Annotated[int, Described("Seed of the bootstrap.", "N")] = 0
    instances: Annotated[
        tuple[str, ...],
        Described(
            "Targets whose predictions number instances; empty: those of volumen predict --instances, and label maps "
            "with more than 255 values.",
            "NAMES",
        ),
    ] = ()
    ignore_label: Annotated[
        int | None,
        Described("Label value that means unknown; null: as the record of a prediction says.", "VALUE"),
    ] = None
    connectivity: Annotated[
        Literal["26/6", "6/26"],
        Described(
            "Neighbours of foreground and background voxels in topology and objects of labels: 26/6 or 6/26.",
            "F/B",
        ),
    ] = "26/6"
    surface_border: Annotated[
        bool, Described("Count a surface where the volume's border cuts a structure, as MONAI does.")
    ] = False
    diagnostics: Annotated[
        bool,
        Described(
            "Count errors by curvature, thickness and gaps, and list labels that may be wrong; false: leave out errors "
            "by geometry and labels that may be wrong."
        ),
    ] = True
