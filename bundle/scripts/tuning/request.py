"""The request of a tuning, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from volumen.config.described import Described, document_fields
from volumen.inference.rules import InstanceRules


@document_fields
@dataclass(frozen=True)
class TuneRequest:
    """What to tune, and which values to try. The default of every setting is always tried."""

    checkpoint: Annotated[
        str, Described("Checkpoint in the folder of its run.", "MODEL.pth", short="-m", once=True)
    ]
    input: Annotated[
        str | tuple[str, ...],
        Described("The data of the run, also of nnU-Net and MONAI.", "DATA", short="-i", several=True),
    ]
    score: Annotated[
        str,
        Described(
            "Score that decides, such as dice, surface_challenge or voi_split; names are in docs/scores.md.",
            "NAME",
            once=True,
        ),
    ]
    target: Annotated[
        str | None,
        Described(
            "Target that is scored; null: the instances, else the only labelled target.", "NAME", once=True
        ),
    ] = None
    instances: Annotated[
        InstanceRules | None,
        Described(
            "Tune instances, from heads as in volumen predict; null: those of the checkpoint.",
            "HEADS",
            once=True,
        ),
    ] = None
    truth: Annotated[
        str | None,
        Described(
            "Labelled target of DATA that numbers the instances; null: the one that their heads were trained on.",
            "NAME",
            once=True,
        ),
    ] = None
    output: Annotated[
        str | None,
        Described(
            "Folder for MODEL_tuned.pth and MODEL_tuning.csv, and for probabilities meanwhile; null: the run's.",
            "FOLDER",
            short="-o",
            once=True,
        ),
    ] = None
    thresholds: Annotated[
        tuple[float, ...] | None,
        Described("Thresholds to try; null: 0.1 to 0.9; of instances 0.3,0.5,0.7.", "P,P,..."),
    ] = None
    merge_thresholds: Annotated[
        tuple[float, ...] | None,
        Described("Merge thresholds of instances to try; null: 0.3 to 0.7.", "P,P,..."),
    ] = None
    fill_holes: Annotated[
        tuple[int, ...] | None, Described("Sizes of filled holes to try; null: 0,100,1000.", "N,N,...")
    ] = None
    min_sizes: Annotated[
        tuple[int, ...] | None, Described("Least sizes to try; null: 0,100,1000.", "N,N,...")
    ] = None
    epochs: Annotated[bool, Described("Try the checkpoints of all epochs that the run still has, too.")] = (
        False
    )
    fuse: Annotated[
        tuple[str, ...] | None,
        Described(
            "Fit how the label is read from several heads instead of trying settings; auto: from all that speak for it,"
            " stored if that is better on the half that did not fit it; null: try settings.",
            "HEADS",
            alone="auto",
        ),
    ] = None
    in_place: Annotated[
        bool, Described("Store the settings in the checkpoint itself, not in a new file.")
    ] = False
    overwrite: Annotated[bool, Described("Replace the results of an earlier tuning.")] = False
    device: Annotated[str, Described("auto, cpu, cuda or cuda:N.", "NAME")] = "auto"
