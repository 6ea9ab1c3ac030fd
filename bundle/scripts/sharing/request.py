"""The requests to package and to export a model, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from volumen.config.described import Described, document_fields

CARD, SHARING = "for the model card", "sharing"
ABOUT, BIOIMAGEIO = "for the description", "with --to bioimageio"
_PURPOSE = "What the model does; empty: from its targets."
_AUTHORS = "Who made it; empty: not stated."

Checkpoint = Annotated[
    str,
    Described("Trained network: a .pth file, or a bundle's model.pt.", "MODEL.pth", short="-m", once=True),
]


@document_fields
@dataclass(frozen=True)
class PackageRequest:
    """The model to package, and the options."""

    checkpoint: Checkpoint
    output: Annotated[str, Described("The bundle to write.", "NAME.zip", short="-o", once=True)]
    overwrite: Annotated[bool, Described("Replace the bundle if it is there.")] = False
    description: Annotated[str, Described(_PURPOSE, group=CARD)] = ""
    authors: Annotated[str, Described(_AUTHORS, group=CARD)] = ""
    data_license: Annotated[
        str | None,
        Described("Licence of the training data; null: said to be not stated.", "TXT", CARD),
    ] = None
    hf: Annotated[
        str | None,
        Described(
            "Also push to the Hugging Face Hub, with the token of `hf auth login`.", "USER/NAME", SHARING
        ),
    ] = None
    public: Annotated[bool, Described("Make the Hub's repository public; false: private.", group=SHARING)] = (
        False
    )
    weights_url: Annotated[
        str | None,
        Described(
            "Where models/model.pt will lie, for large_files.yml; null: only in the zip.", "URL", SHARING
        ),
    ] = None


@document_fields
@dataclass(frozen=True)
class ExportRequest:
    """The model to export, and the format."""

    checkpoint: Checkpoint
    to: Annotated[
        Literal["torchscript", "onnx", "pt2", "aoti", "bioimageio"], Described("Format of the file.")
    ]
    output: Annotated[str, Described("File to write.", "FILE", short="-o", once=True)]
    overwrite: Annotated[bool, Described("Replace the file if it is there.")] = False
    description: Annotated[str, Described(_PURPOSE, group=ABOUT)] = ""
    authors: Annotated[str, Described(_AUTHORS, group=ABOUT)] = ""
    sample: Annotated[
        str | None,
        Described("Its middle becomes the test input; null: smooth noise.", "IMAGE", BIOIMAGEIO),
    ] = None
    license: Annotated[
        str, Described("Of the model, such as CC-BY-4.0; empty: not stated.", "SPDX", BIOIMAGEIO)
    ] = ""
