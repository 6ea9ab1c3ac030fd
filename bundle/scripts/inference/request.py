"""The request of a prediction and its report, as plain values."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from volumen.config.described import Described, FromKey, document_fields
from volumen.config.prediction import HOW, RESULT, WHAT, InferenceConfig, PredictionSettings
from volumen.inference.rules import InstanceRules

if TYPE_CHECKING:
    from volumen.inference.gain import AugmentationReport
    from volumen.inference.windows.plan import Box

logger = logging.getLogger(__name__)

OpenBox = tuple[tuple[int | None, int | None], ...]
"""Start and stop of each spatial axis; None: the volume's bound."""
SEVERAL = "several processes or machines (needs volumen[dask])"


@document_fields
@dataclass(frozen=True)
class PredictRequest(PredictionSettings):
    """What to predict, where, and how: the fields here, and those of `PredictionSettings` as keywords.

    Each field's type and description stand beside it; `docs/configuration.md` lists them, the settings under
    `inference_config` and the others under `A request of a prediction`. Values are checked when the prediction starts.
    """

    input: Annotated[
        str,
        Described(
            "Image, or folder of images (its images/ folder if it has one).", "IMAGES", WHAT, "-i", once=True
        ),
    ]
    checkpoint: Annotated[
        str | tuple[str, ...],
        FromKey(InferenceConfig, "checkpoint_path"),
        Described(
            "Trained network: a .pth file, a bundle's model.pt, the folder of a run, of which folds are averaged, or a "
            "folder of nnU-Net v2's results; several are averaged.",
            "MODEL.pth",
            WHAT,
            "-m",
            several=True,
        ),
    ]
    output: Annotated[
        str,
        Described(
            "NAME.zarr, NAME.tif or NAME.nii.gz for one image; else a folder that gets IMAGE.zarr each, or "
            "IMAGE_TARGET.tif and such.",
            "OUT",
            WHAT,
            "-o",
            once=True,
        ),
    ]
    targets: Annotated[tuple[str, ...] | None, FromKey(InferenceConfig, "output_targets")] = None
    patch_size: Annotated[tuple[int, ...] | None, FromKey(InferenceConfig, "patch_size")] = None
    instances: Annotated[InstanceRules | None, FromKey(InferenceConfig, "instances")] = None
    like: Annotated[
        str | None,
        Described("Repeat this prediction: its image, network and settings.", "OLD.zarr", WHAT, once=True),
    ] = None
    region: Annotated[
        OpenBox | None,
        Described(
            "Start:stop per spatial axis in voxels, such as 0:64,100:300,:; null: all.", "Z:Z,Y:Y,X:X", WHAT
        ),
    ] = None
    axes: Annotated[
        str | None,
        Described("Axes of the image, such as czyx; null: by its metadata and shape.", "LETTERS", WHAT),
    ] = None
    level: Annotated[int, Described("Resolution level of an OME-Zarr image.", "N", WHAT)] = 0
    device: Annotated[str, Described("Device: auto, cpu, cuda or cuda:N.", "NAME", HOW)] = "auto"
    workers: Annotated[int, FromKey(InferenceConfig, "num_dataloader_workers")] = (
        InferenceConfig.num_dataloader_workers
    )
    nonfinite: Annotated[
        Literal["zero", "refuse"] | None,
        Described("NaN or infinity in the image: replace by 0, or stop; null: as in training.", group=HOW),
    ] = None
    nworkers: Annotated[
        int,
        Described(
            "Worker processes on this machine, one per GPU; with a scheduler: workers to wait for.",
            "N",
            SEVERAL,
        ),
    ] = 1
    scheduler: Annotated[
        str | None,
        Described(
            "Address of a Dask scheduler whose workers predict, such as tcp://node:8786.", "ADDRESS", SEVERAL
        ),
    ] = None
    format: Annotated[
        Literal["zarr", "tif", "nifti", "hdf5", "mrc", "nrrd", "precomputed", "webknossos"] | None,
        Described("Format of the output; null: by its name.", group=RESULT),
    ] = None
    overwrite: Annotated[bool, Described("Remove an earlier prediction in the output.", group=RESULT)] = False

    @property
    def is_shared(self) -> bool:
        """Whether other processes do the work."""
        return self.scheduler is not None or self.nworkers > 1


@dataclass(frozen=True)
class VolumeReport:
    """The result of predicting one volume.

    Args:
        input: the image.
        output: the OME-Zarr group, or the record of the files.
        windows: windows that the network processed; a window that several workers computed counts several times.
        skipped: windows without content.
        blocks: blocks written in this run.
        corrupt: boxes of the image that could not be read.
        seconds: wall time.
        already_done: whether the output was already finished.
        augmentation: cost and gain of test-time augmentation over the blocks of this run; None without it.
    """

    input: str
    output: str
    windows: int = 0
    skipped: int = 0
    blocks: int = 0
    corrupt: tuple[Box, ...] = ()
    seconds: float = 0.0
    already_done: bool = False
    augmentation: AugmentationReport | None = None


@dataclass(frozen=True)
class PredictReport:
    """The results for every volume of a request."""

    volumes: tuple[VolumeReport, ...] = field(default_factory=tuple)


def log_report(report: PredictReport) -> None:
    """Log the results, one line per volume."""
    for volume in report.volumes:
        if volume.already_done:
            logger.info("%s: finished already, nothing to do", volume.output)
            continue
        logger.info(
            "%s: %d windows in %.1f s, %d skipped as empty",
            volume.output,
            volume.windows,
            volume.seconds,
            volume.skipped,
        )
        if volume.augmentation is not None:
            logger.info("%s: %s", volume.output, volume.augmentation)
        for box in volume.corrupt:
            logger.warning("%s: left empty, unreadable in the image: %s", volume.output, box)
