"""Prediction of whole volumes, streamed from file to file."""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.errors import VolumenError
from scripts.inference.blending import BlockAccumulator
from scripts.inference.finish import BlockFinisher
from scripts.inference.heads import Head
from scripts.inference.jobs import Job, find_jobs, volume_name
from scripts.inference.journal import OutputState
from scripts.inference.like import check_same, recipe_of
from scripts.inference.outputs import Outputs
from scripts.inference.postprocess import CleaningRules
from scripts.inference.precision import choose_device, choose_precision
from scripts.inference.predictor import Predictor, WindowNetwork, load_predictor
from scripts.inference.reader import WindowReader, cache_bytes
from scripts.inference.recipe import make_recipe
from scripts.inference.results import Stored
from scripts.inference.stream import StreamCounts, stream
from scripts.inference.windows import Box, PredictPlan, choose_block_shape, choose_tile

if TYPE_CHECKING:
    from scripts.data.volumes import Volume

logger = logging.getLogger(__name__)

OpenBox = tuple[tuple[int | None, int | None], ...]
"""Start and stop of each spatial axis, None for the volume's own."""
PARTIAL_SUMS_BYTES = 1 << 23
"""Memory for partial sums, or twice what a window touches if that is more; the rest goes to a temporary file."""
LEAST_CACHE_BYTES = 1 << 24
MOST_CACHE_BYTES = 1 << 30
"""Memory for decoded input chunks: the least, and the most where chunks are large."""


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
        mask: volume of the image's shape, or a folder with one per image; predicted where not 0.
        region: start and stop per spatial axis, None for the volume's own; None for all.
        skip_empty: whether windows without contrast are left at 0.
        dtype: "uint8", "float16", "float32" or "labels".
        threshold: probability from which on a label is 1; setting it asks for labels.
        min_size: label components of fewer voxels are removed.
        keep_largest: label components kept of each class; None for all.
        fill_holes: holes of up to this many voxels are filled in label maps of one class.
        compress: "zstd", "lz4", "gzip" or "none".
        pyramid: whether coarser levels are made.
        format: "zarr", "tif" or "nifti"; None to go by the output's name.
        overwrite: whether an earlier prediction in the output may be removed.
        on_corrupt: "stop" or "skip", for chunks of the image that cannot be read.
        axes: letters of the image's axes where its metadata leave them open.
        level: resolution level of an OME-Zarr image.
        workers: threads that read, and as many that write.
        like: earlier prediction of which this one is a repetition: its network and image are compared.
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
    compress: str = "zstd"
    pyramid: bool = True
    format: str | None = None
    overwrite: bool = False
    on_corrupt: str = "stop"
    axes: str | None = None
    level: int = 0
    workers: int = 2
    like: str | None = None


@dataclass(frozen=True)
class VolumeReport:
    """What was done for one volume.

    Args:
        input: the image.
        output: the OME-Zarr group, or the record of the files.
        windows: windows that the network saw.
        skipped: windows without content.
        blocks: blocks written, in this run.
        corrupt: boxes of the image that could not be read.
        seconds: wall time.
        already_done: whether the output was finished before.
    """

    input: str
    output: str
    windows: int = 0
    skipped: int = 0
    blocks: int = 0
    corrupt: tuple[Box, ...] = ()
    seconds: float = 0.0
    already_done: bool = False


@dataclass(frozen=True)
class PredictReport:
    """What was done for every volume of a request."""

    volumes: tuple[VolumeReport, ...] = field(default_factory=tuple)


def predict(
    request: PredictRequest,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    predictor: Predictor | None = None,
) -> PredictReport:
    """Predict every volume of a request.

    Args:
        request: what to predict and how.
        progress: called with a volume's name, windows settled and all windows.
        predictor: the request's network where it is loaded already.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    if predictor is None:
        predictor = load_predictor(request.checkpoint, choose_device(request.device))
    jobs = find_jobs(request, tuple(head.name for head in predictor.heads(request.targets)))
    reports = []
    for job in jobs:
        told = None if progress is None else _Progress(volume_name(job.image.path), progress)
        reports.append(predict_volume(predictor, job, request, progress=told))
    return PredictReport(tuple(reports))


class _Progress:
    """Counts settled windows of one volume."""

    def __init__(self, name: str, tell: Callable[[str, int, int], None]) -> None:
        self._name, self._tell, self._count, self.total = name, tell, 0, 0

    def __call__(self, windows: int) -> None:
        self._count += windows
        self._tell(self._name, self._count, self.total)


def predict_volume(
    predictor: Predictor,
    job: Job,
    request: PredictRequest,
    *,
    progress: _Progress | None = None,
) -> VolumeReport:
    """Predict one volume.

    Args:
        predictor: the network.
        job: the volume, and where its prediction goes.
        request: how.
        progress: told of settled windows.

    Raises:
        VolumenError: the image does not fit the network, the output is another's, or space runs out.
    """
    began = time.perf_counter()
    image = job.image
    check_image(predictor, image)
    heads = predictor.heads(request.targets)
    plan = make_plan(predictor, image.shape, heads, request)
    stored = [stored_as(head, request) for head in heads]
    rules = cleaning_rules(request, stored)
    precision = choose_precision(request.amp, predictor.device)
    recipe = make_recipe(predictor, job, request, plan, stored, precision)
    if request.like is not None:
        check_same(recipe_of(Path(request.like)), recipe, request.like)
    state = open_state(job, recipe, plan, overwrite=request.overwrite)
    if state is None:
        logger.info("%s is finished already", job.shown)
        return VolumeReport(image.path, job.shown, already_done=True)
    check_space(job.output, stored, plan)
    reader = WindowReader(
        image,
        plan,
        predictor.normalizer.for_volume(image),
        mask=job.mask,
        skip_empty=request.skip_empty,
        on_corrupt=request.on_corrupt,
        on_note=state.note_corrupt,
    )
    network = WindowNetwork(predictor, heads, plan.patch_size, tta=request.tta, precision=precision)
    outputs = Outputs(job, state, plan, stored, rules, request, predictor.spacing)
    try:
        with telling_of_full_disk(job.shown):
            counts = _stream_volume(plan, state, reader, network, outputs, request.workers, progress)
            outputs.complete()
    finally:
        state.close()
    return VolumeReport(
        image.path,
        job.shown,
        windows=counts.windows,
        skipped=counts.skipped,
        blocks=counts.blocks,
        corrupt=tuple(state.corrupt),
        seconds=time.perf_counter() - began,
    )


def open_state(
    job: Job, recipe: Mapping[str, Any], plan: PredictPlan, *, overwrite: bool
) -> OutputState | None:
    """Return the state of a job's output to write into, or None where all is done already.

    Raises:
        VolumenError: the output is another's.
    """
    if job.export is not None and job.export.settle(recipe, overwrite=overwrite):
        return None
    state = OutputState(job.output, recipe, plan.blocks, overwrite=overwrite)
    return None if state.finished else state


@contextmanager
def telling_of_full_disk(where: str) -> Iterator[None]:
    """Turn the error of a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise VolumenError(
            where,
            "no space left on the disk",
            remedy="make room and give the same command: it goes on from here",
        ) from error


@contextmanager
def block_cache_of(budget: int) -> Iterator[None]:
    """Give decoded input chunks this much memory meanwhile."""
    from scripts.data.block_cache import BLOCKS

    before = BLOCKS.max_bytes
    BLOCKS.resize(budget)
    try:
        yield
    finally:
        BLOCKS.resize(before)


def _stream_volume(
    plan: PredictPlan,
    state: OutputState,
    reader: WindowReader,
    network: WindowNetwork,
    outputs: Outputs,
    workers: int,
    progress: _Progress | None,
) -> StreamCounts:
    state.begin()
    outputs.create()
    finisher = BlockFinisher(plan, network.heads, outputs.stored, reader, outputs.sinks, state)
    if progress is not None:
        progress.total = len(plan)
    done = state.done
    budget = cache_bytes(reader.image.volume, plan.patch_size, LEAST_CACHE_BYTES, MOST_CACHE_BYTES)
    with (
        block_cache_of(budget),
        BlockAccumulator(plan, network.channels, PARTIAL_SUMS_BYTES, state.folder, done) as accumulator,
    ):
        return stream(
            plan,
            reader.window,
            network,
            accumulator,
            finisher,
            done=done if done.any() else None,
            workers=workers,
            progress=progress,
        )


def check_image(predictor: Predictor, image: Volume) -> None:
    """Compare an image with what the network was trained on.

    Raises:
        VolumenError: another number of axes or channels.
    """
    ndim = len(predictor.patch_size)
    if len(image.shape) != ndim:
        raise VolumenError(
            image.path, expected=f"{ndim} spatial axes, as in training", found=f"shape {image.shape}",
            remedy="say which axes they are with --axes",
        )  # fmt: skip
    if image.channels != predictor.in_channels:
        raise VolumenError(
            image.path,
            expected=f"{predictor.in_channels} channels, as in training",
            found=image.channels,
            remedy="say which axis is the channels' with --axes",
        )
    properties = predictor.config.get("dataset_config", {}).get("intensity_properties") or {}
    dtypes = properties.get("dtypes")
    if dtypes and image.dtype.name not in dtypes:
        logger.warning(
            "%s: values of type %s, the network was trained on %s",
            image.path,
            image.dtype,
            " and ".join(dtypes),
        )
    _check_range(image, properties.get("channels") or [], predictor.patch_size)
    if image.spacing and predictor.spacing:
        ratios = [
            a / b * predictor.spacing[0] / image.spacing[0]
            for a, b in zip(image.spacing, predictor.spacing, strict=True)
        ]
        if max(ratios) > 1.25 or min(ratios) < 0.8:
            logger.warning(
                "%s: spacing %s, the network was trained on %s", image.path, image.spacing, predictor.spacing
            )


def _check_range(image: Volume, channels: Sequence[Mapping[str, float]], patch_size: tuple[int, ...]) -> None:
    """Warn when the window in the image's middle has another range of values than the training images."""
    if len(channels) != image.channels:
        return
    middle = tuple(
        slice(max((n - p) // 2, 0), min((n + p) // 2, n))
        for n, p in zip(image.shape, patch_size, strict=True)
    )
    try:
        values = image.read(middle)
    except (VolumenError, OSError):
        return  # told where it is predicted
    for found, known in zip(values, channels, strict=True):
        low, high = float(found.min()), float(found.max())
        width = known["max"] - known["min"]
        beyond = low < known["min"] - width / 2 or high > known["max"] + width / 2
        if beyond or 0 < high - low < width / 50:
            logger.warning(
                "%s: values from %g to %g in its middle, the network was trained on %g to %g",
                image.path,
                low,
                high,
                known["min"],
                known["max"],
            )


def make_plan(
    predictor: Predictor, shape: tuple[int, ...], heads: tuple[Head, ...], request: PredictRequest
) -> PredictPlan:
    """Return the windows and blocks for a volume.

    Raises:
        VolumenError: a region outside the volume, an overlap or a patch that cannot be.
    """
    patch = predictor.check_patch(request.patch_size or predictor.patch_size)
    region = settle_region(request.region, shape)
    if not 0 <= request.overlap < 1:
        raise VolumenError("--overlap", expected="a share of at least 0 and below 1", found=request.overlap)
    if request.batch_size < 1:
        raise VolumenError("--batch-size", expected="at least 1", found=request.batch_size)
    output_shape = tuple(b - a for a, b in region) if region else shape
    channels = sum(head.blended_channels for head in heads)
    return PredictPlan(
        shape,
        patch,
        request.overlap,
        region=region,
        block_shape=choose_block_shape(output_shape, patch),
        batch_size=request.batch_size,
        tile=choose_tile(patch, request.overlap, channels, PARTIAL_SUMS_BYTES),
    )


def settle_region(region: OpenBox | None, shape: tuple[int, ...]) -> Box | None:
    """Return a region with every bound spelled out.

    Raises:
        VolumenError: another number of axes, or bounds outside the volume.
    """
    if region is None:
        return None
    if len(region) == len(shape):
        box = tuple((a or 0, n if b is None else b) for (a, b), n in zip(region, shape, strict=True))
        if all(0 <= a < b <= n for (a, b), n in zip(box, shape, strict=True)):
            return box
    raise VolumenError("--region", expected=f"start:stop per axis inside {shape}", found=region)


def stored_as(head: Head, request: PredictRequest) -> Stored:
    """Return how a head's result is stored.

    Raises:
        VolumenError: an unknown type or an impossible threshold.
    """
    kind = "labels" if request.threshold is not None else request.dtype
    try:
        return Stored(head, kind, 0.5 if request.threshold is None else request.threshold)
    except ValueError as error:
        raise VolumenError("--dtype, --threshold", str(error)) from None


def cleaning_rules(request: PredictRequest, stored: list[Stored]) -> CleaningRules:
    """Return what is done to the label maps.

    Raises:
        VolumenError: rules for what is not stored as labels, or holes of a map with several classes.
    """
    rules = CleaningRules(request.min_size, request.keep_largest, request.fill_holes)
    if rules.does_nothing:
        return rules
    if not any(item.is_labels for item in stored):
        raise VolumenError(
            "--min-size, --keep-largest, --fill-holes",
            "they clean labels, and none are written",
            remedy="add --threshold or --dtype labels",
        )
    for item in stored:
        if rules.fill_holes and item.is_labels and item.head.activation == "softmax":
            raise VolumenError(
                "--fill-holes", f"{item.head.name} has several classes, and a hole belongs to none of them"
            )
    return rules


def check_space(output: Path, stored: list[Stored], plan: PredictPlan) -> None:
    """Compare the free space with what the output needs.

    Raises:
        VolumenError: not even a fifth of the uncompressed size is free.
    """
    voxels = math.prod(plan.output_shape)
    needed = sum(s.channels * s.dtype.itemsize * voxels for s in stored) * 8 / 7
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed / 5:
        raise VolumenError(
            folder,
            expected=f"{needed / 5e9:.1f} to {needed / 1e9:.1f} GB of free space",
            found=f"{free / 1e9:.1f} GB",
            remedy="make room, predict fewer targets, or a --region",
        )
    if free < needed:
        logger.warning(
            "%s: %.1f GB free for up to %.1f GB before compression", folder, free / 1e9, needed / 1e9
        )
