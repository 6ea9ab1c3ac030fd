"""What to predict and how, and what was done: plain values."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from volumen.inference.gain import AugmentationReport
from volumen.inference.rules import InstanceRules
from volumen.inference.windows.plan import Box

logger = logging.getLogger(__name__)

OpenBox = tuple[tuple[int | None, int | None], ...]
"""Start and stop of each spatial axis, None for the volume's own."""


@dataclass(frozen=True)
class PredictRequest:
    """What to predict and how.

    Args:
        input: an image or a folder of images.
        checkpoint: the trained network.
        output: for one image `NAME.zarr`, `NAME.tif` or `NAME.nii.gz`; else a folder that gets
            `<image name>.zarr` per image, or `<image name>_<target>.tif` and such per target.
        targets: outputs wanted; None for all.
        overlap: share of a window that the next one covers, in [0, 1).
        batch_size: windows given to the network at once.
        patch_size: shape of a window; None for that of the training.
        device: "auto", "cpu", "cuda" or "cuda:N".
        amp: "auto", "off", "bfloat16" or "float16".
        tta: "none", "mirror" or "rotate".
        mask: volume of the image's shape, or a folder with one per image; predicted where above 0.
        region: start and stop per spatial axis, None for the volume's own; None for all.
        skip_empty: whether windows without contrast are left at 0.
        dtype: "uint8", "float16", "float32" or "labels".
        threshold: probability from which on a label is 1; setting it asks for labels.
        min_size: label components of fewer voxels are removed.
        keep_largest: label components kept of each class; None for all.
        fill_holes: holes of up to this many voxels are filled in label maps of one class.
        instances: what instances are made from and how; None for none. Their heads are stored as probabilities.
        compress: "zstd", "lz4", "gzip" or "none".
        pyramid: whether coarser levels are made.
        format: "zarr", "tif" or "nifti"; None to go by the output's name.
        overwrite: whether an earlier prediction in the output may be removed.
        on_corrupt: "stop" or "skip", for chunks of the image that cannot be read.
        nonfinite: "zero" or "refuse", for NaN and infinity in the image; None as in training.
        axes: letters of the image's axes where its metadata leave them open.
        level: resolution level of an OME-Zarr image.
        workers: threads that read, and as many that write.
        like: earlier prediction of which this one is a repetition: its network and image are compared.
        nworkers: processes that share the work, each with a GPU of its own where there are several; with a scheduler,
            how many of its workers to wait for.
        scheduler: address of a Dask scheduler whose workers do the work, such as "tcp://node:8786".
    """

    input: str
    checkpoint: str
    output: str
    targets: tuple[str, ...] | None = None
    overlap: float = 0.5
    batch_size: int = 1
    patch_size: tuple[int, ...] | None = None
    device: str = "auto"
    amp: str = "auto"
    tta: str = "none"
    mask: str | None = None
    region: OpenBox | None = None
    skip_empty: bool = True
    dtype: str = "uint8"
    threshold: float | None = None
    min_size: int = 0
    keep_largest: int | None = None
    fill_holes: int = 0
    instances: InstanceRules | None = None
    compress: str = "zstd"
    pyramid: bool = True
    format: str | None = None
    overwrite: bool = False
    on_corrupt: str = "stop"
    nonfinite: str | None = None
    axes: str | None = None
    level: int = 0
    workers: int = 2
    like: str | None = None
    nworkers: int = 1
    scheduler: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other processes do the work."""
        return self.scheduler is not None or self.nworkers > 1


@dataclass(frozen=True)
class VolumeReport:
    """What was done for one volume.

    Args:
        input: the image.
        output: the OME-Zarr group, or the record of the files.
        windows: windows that the network saw, those that several workers computed counted each time.
        skipped: windows without content.
        blocks: blocks written, in this run.
        corrupt: boxes of the image that could not be read.
        seconds: wall time.
        already_done: whether the output was finished before.
        augmentation: what test-time augmentation cost and gained, over the blocks of this run; None without it.
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
    """What was done for every volume of a request."""

    volumes: tuple[VolumeReport, ...] = field(default_factory=tuple)


def log_report(report: PredictReport) -> None:
    """Log what was done, a line per volume."""
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
