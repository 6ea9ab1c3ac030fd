"""The settings of `tr_config.unlabelled`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from volumen.config.parts.common import STRICT_KEYS
from volumen.config.value_types import NAMES_FILE, Amount, Share


@dataclass(frozen=True)
class UnlabelledConfig:
    """`tr_config.unlabelled`: what the network learns from patches without labels."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    pseudo_labels: Annotated[
        str | None,
        NAMES_FILE,
        Field(
            description="Folder with pseudo-labels that the patches have, as `volumen train --rounds` writes it; null:"
            " a mean teacher labels them while the network trains."
        ),
    ] = None
    ratio: Annotated[
        Annotated[float, Field(gt=0, le=16)],
        Field(description="Unlabelled patches of a batch per labelled patch; at least one patch."),
    ] = 1.0
    weight: Annotated[
        Amount, Field(description="Weight of the consistency after the ramp-up; that of the labels is 1.")
    ] = 10.0
    ramp_up: Annotated[
        Share,
        Field(
            description="Share of the training in which the weight rises from nearly 0, by exp(-5 (1 - t)^2)."
        ),
    ] = 0.3
    uncertainty: Annotated[
        bool,
        Field(
            description="Compare only voxels of which the teacher's entropy is below a limit that rises from 3/4 of the"
            " largest entropy to the largest."
        ),
    ] = False
    heads: Annotated[
        Literal["labelled", "all"],
        Field(
            description="Heads that learn from the teacher: those of labelled targets, or derived ones too."
        ),
    ] = "labelled"
    strong: Annotated[
        Amount,
        Field(
            description="Factor of nnU-Net's probabilities with which intensities of the student's view are changed."
        ),
    ] = 3.0
    mix: Annotated[
        Share,
        Field(
            description="Probability that a box of the student's view is taken from another unlabelled patch of the"
            " batch (CutMix), which needs two of them."
        ),
    ] = 0.5
    min_unlabelled: Annotated[
        Annotated[float, Field(gt=0, le=1)],
        Field(description="Least share of a patch that is unlabelled and not empty."),
    ] = 0.25
    min_contrast: Annotated[
        Annotated[float, Field(ge=0, lt=1)],
        Field(
            description="A block of 8 voxels per axis is empty if its standard deviation is at most this share of the"
            " volume's."
        ),
    ] = 0.1
