"""The section `tr_setup`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from volumen.config.parts.common import FILE_NAME, STRICT_KEYS
from volumen.config.value_types import NAMES_FILE, Count


@dataclass(frozen=True)
class TrainingSetup:
    """`tr_setup`: what the run is called, where it goes and what it starts from."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    model_name: Annotated[str, Field(pattern=FILE_NAME, description="Names the run's folder and files.")] = (
        "model"
    )
    autoconfigure: Annotated[
        bool,
        Field(
            description="Grow the patch to a size the planned network can take; false: refuse another size."
        ),
    ] = True
    tr_val_split: Annotated[
        Annotated[float, Field(gt=0.0, le=1.0)],
        Field(description="Share of the data that trains; the rest validates."),
    ] = 0.8
    compute_loss_on_labeled_only: Annotated[
        bool, Field(description="Count the loss only where the label is not 0 (0 then means unknown).")
    ] = False
    ckpt_out_base: Annotated[
        str | None,
        NAMES_FILE,
        Field(
            description="Output folder where `-o` is not given; the run goes to its subfolder `model_name`."
        ),
    ] = None
    checkpoint_path: Annotated[
        str | None,
        NAMES_FILE,
        Field(description="Checkpoint to go on from, or to take weights from (`load_weights_only`)."),
    ] = None
    load_weights_only: Annotated[
        bool, Field(description="Take only the weights of `checkpoint_path`; start the schedule anew.")
    ] = False
    resume: Annotated[
        bool, Field(description="Go on from the newest whole checkpoint of this run, if there is one.")
    ] = False
    seed: Annotated[
        Count, Field(description="Seed of the split, the weights, the sampling and the augmentation.")
    ] = 0
    deterministic: Annotated[
        bool,
        Field(
            description="Ask torch for deterministic algorithms, and let cuDNN choose none by timing them"
            " (always the case on the CPU path)."
        ),
    ] = False
