"""Prediction of whole volumes, streamed from file to file."""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scripts.errors import VolumenError
from scripts.inference.blending import BlockAccumulator, axis_weight_sums, divide_by_weights
from scripts.inference.exports import DEFAULT_SUFFIX, FileExport, format_of
from scripts.inference.heads import Head, split_channels
from scripts.inference.journal import OutputState
from scripts.inference.like import check_same, recipe_of
from scripts.inference.precision import choose_device, choose_precision
from scripts.inference.predictor import Predictor, WindowNetwork, load_predictor
from scripts.inference.reader import WindowReader, cache_bytes
from scripts.inference.results import Stored
from scripts.inference.stream import Finished, StreamCounts, stream
from scripts.inference.windows import Box, PredictPlan, choose_block_shape, choose_tile
from scripts.inference.writers import ZarrOutput

if TYPE_CHECKING:
    from scripts.data.volumes import Volume

logger = logging.getLogger(__name__)

OpenBox = tuple[tuple[int | None, int | None], ...]
"""Start and stop of each spatial axis, None for the volume's own."""
PARTIAL_SUMS_BYTES = 1 << 24
"""Memory for partial sums; more goes to a temporary file beside the output."""
LEAST_CACHE_BYTES = 3 << 23
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
    request: PredictRequest, *, progress: Callable[[str, int, int], None] | None = None
) -> PredictReport:
    """Predict every volume of a request.

    Args:
        request: what to predict and how.
        progress: called with a volume's name, windows settled and all windows.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    device = choose_device(request.device)
    predictor = load_predictor(request.checkpoint, device)
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


@dataclass(frozen=True)
class Job:
    """One volume to predict.

    Args:
        image: the volume.
        output: the OME-Zarr group, the one that is streamed into where files are wanted.
        mask: volume that is predicted where it is not 0, or None.
        export: the files wanted, or None for the group itself.
    """

    image: Volume
    output: Path
    mask: Volume | None = None
    export: FileExport | None = None


def find_jobs(request: PredictRequest, targets: tuple[str, ...]) -> list[Job]:
    """Open the images of a request.

    Args:
        request: what to predict.
        targets: names of the outputs.

    Raises:
        VolumenError: nothing there, an unreadable image, or a mask that is missing or of another shape.
    """
    from scripts.data.volumes import open_volume

    images = image_paths(request.input)
    single = images == [request.input]
    kind, suffix = format_of(request.output, request.format)
    if not single and suffix:
        raise VolumenError(request.output, expected="a folder, since there are several images", found=suffix)
    jobs = []
    for path in images:
        image = open_volume(path, axes=request.axes, level=request.level)
        name = volume_name(path)
        mask = None
        if request.mask is not None:
            mask_path = Path(request.mask) if single else _mask_of(Path(request.mask), name)
            mask = open_volume(mask_path, ndim=len(image.shape))
            if mask.shape != image.shape:
                raise VolumenError(mask_path, expected=f"shape {image.shape}, as the image", found=mask.shape)
        folder = Path(request.output)
        if suffix:
            folder, name = folder.parent, folder.name[: -len(suffix)]
        if kind == "zarr":
            jobs.append(Job(image, folder / f"{name}.zarr", mask))
            continue
        ending = suffix or DEFAULT_SUFFIX[kind]
        export = FileExport(folder, name, targets, ending, plain=bool(suffix))
        jobs.append(Job(image, export.working, mask, export))
    if not jobs:
        raise VolumenError(
            request.input, "no image found", remedy="give an image, or a folder that holds some"
        )
    return jobs


def image_paths(source: str) -> list[str]:
    """Return the images of a path: itself, those in its `images` folder, or those in the folder itself."""
    from scripts.data.formats import detect_format

    path = Path(source)
    if "://" in source or not path.is_dir() or _is_zarr(path):
        return [source]
    folder = path / "images" if (path / "images").is_dir() else path
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        try:
            detect_format(entry)
        except VolumenError:
            continue
        found.append(str(entry))
    return found


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zattrs"))


def volume_name(path: str) -> str:
    """Return an image's name without folder and format: "a/b.ome.zarr" gives "b"."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    for suffix in (".ome.zarr", ".ome.tiff", ".ome.tif", ".nii.gz"):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return Path(name).stem if Path(name).suffix in (".zarr", ".tif", ".tiff", ".nii") else name


def _mask_of(folder: Path, name: str) -> Path:
    matches = sorted(p for p in folder.iterdir() if volume_name(str(p)) == name)
    matches = matches or sorted(p for p in folder.iterdir() if volume_name(str(p)).startswith(f"{name}_"))
    if len(matches) != 1:
        raise VolumenError(
            folder, expected=f"one mask named {name} or {name}_...", found=[p.name for p in matches] or "none"
        )
    return matches[0]


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
    image, mask, output = job.image, job.mask, job.output
    shown = str(job.export.sidecar if job.export else output)
    check_image(predictor, image)
    heads = predictor.heads(request.targets)
    plan = make_plan(predictor, image.shape, heads, request)
    stored = [stored_as(head, request) for head in heads]
    precision = choose_precision(request.amp, predictor.device)
    recipe = make_recipe(predictor, image, mask, request, plan, stored, precision)
    if request.like is not None:
        check_same(recipe_of(Path(request.like)), recipe, request.like)
    names = tuple(head.name for head in heads)
    if job.export is not None and job.export.settle(recipe, overwrite=request.overwrite):
        logger.info("%s is finished already", shown)
        return VolumeReport(image.path, shown, already_done=True)
    state = OutputState(output, recipe, names, plan.blocks, overwrite=request.overwrite)
    if state.finished:
        logger.info("%s is finished already", shown)
        return VolumeReport(image.path, shown, already_done=True)
    check_space(output, stored, plan)
    arrays = ZarrOutput(
        output,
        stored,
        plan.output_shape,
        plan.block_shape,
        spacing=image.spacing or predictor.spacing or (1.0,) * plan.ndim,
        unit=image.unit,
        origin=tuple(start for start, _ in plan.box),
        compress=request.compress,
        pyramid=request.pyramid and job.export is None,
    )
    reader = WindowReader(
        image,
        plan,
        predictor.normalizer,
        mask=mask,
        skip_empty=request.skip_empty,
        on_corrupt=request.on_corrupt,
    )
    budget = cache_bytes(image, plan.patch_size, LEAST_CACHE_BYTES, MOST_CACHE_BYTES)
    network = WindowNetwork(predictor, heads, plan.patch_size, tta=request.tta, precision=precision)
    try:
        with block_cache_of(budget):
            counts = _run(plan, state, arrays, reader, network, stored, request.workers, progress)
        arrays.build_pyramid(request.workers)
        extra = {"corrupt": [list(map(list, box)) for box in reader.corrupt]}
        if job.export is None:
            state.complete(extra)
        else:
            state.close()
            record = {"recipe": recipe, **extra}
            compress = request.compress != "none"
            job.export.write(arrays, record, affine=image.affine, compress=compress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise VolumenError(
            output,
            "no space left on the disk",
            remedy="make room and give the same command: it goes on from here",
        ) from error
    finally:
        state.close()
    return VolumeReport(
        image.path,
        shown,
        windows=counts.windows,
        skipped=counts.skipped,
        blocks=counts.blocks,
        corrupt=tuple(reader.corrupt),
        seconds=time.perf_counter() - began,
    )


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


def _run(
    plan: PredictPlan,
    state: OutputState,
    arrays: ZarrOutput,
    reader: WindowReader,
    network: WindowNetwork,
    stored: list[Stored],
    workers: int,
    progress: _Progress | None,
) -> StreamCounts:
    state.begin()
    arrays.create()
    finisher = BlockFinisher(plan, network.heads, stored, reader, arrays, state)
    if progress is not None:
        progress.total = len(plan)
    done = state.done
    with BlockAccumulator(plan, network.channels, PARTIAL_SUMS_BYTES, state.folder, done) as accumulator:
        counts = stream(
            plan,
            reader.window,
            network,
            accumulator,
            finisher,
            done=done if done.any() else None,
            workers=workers,
            progress=progress,
        )
    return counts


class BlockFinisher:
    """Turns the weighted sums of a block into stored values and writes them."""

    def __init__(
        self,
        plan: PredictPlan,
        heads: tuple[Head, ...],
        stored: list[Stored],
        reader: WindowReader,
        arrays: ZarrOutput,
        state: OutputState,
    ) -> None:
        self._plan, self._heads, self._stored = plan, heads, stored
        self._reader, self._arrays, self._state = reader, arrays, state
        self._sums = axis_weight_sums(plan)

    def __call__(self, finished: Finished) -> None:
        block, values, empty = finished
        box = self._plan.block_box(block)
        for name, result in self.results(box, values, empty):
            self._arrays.write(name, box, result)
        self._state.record(block)

    def results(
        self, box: tuple[slice, ...], values: np.ndarray | None, empty: list[tuple[slice, ...]]
    ) -> list[tuple[str, np.ndarray]]:
        """Return what is stored of every target for a block, 0 where it is empty."""
        shape = tuple(part.stop - part.start for part in box)
        if values is None:
            return [(s.head.name, np.zeros((s.channels, *shape), s.dtype)) for s in self._stored]
        values = np.ascontiguousarray(values[(slice(None), *(slice(0, n) for n in shape))])
        divide_by_weights(values, self._sums, box)
        parts = split_channels(self._heads, torch.from_numpy(values))
        outside = self._reader.masked_out(box)
        empty = [*empty, *self._reader.empty_parts(box)]
        results = []
        for stored in self._stored:
            result = stored.convert(stored.head.decode(parts[stored.head.name]).numpy())
            for part in empty:
                result[(slice(None), *part)] = 0
            if outside is not None:
                result[:, outside] = 0
            results.append((stored.head.name, result))
        return results


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
    trained = (predictor.config.get("dataset_config", {}).get("intensity_properties") or {}).get("dtype")
    if trained and str(trained) != str(image.dtype):
        logger.warning(
            "%s: values of type %s, the network was trained on %s", image.path, image.dtype, trained
        )
    if image.spacing and predictor.spacing:
        ratios = [
            a / b * predictor.spacing[0] / image.spacing[0]
            for a, b in zip(image.spacing, predictor.spacing, strict=True)
        ]
        if max(ratios) > 1.25 or min(ratios) < 0.8:
            logger.warning(
                "%s: spacing %s, the network was trained on %s", image.path, image.spacing, predictor.spacing
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


def make_recipe(
    predictor: Predictor,
    image: Volume,
    mask: Volume | None,
    request: PredictRequest,
    plan: PredictPlan,
    stored: list[Stored],
    precision: str,
) -> dict[str, Any]:
    """Return everything that shapes the result, as plain values."""
    return {
        "input": {"path": image.path, "fingerprint": image.fingerprint(), "axes": request.axes,
                  "level": request.level, "dtype": str(image.dtype), "shape": list(image.shape)},
        "mask": None if mask is None else {"path": mask.path, "fingerprint": mask.fingerprint()},
        "model": {"path": predictor.path, "sha256": predictor.checksum, "epoch": predictor.epoch},
        "targets": {s.head.name: {"channels": s.head.channels, "activation": s.head.activation,
                                  "kind": s.head.kind, "dtype": str(s.dtype)} for s in stored},
        "windows": {"patch_size": list(plan.patch_size), "overlap": plan.overlap, "count": len(plan),
                    "batch_size": plan.batch_size, "weights": "gaussian, sigma 1/8", "tile": list(plan.tile)},
        "region": [list(bounds) for bounds in plan.box],
        "blocks": list(plan.block_shape),
        "tta": request.tta,
        "precision": precision,
        "device": predictor.device.type,
        "skip_empty": request.skip_empty,
        "on_corrupt": request.on_corrupt,
        "dtype": request.dtype,
        "threshold": request.threshold,
        "format": format_of(request.output, request.format)[0],
        "compress": request.compress,
        "pyramid": request.pyramid,
        "versions": versions(),
        "machine": {"threads": torch.get_num_threads(), "device": device_name(predictor.device)},
        "made_of": plain(predictor.config),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    import platform

    import monai
    import zarr

    from scripts.version import __version__

    return {
        "volumen": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "monai": monai.__version__,
        "numpy": np.__version__,
        "zarr": zarr.__version__,
    }


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    import platform

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def plain(value: Any) -> Any:
    """Return a value with tuples as lists and keys as text, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


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
