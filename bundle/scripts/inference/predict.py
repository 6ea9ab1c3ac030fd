"""Prediction of whole volumes, streamed from file to file."""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.placement import OBLIQUE_DEGREES, warn_impossible
from volumen.data.space.geometry import AxisTurn, Geometry, directions_of, nearest_turn
from volumen.data.space.resampling import Resampling
from volumen.inference.block_maker import PARTIAL_SUMS_BYTES, make_blocks
from volumen.inference.ensemble import load_model
from volumen.inference.gain import AugmentationReport, dice, find_labels
from volumen.inference.intensity_check import check_intensities
from volumen.inference.jobs import Job, find_jobs, volume_name
from volumen.inference.output.block_log import OutputState
from volumen.inference.output.exports import format_of
from volumen.inference.output.ome_zarr import LABELS, target_group
from volumen.inference.output.stored import OutputSpec, instance_specs
from volumen.inference.postprocess.instance_output import resolve_request
from volumen.inference.postprocess.passes import run_here
from volumen.inference.predictor import Predictor
from volumen.inference.products import Outputs
from volumen.inference.progress import Progress
from volumen.inference.record.machine import describe_machine
from volumen.inference.record.provenance import make_provenance, nonfinite_rule
from volumen.inference.record.reproduce import check_same, provenance_of
from volumen.inference.request import OpenBox, PredictReport, PredictRequest, VolumeReport
from volumen.inference.resampling import check_resampled, resampling_to_training
from volumen.inference.rules import CleaningRules
from volumen.inference.volume_work import MemberWork, VolumeWork
from volumen.inference.windows.heads import Head
from volumen.inference.windows.plan import Box, PredictPlan, choose_block_shape, choose_tile
from volumen.inference.windows.stream import StreamCounts, count_needed
from volumen.inference.windows.tta import check_layouts, transforms
from volumen.transforms.normalize import NormalizerOfType
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import by, counted

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.distributed.cluster import Cluster

logger = logging.getLogger(__name__)


def predict(
    request: PredictRequest,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    predictor: Predictor | None = None,
) -> PredictReport:
    """Predict every volume of a request.

    Args:
        request: what to predict and how.
        progress: called with a volume's name, windows settled and all windows; then, for each pass over its blocks,
            with the name and the pass, the blocks made and all blocks.
        predictor: the request's network or ensemble where it is loaded already.

    Raises:
        VolumenError: an error that the user can correct.
    """
    if request.nworkers < 1:
        raise VolumenError("--nworkers", expected="at least 1", found=request.nworkers)
    if predictor is None:
        device = "cpu" if request.is_shared else request.device
        predictor = load_model(request.checkpoint, choose_device(device))
    request = resolve_request(request, predictor)
    jobs = find_jobs(request, output_names(predictor, request), len(predictor.patch_size))
    if request.is_shared:
        from volumen.inference.distributed.cluster import open_cluster

        with open_cluster(request) as cluster:
            return PredictReport(predict_shared(cluster, predictor, jobs, request, progress))
    for job in jobs:
        check_kind(predictor, job.image)  # every image, before the first one is predicted
    reports = []
    for job in jobs:
        told = None if progress is None else Progress(volume_name(job.image.source), progress)
        reports.append(predict_volume(predictor, job, request, progress=told))
    return PredictReport(tuple(reports))


def predict_shared(
    cluster: Cluster,
    predictor: Predictor,
    jobs: list[Job],
    request: PredictRequest,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[VolumeReport, ...]:
    """Predict as many volumes at the same time as there are workers.

    Args:
        cluster: the workers.
        predictor: the network, which workers load from its checkpoint.
        jobs: the volumes.
        request: the settings.
        progress: as for `predict`.
    """
    cluster.volumes_at_once = min(len(jobs), max(1, cluster.workers))
    name = volume_name(jobs[0].image.source) if len(jobs) == 1 else f"{len(jobs)} volumes"
    told = None if progress is None else Progress(name, progress, stages=len(jobs) == 1)
    with ThreadPoolExecutor(cluster.volumes_at_once, thread_name_prefix="volume") as pool:
        futures = [
            pool.submit(predict_volume, predictor, job, request, progress=told, cluster=cluster)
            for job in jobs
        ]
        try:
            return tuple(future.result() for future in futures)
        except BaseException:
            cluster.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def output_names(predictor: Predictor, request: PredictRequest) -> tuple[str, ...]:
    """Return the names of the arrays that a prediction writes: those of the heads, then those of the instances."""
    extra = instance_specs(request.instances)
    return tuple(item.name for item in (*predictor.heads(request.targets), *(s.head for s in extra)))


def predict_volume(
    predictor: Predictor,
    job: Job,
    request: PredictRequest,
    *,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> VolumeReport:
    """Predict one volume.

    Args:
        predictor: the network.
        job: the volume, and where its prediction is written.
        request: the settings.
        progress: counts finished windows.
        cluster: the workers of a shared request; None: opened for this volume.

    Raises:
        VolumenError: the image does not fit the network, the output holds something else, or space runs out.
    """
    if request.is_shared and cluster is None:
        from volumen.inference.distributed.cluster import open_cluster

        with open_cluster(request) as opened:
            return predict_volume(predictor, job, request, progress=progress, cluster=opened)
    began = time.perf_counter()
    machine = cluster.machine if cluster else describe_machine(predictor.device, request.amp)
    work = plan_work(predictor, job, request, machine.precision)
    provenance = make_provenance(predictor, work, machine)
    if request.like is not None:
        check_same(provenance_of(Path(request.like)), provenance, request.like)
    state = open_state(job, provenance, work.window_plan, overwrite=request.overwrite)
    if state is None:
        return VolumeReport(job.image.path, job.shown, already_done=True)
    left_out = None if work.resampling else blocks_outside_mask(job.mask, work.plan)
    check_space(job.output, work, 1.0 if left_out is None else 1.0 - float(left_out.mean()))
    outputs = Outputs(work, sparse=left_out is not None)
    callback = None if progress is None else progress.stage
    try:
        with telling_of_full_disk(job.shown):
            state.begin()
            if left_out is not None:
                state.leave_out(left_out)
            outputs.create()
            if cluster is None:
                counts = _make_here(work, predictor, state, progress)
                outputs.complete(state, run_here(request.workers, callback))
            else:
                with state.token() as token:
                    counts = cluster.make(work, predictor, state, token, progress)
                    outputs.complete(state, cluster.runner(token, callback))
    finally:
        state.close()
    return VolumeReport(
        job.image.path,
        job.shown,
        windows=counts.windows,
        skipped=counts.skipped,
        blocks=counts.blocks,
        corrupt=tuple(state.corrupt),
        seconds=time.perf_counter() - began,
        augmentation=report_augmentation(work, predictor, counts),
    )


def report_augmentation(
    work: VolumeWork, predictor: Predictor, counts: StreamCounts
) -> AugmentationReport | None:
    """Return the cost and gain of test-time augmentation, or None if there was none."""
    if work.request.tta == "none":
        return None
    plain, every = counts.seconds
    return AugmentationReport(
        work.request.tta,
        len(transforms(work.request.tta, _seen_patch(work), predictor.spacing)),
        every / plain if plain else None,
        {name: dice(overlaps) for name, overlaps in counts.overlaps.items()},
    )


def _seen_patch(work: VolumeWork) -> tuple[int, ...]:
    """Return the patch size along the network's axes."""
    patch = work.window_plan.patch_size
    return patch if work.turn is None else work.turn.of_axes(patch)


def plan_work(predictor: Predictor, job: Job, request: PredictRequest, precision: str) -> VolumeWork:
    """Check a volume and the settings; return everything that decides the volume's prediction.

    Raises:
        VolumenError: the image does not fit the network, or a setting is impossible.
    """
    image = job.image
    check_image(predictor, image)
    heads = predictor.heads(request.targets)
    check_layouts(heads, request.tta)
    turn = turn_to_training(predictor, image, heads)
    resampling = resampling_to_training(predictor.trained_grid, image, turn)
    plan = make_plan(predictor, image.shape, heads, request, turn)
    grid_plan = None
    if resampling is not None:
        check_resampled(image, heads)
        grid_plan = make_grid_plan(predictor, plan, resampling, heads, request, turn)
    windows = grid_plan or plan
    others = tuple(
        _member_work(member, job, heads, request, windows, resampling) for member in predictor.networks[1:]
    )
    log_small(image, windows.shape, windows.patch_size, request.patch_size or predictor.patch_size)
    stored = [output_spec(head, request) for head in heads]
    _check_names([*stored, *instance_specs(request.instances)])
    return VolumeWork(
        job,
        request,
        plan,
        tuple(stored),
        cleaning_rules(request, stored),
        _normalizer(predictor, image, resampled=resampling is not None),
        precision,
        predictor.spacing if turn is None or predictor.spacing is None else turn.undo_axes(predictor.spacing),
        nonfinite_rule(request, predictor),
        # Labels are of the image's own voxels, while windows of a resampled image are not.
        {} if request.tta == "none" or resampling else find_labels(image.path, heads, predictor.config),
        turn,
        class_names(predictor.config),
        others,
        resampling,
        grid_plan,
    )


def _normalizer(
    predictor: Predictor, image: Volume, *, resampled: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Return what maps the values of windows: interpolated ones are normalised as the stored ones are."""
    normalizer = predictor.normalizer.for_volume(image)
    return NormalizerOfType(normalizer, image.dtype) if resampled else normalizer


def make_grid_plan(
    predictor: Predictor,
    plan: PredictPlan,
    resampling: Resampling,
    heads: Sequence[Head],
    request: PredictRequest,
    turn: AxisTurn | None,
) -> PredictPlan:
    """Return the windows and blocks on the network's grid, for the part of it that the output's voxels need.

    Args:
        predictor: the network.
        plan: blocks of the output, on the voxels of the image.
        resampling: the network's grid.
        heads, request, turn: as for `make_plan`.
    """
    region = resampling.resampled_box(plan.box) if request.region else None
    there = replace(request, region=region)
    return make_plan(predictor, resampling.resampled_shape, tuple(heads), there, turn)


def _member_work(
    member: Predictor,
    job: Job,
    heads: Sequence[Head],
    request: PredictRequest,
    windows: PredictPlan,
    resampling: Resampling | None,
) -> MemberWork:
    """Return what a further member of an ensemble does for a volume, over the blocks of the first one.

    Raises:
        VolumenError: it was trained at another voxel size than the first one.
    """
    turn = turn_to_training(member, job.image, heads)
    own = resampling_to_training(member.trained_grid, job.image, turn)
    if own != resampling:
        raise VolumenError(
            member.path,
            expected="the target_spacing of the first member, since members are averaged on one grid",
            found="none" if member.trained_grid is None else member.trained_grid.text(),
            remedy="predict with it alone",
        )
    plan = make_plan(member, windows.shape, tuple(heads), replace(request, region=windows.region), turn)
    normalizer = _normalizer(member, job.image, resampled=resampling is not None)
    return MemberWork(replace(plan, block_shape=windows.block_shape), normalizer, turn)


def _check_names(stored: Sequence[OutputSpec]) -> None:
    """Refuse an image that would be stored in the group of the label maps.

    Raises:
        VolumenError: a target named "labels", which is no label map itself, is stored beside label maps.
    """
    groups = {target_group(item) for item in stored}
    if LABELS in groups and any(group.startswith(f"{LABELS}/") for group in groups):
        raise VolumenError(
            f"target {LABELS}",
            "cannot be stored as an image where the label maps of other targets are stored",
            remedy="predict it by itself with --targets",
        )


def class_names(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the names of classes by target from a training's settings; targets without names are left out."""
    targets = (config.get("dataset_config") or {}).get("targets") or {}
    return {name: tuple(entry["classes"]) for name, entry in targets.items() if entry.get("classes")}


def turn_to_training(predictor: Predictor, image: Volume, heads: Sequence[Head]) -> AxisTurn | None:
    """Return the turn that gives an image the axis directions of the training volumes; None if it has them already.

    The network receives turned windows, and its outputs are turned back, so that a prediction has its image's axes.

    Raises:
        VolumenError: the directions differ, and a head's channels depend on directions that cannot be turned back.
    """
    trained, own = predictor.orientation, image.geometry.orientation
    if trained is None or own is None or len(trained) != len(own):
        return None
    turn, angle = nearest_turn(directions_of(trained), image.geometry)
    if angle > OBLIQUE_DEGREES:
        logger.warning("%s: its axes lie at %.0f degrees to %s, as in training", image.path, angle, trained)
    if turn.is_identity:
        return None
    for head in heads:
        # Turned offsets compare with partners that may lie outside the window.
        if head.layout is None or any(part.kind == "offsets" for part in head.layout):
            raise VolumenError(
                image.path,
                expected=f"axes that run to {trained}, as in training, for {head.name}",
                found=own,
                remedy="turn the file, or leave that target out with --targets",
            )
    logger.warning(
        "%s: its axes run to %s, those of the training to %s; windows are turned for the network and back",
        image.path,
        own,
        trained,
    )
    return turn


def _make_here(
    work: VolumeWork, predictor: Predictor, state: OutputState, progress: Progress | None
) -> StreamCounts:
    if progress is not None:
        progress.expect(sum(count_needed(member.plan, state.done) for member in work.members))
    return make_blocks(work, predictor, state, state.done, scratch=state.folder, progress=progress)


def open_state(
    job: Job, provenance: Mapping[str, Any], plan: PredictPlan, *, overwrite: bool
) -> OutputState | None:
    """Open the state of a job's output; return None if the prediction is already finished.

    Raises:
        VolumenError: the output holds something else.
    """
    if job.export is not None and job.export.resolve(provenance, overwrite=overwrite):
        return None
    state = OutputState(job.output, provenance, plan.blocks, overwrite=overwrite)
    return None if state.finished else state


@contextmanager
def telling_of_full_disk(where: str) -> Iterator[None]:
    """Turn the error of a full disk into one that names a remedy."""
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


def check_kind(predictor: Predictor, image: Volume) -> None:
    """Refuse an image that the network cannot process.

    Raises:
        VolumenError: the number of axes or channels differs, or values are floating-point and their range is unknown.
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
            expected=f"{counted(predictor.in_channels, 'channel')}, as in training",
            found=image.channels,
            remedy="say which axis is the channels' with --axes",
        )
    if _is_scaled_by_type(predictor) and image.dtype.kind == "f":
        raise VolumenError(
            image.path,
            expected="values of type uint8, as in training, which 255 brings to [0, 1]",
            found=f"type {image.dtype.name}",
            remedy="convert it as the training images were",
        )


def _is_scaled_by_type(predictor: Predictor) -> bool:
    """Whether training scaled its images to [0, 1] by the range of their type, which it does for uint8 only."""
    dataset = predictor.config.get("dataset_config") or {}
    return dataset.get("normalization_scheme") == "unit" and not dataset.get("intensity_properties")


def check_image(predictor: Predictor, image: Volume) -> None:
    """Compare an image with the training images; log a warning for differences that do not prevent a prediction.

    Raises:
        VolumenError: see `check_kind`.
    """
    check_kind(predictor, image)
    properties = predictor.config.get("dataset_config", {}).get("intensity_properties") or {}
    dtypes = properties.get("dtypes") or (["uint8"] if _is_scaled_by_type(predictor) else None)
    if dtypes and image.dtype.name not in dtypes:
        logger.warning(
            "%s: values of type %s, the network was trained on %s",
            image.path,
            image.dtype,
            " and ".join(dtypes),
        )
    check_intensities(predictor.config, predictor.normalizer, image)
    _check_spacing(predictor, image)


def _check_spacing(predictor: Predictor, image: Volume) -> None:
    """Warn of a voxel size unlike the training volumes'; without units only the ratios of axes are compared."""
    warn_impossible(image)
    if predictor.resamples:
        return
    trained = Geometry(predictor.spacing, predictor.unit)
    own = image.geometry.in_unit(trained.unit)
    if own.spacing is None or trained.spacing is None:
        return
    sizes, directions = own.spacing, predictor.orientation
    if directions is not None and image.geometry.orientation is not None and len(directions) == len(sizes):
        sizes = nearest_turn(directions_of(directions), image.geometry)[0].of_axes(sizes)
    ratios = [a / b for a, b in zip(sizes, trained.spacing, strict=True)]
    if own.unit is None or own.unit != trained.unit:
        ratios = [ratio / ratios[0] for ratio in ratios]
    if max(ratios) > 1.25 or min(ratios) < 0.8:
        logger.warning(
            "%s: spacing %s, the network was trained on %s; it is not resampled, since the training had no"
            " target_spacing",
            image.path,
            image.geometry.text(),
            trained.text(),
        )


def make_plan(
    predictor: Predictor,
    shape: tuple[int, ...],
    heads: tuple[Head, ...],
    request: PredictRequest,
    turn: AxisTurn | None = None,
) -> PredictPlan:
    """Return the windows and blocks for a volume.

    Args:
        predictor: the network.
        shape: spatial shape of the volume.
        heads: outputs to predict.
        request: the settings.
        turn: how windows are turned for the network; its patch size is along the network's axes.

    Raises:
        VolumenError: a region outside the volume, or an impossible overlap or patch.
    """
    patch = predictor.check_patch(request.patch_size or predictor.patch_size)
    seen = shape if turn is None else turn.of_axes(shape)
    patch = predictor.fit_patch(patch, seen)
    patch = patch if turn is None else turn.undo_axes(patch)
    region = resolve_region(request.region, shape)
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


def log_small(image: Volume, shape: Sequence[int], window: Sequence[int], usual: Sequence[int]) -> None:
    """Log which windows an image smaller than the usual window gets, and how much of them is reflected.

    Args:
        image: for its name.
        shape: voxels per axis, as the windows see the image.
        window: its windows.
        usual: the windows of larger images.
    """
    if all(size >= side for size, side in zip(shape, usual, strict=True)):
        return
    text = f"windows of {by(window)}"
    if tuple(window) != tuple(usual):
        text += f" instead of {by(usual)}"
    beyond = [
        f"{side - size} voxels along {axis}"
        for size, side, axis in zip(shape, window, "zyx"[-len(window) :], strict=True)
        if side > size
    ]
    if beyond:
        text += f", of which {' and '.join(beyond)} are reflected"
    logger.info("%s: %s is smaller than a window: %s", image.path, by(shape), text)


def resolve_region(region: OpenBox | None, shape: tuple[int, ...]) -> Box | None:
    """Return a region with a number for every bound.

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


def output_spec(head: Head, request: PredictRequest) -> OutputSpec:
    """Return how a head's result is stored.

    Raises:
        VolumenError: an unknown type or an impossible threshold.
    """
    kind = "labels" if request.threshold is not None else request.dtype
    if not head.is_probability and format_of(request.output, request.format)[0] != "zarr":
        kind = "float32"  # few programs read float16 files
    if kind == "labels" and request.instances is not None and head.name in request.instances.sources:
        kind = "uint8"
    try:
        return OutputSpec(head, kind, 0.5 if request.threshold is None else request.threshold)
    except ValueError as error:
        raise VolumenError("--dtype, --threshold", str(error)) from None


def cleaning_rules(request: PredictRequest, stored: list[OutputSpec]) -> CleaningRules:
    """Return the rules by which label maps are cleaned.

    Raises:
        VolumenError: nothing is stored as labels, or holes are to be filled in a map with several classes.
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


def blocks_outside_mask(mask: Volume | None, plan: PredictPlan) -> np.ndarray | None:
    """Return the blocks that no stored chunk of a mask touches, so that nothing is predicted in them.

    Args:
        mask: voxels that are not 0 are predicted; None: all voxels.
        plan: windows and blocks.

    Returns:
        Bool, shape `plan.blocks`; None if it is unknown which chunks of the mask are stored, or all are.
    """
    from volumen.data.formats.zarr_arrays.stored_chunks import absent_everywhere_but

    stored = None if mask is None else absent_everywhere_but(mask, 0)
    if stored is None or len(stored.indices) == stored.total:
        return None
    edges = [
        np.minimum(low + np.arange(count + 1) * size, high)
        for (low, high), count, size in zip(plan.box, plan.blocks, plan.block_shape, strict=True)
    ]
    outside = np.ones(plan.blocks, bool)
    outside[tuple(stored.cells(edges).T)] = False
    return outside


def check_space(output: Path, work: VolumeWork, share: float = 1.0) -> None:
    """Compare the free space with the size of the output.

    Args:
        output: folder of the output.
        work: the volume's prediction.
        share: share of the blocks that are not empty.

    Raises:
        VolumenError: not even a fifth of the uncompressed size is free.
    """
    voxels = math.prod(work.plan.output_shape)
    needed = sum(s.channels * s.dtype.itemsize * voxels for s in work.stored) * 8 / 7 * share
    if work.grid_plan is not None:
        grid = math.prod(work.grid_plan.output_shape)
        needed += sum(4 * s.head.blended_channels * grid for s in work.stored)
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed / 5:
        raise VolumenError(
            folder,
            expected=f"{_size_text(needed / 5)} to {_size_text(needed)} of free space",
            found=_size_text(free),
            remedy="make room, predict fewer targets, or a --region",
        )
    if free < needed:
        logger.warning(
            "%s: %s free for up to %s before compression", folder, _size_text(free), _size_text(needed)
        )


def _size_text(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
