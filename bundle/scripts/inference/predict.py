"""Prediction of whole volumes, streamed from file to file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.placement import OBLIQUE_DEGREES
from volumen.data.space.geometry import AxisTurn, directions_of, nearest_turn
from volumen.data.space.resampling import Resampling
from volumen.inference.blocks.block_maker import make_blocks
from volumen.inference.blocks.products import Outputs
from volumen.inference.checks.disk_space import check_space, telling_of_full_disk
from volumen.inference.checks.image import check_image, check_kind, log_small
from volumen.inference.ensemble import load_model
from volumen.inference.gain import AugmentationReport, dice, find_labels
from volumen.inference.jobs import Job, find_jobs, volume_name
from volumen.inference.output.block_log import OutputState
from volumen.inference.output.exports import check_export, format_of
from volumen.inference.output.stored import instance_specs
from volumen.inference.postprocess.instance_output import resolve_request
from volumen.inference.postprocess.passes import run_here
from volumen.inference.predictor import Predictor
from volumen.inference.progress import Progress
from volumen.inference.record.machine import describe_machine
from volumen.inference.record.provenance import make_provenance, nonfinite_rule
from volumen.inference.record.reproduce import check_same, provenance_of
from volumen.inference.request import PredictReport, PredictRequest, VolumeReport
from volumen.inference.resampling import check_resampled, resampling_to_training
from volumen.inference.volume_plan import (
    blocks_outside_mask,
    check_names,
    cleaning_rules,
    make_plan,
    output_spec,
)
from volumen.inference.volume_work import MemberWork, VolumeWork
from volumen.inference.windows.heads import Head
from volumen.inference.windows.plan import PredictPlan
from volumen.inference.windows.stream import StreamCounts, count_needed
from volumen.inference.windows.tta import check_layouts, transforms
from volumen.transforms.normalize import NormalizerOfType
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.distributed.cluster import Cluster
    from volumen.inference.nnunet.preparation import Preparation, Prepared

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
        progress: called with a volume's name, the windows finished and all windows; then, for each pass over its
            blocks, with the name and the pass, the blocks finished and all blocks.
        predictor: the request's network or ensemble if it is already loaded.

    Raises:
        VolumenError: an error that the user can correct.
    """
    if request.nworkers < 1:
        raise VolumenError("--nworkers", expected="at least 1", found=request.nworkers)
    if predictor is None:
        device = "cpu" if request.is_shared else request.device
        predictor = load_model(request.checkpoint, choose_device(device), fuse=True)
    if not request.fuse:
        predictor = predictor.unfused()
    request = resolve_request(request, predictor)
    for name, heads in predictor.fused.items():
        if name in (request.targets or predictor.targets):
            logger.info("%s: read from the heads %s (fuse)", name, ", ".join(heads))
    jobs = find_jobs(
        request,
        output_names(predictor, request),
        len(predictor.patch_size),
        None if predictor.preparation is None else predictor.in_channels,
    )
    if request.is_shared:
        from volumen.inference.distributed.cluster import open_cluster

        with open_cluster(request) as cluster:
            return PredictReport(predict_shared(cluster, predictor, jobs, request, progress))
    for job in jobs:
        check_kind(predictor, job.image)  # every image, before the first one is predicted
    reports = []
    for job in jobs:
        counter = None if progress is None else Progress(volume_name(job.image.source), progress)
        reports.append(predict_volume(predictor, job, request, progress=counter))
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
    counter = None if progress is None else Progress(name, progress, stages=len(jobs) == 1)
    with ThreadPoolExecutor(cluster.volumes_at_once, thread_name_prefix="volume") as pool:
        futures = [
            pool.submit(predict_volume, predictor, job, request, progress=counter, cluster=cluster)
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
        len(transforms(work.request.tta, _seen_patch(work), predictor.spacing, predictor.mirror_axes)),
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
    prepared = _prepared(predictor, image, request)
    turn, resampling = _turn_and_grid(predictor, image, heads, prepared)
    plan = make_plan(predictor, image.shape, heads, request, turn)
    grid_plan = None
    if resampling is not None:
        check_resampled(image, heads)
        grid_plan = make_grid_plan(predictor, plan, resampling, heads, request, turn)
    windows = grid_plan or plan
    others = tuple(
        _member_work(member, job, heads, request, windows, resampling, predictor.preparation, prepared)
        for member in predictor.networks[1:]
    )
    usual = tuple(request.patch_size or predictor.patch_size)
    usual = usual if turn is None else turn.undo_axes(usual)
    log_small(image, windows.shape, windows.patch_size, usual, windows.rules)
    stored = [output_spec(head, request) for head in heads]
    outputs = [*stored, *instance_specs(request.instances)]
    check_names(outputs)
    check_export(format_of(request.output, request.format)[0], outputs, request.output)
    return VolumeWork(
        job,
        request,
        plan,
        tuple(stored),
        cleaning_rules(request, stored),
        _normalizer(predictor, image, resampled=resampling is not None),
        precision,
        _spacing_without_one(predictor, turn),
        nonfinite_rule(request, predictor),
        # Labels are of the image's own voxels, while windows of a resampled image are not.
        {} if request.tta == "none" or resampling else find_labels(image.path, heads, predictor.config),
        turn,
        class_names(predictor.config),
        others,
        resampling,
        grid_plan,
        prepared,
    )


def _prepared(predictor: Predictor, image: Volume, request: PredictRequest) -> Prepared | None:
    """Return what a network of another program sees of an image; None for a network of this one."""
    if predictor.preparation is None:
        return None
    return predictor.preparation.of(
        image, on_corrupt=request.on_corrupt, nonfinite=nonfinite_rule(request, predictor)
    )


def _turn_and_grid(
    predictor: Predictor, image: Volume, heads: Sequence[Head], prepared: Prepared | None
) -> tuple[AxisTurn | None, Resampling | None]:
    """Return how windows are turned, and the network's grid where it is not the image's."""
    if prepared is not None:
        return prepared.turn, None if prepared.grid.is_identity else prepared.grid
    turn = turn_to_training(predictor, image, heads)
    return turn, resampling_to_training(predictor.trained_grid, image, turn)


def _spacing_without_one(predictor: Predictor, turn: AxisTurn | None) -> tuple[float, ...] | None:
    """Return the voxel size, along the axes of an image, for an image that states none."""
    size = predictor.assumed_spacing or predictor.spacing
    return size if turn is None or size is None else turn.undo_axes(size)


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
    preparation: Preparation | None,
    prepared: Prepared | None,
) -> MemberWork:
    """Return what a further member of an ensemble does for a volume, over the blocks of the first one.

    Raises:
        VolumenError: it was trained at another voxel size than the first one, or on images prepared in another way.
    """
    if member.preparation != preparation:
        raise VolumenError(
            member.path,
            expected="the plan of the first member, by which nnU-Net prepares images for all of them",
            found="another one" if member.preparation else "a network of volumen",
            remedy="predict with it alone",
        )
    turn, own = _turn_and_grid(member, job.image, heads, prepared)
    if own != resampling:
        raise VolumenError(
            member.path,
            expected="the target_spacing of the first member, since members are averaged on one grid",
            found="none" if member.trained_grid is None else member.trained_grid.geometry.text(),
            remedy="predict with it alone",
        )
    plan = make_plan(member, windows.shape, tuple(heads), replace(request, region=windows.region), turn)
    normalizer = _normalizer(member, job.image, resampled=resampling is not None)
    return MemberWork(replace(plan, block_shape=windows.block_shape), normalizer, turn)


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
