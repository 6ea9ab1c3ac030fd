"""The requests of a suggestion and of an acceptance, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from volumen.config.described import Described, FromKey, document_fields
from volumen.config.prediction import HOW, InferenceConfig, PredictionSettings

CHOICE = "choice"

Strategy = Literal["power", "entropy", "foreground", "random"]


@document_fields
@dataclass(frozen=True)
class SuggestRequest:
    """Which boxes to suggest, of which data, by which network."""

    checkpoint: Annotated[
        str | tuple[str, ...],
        Described(
            "Trained network: a checkpoint, or the folder of a run, of which folds are averaged; several are averaged.",
            "MODEL.pth",
            short="-m",
            several=True,
        ),
    ]
    input: Annotated[
        str,
        Described(
            "Data folder with images/ and, as far as there are any, labels/ and masks/.",
            "DATA",
            short="-i",
            once=True,
        ),
    ]
    output: Annotated[
        str,
        Described(
            "Folder for the suggestions and for the predictions.", "SUGGESTIONS", short="-o", once=True
        ),
    ]
    number: Annotated[int, Described("Boxes to suggest.", "N", CHOICE, "-n")] = 10
    size: Annotated[
        tuple[int, ...] | None,
        Described("Box in voxels, such as 64,64,64; null: half of the training patch.", "Z,Y,X", CHOICE),
    ] = None
    target: Annotated[
        tuple[str, ...] | None,
        Described("Labelled targets to suggest for; null: all that are probabilities.", "NAMES", CHOICE),
    ] = None
    strategy: Annotated[
        Strategy,
        Described(
            "Random boxes with predicted foreground in two of three (foreground), uncertain ones of every class, drawn "
            "with noise and spread out (power), the most uncertain ones (entropy), or random ones.",
            group=CHOICE,
        ),
    ] = "foreground"
    beta: Annotated[
        float,
        Described(
            "Power of the uncertainty by which `power` draws: 0 draws at random, large values take the most uncertain.",
            "B",
            CHOICE,
        ),
    ] = 1.0
    max_labelled: Annotated[
        float, Described("Largest share of a box that may be labelled already.", "SHARE", CHOICE)
    ] = 0.1
    seed: Annotated[int, Described("Seed of the random choice.", "N", CHOICE)] = 0
    overlap: Annotated[float, FromKey(PredictionSettings, "overlap")] = PredictionSettings.overlap
    tta: Annotated[Literal["none", "mirror", "rotate"], FromKey(PredictionSettings, "tta")] = "none"
    batch_size: Annotated[int, FromKey(PredictionSettings, "batch_size")] = PredictionSettings.batch_size
    workers: Annotated[int, FromKey(InferenceConfig, "num_dataloader_workers")] = (
        InferenceConfig.num_dataloader_workers
    )
    device: Annotated[str, Described("Device: auto, cpu, cuda or cuda:N.", "NAME", HOW)] = "auto"


@document_fields
@dataclass(frozen=True)
class AcceptRequest:
    """Which painted boxes to take back, and into which data."""

    suggestions: Annotated[str, Described("Folder that `volumen suggest` wrote.", "SUGGESTIONS")]
    input: Annotated[str, Described("Data folder of the suggestions.", "DATA", short="-i")]
    output: Annotated[
        str | None,
        Described(
            "New data folder, which links to the images; null: into DATA itself, if that changes no file of yours.",
            "NEW_DATA",
            short="-o",
        ),
    ] = None
    boxes: Annotated[
        tuple[int, ...] | None,
        Described("Ranks of the painted boxes; null: those that are marked as done.", "N,N,..."),
    ] = None
    overwrite_labels: Annotated[
        bool, Described("Painted values replace earlier labels, too; false: earlier labels stay.")
    ] = False
