"""Settings for prediction of whole volumes; YAML files, flags and calls in Python share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Lt

from volumen.config.described import Described
from volumen.config.value_types import NAMES_FILE, Amount, AmpMode, Count, PatchSize, Positive, Share

HOW, RESULT, WHAT = "how", "result", "what"


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Settings with the same name and type in YAML, on the command line and in Python.

    A new setting is a field here, and a line in `train.yaml` and `inference.yaml`.
    """

    batch_size: Annotated[Positive, Described("Windows per forward pass.", "N", HOW)] = 1
    overlap: Annotated[
        Annotated[Amount, Lt(1.0)], Described("Share of a window that the next one covers.", "SHARE", HOW)
    ] = 0.5
    amp: Annotated[AmpMode, Described("Mixed precision; auto: the device's fast one.", group=HOW)] = "auto"
    compile: Annotated[
        bool,
        Described(
            "Compile the network with torch.compile and log its largest difference from the network; pays for large "
            "volumes.",
            group=HOW,
        ),
    ] = False
    tta: Annotated[
        Literal["none", "mirror", "rotate"],
        Described(
            "Average over flips (mirror), or flips and 90-degree rotations (rotate).",
            group=HOW,
            alone="mirror",
        ),
    ] = "none"
    mask: Annotated[
        str | None,
        NAMES_FILE,
        Described(
            "Volume, or folder with one per image: predict where it is above 0; null: everywhere.",
            "VOLUME",
            WHAT,
            once=True,
        ),
    ] = None
    skip_empty: Annotated[
        bool,
        Described(
            "Leave windows without contrast at 0; false: predict windows without contrast too.", group=HOW
        ),
    ] = True
    fuse: Annotated[
        bool,
        Described(
            "Read labels from several heads where the checkpoint says how; false: each from its own head.",
            group=HOW,
        ),
    ] = True
    dtype: Annotated[
        Literal["uint8", "float16", "float32", "labels"],
        Described("Probabilities as uint8 (255 is 1), float16 or float32, or labels.", group=RESULT),
    ] = "uint8"
    threshold: Annotated[
        Share | None,
        Described(
            "Write labels, 1 from this probability on; null: probabilities, as `dtype` says.", "P", RESULT
        ),
    ] = None
    min_size: Annotated[
        Count, Described("Remove components of labels that have fewer voxels.", "VOXELS", RESULT)
    ] = 0
    keep_largest: Annotated[
        Positive | None,
        Described("Keep the N largest components of each class in labels; null: all.", "N", RESULT),
    ] = None
    fill_holes: Annotated[
        Count, Described("Fill holes of up to this many voxels in labels of one class.", "VOXELS", RESULT)
    ] = 0
    compress: Annotated[
        Literal["zstd", "lz4", "gzip", "none"],
        Described("Compression of the output's chunks.", group=RESULT),
    ] = "zstd"
    pyramid: Annotated[bool, Described("Coarser levels too; false: full resolution only.", group=RESULT)] = (
        True
    )
    on_corrupt: Annotated[
        Literal["stop", "skip"],
        Described("What to do at a chunk of the image that cannot be read.", group=HOW),
    ] = "stop"


@dataclass(frozen=True)
class InferenceConfig(PredictionSettings):
    """`inference_config`: how a trained network predicts whole volumes."""

    # pydantic's ConfigDict as a plain mapping, so that this module need not import pydantic.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    checkpoint_path: Annotated[str | None, NAMES_FILE, Described("Checkpoint to predict with.")] = None
    patch_size: Annotated[
        PatchSize | None,
        Described("Window in voxels, such as 64,192,192; null: the training patch.", "Z,Y,X", HOW),
    ] = None
    output_targets: Annotated[
        list[str] | None, Described("Targets to predict; null: all.", "NAMES", WHAT)
    ] = None
    load_strict: Annotated[bool, Described("Refuse a checkpoint that lacks or adds weights.")] = True
    num_dataloader_workers: Annotated[
        Positive, Described("Threads that read, and as many that write.", "N", HOW)
    ] = 2
    instances: Annotated[
        dict[str, Any] | str | None,
        Described(
            "Also write TARGET_instances: from a wall such as membrane, from foreground=cell,boundary=membrane, from "
            "affinities, distances or shape descriptors, or sheets; more keys: `threshold`, `merge_threshold`, "
            "`min_size`, `agglomeration`, `halo`, `block`; null: none.",
            "HEADS",
            RESULT,
        ),
    ] = None
