"""Collects the provenance of a prediction: everything that decides its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from volumen.inference.output.exports import format_of
from volumen.inference.output.stored import instance_specs
from volumen.inference.record.machine import Machine
from volumen.inference.record.reproduce import content_of
from volumen.inference.settings import recorded_settings

if TYPE_CHECKING:
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.volume_work import VolumeWork


def make_provenance(predictor: Predictor, work: VolumeWork, machine: Machine) -> dict[str, Any]:
    """Return everything that shapes the result, as plain values.

    Args:
        predictor: the network.
        work: what is done for the volume.
        machine: where.
    """
    request, stored, plan = work.request, work.stored, work.window_plan
    image, mask = work.job.image, work.job.mask
    settings = plain(recorded_settings(request))
    return {
        **settings,
        "input": {"path": image.source, "array": image.path,
                  "fingerprint": image.fingerprint(), "content": content_of(image), "axes": request.axes,
                  "level": request.level, "dtype": str(image.dtype), "shape": list(image.shape),
                  "geometry": image.geometry.plain()},
        "mask": None if mask is None else {"path": mask.path, "fingerprint": mask.fingerprint(),
                                           "content": content_of(mask)},
        "model": {"path": predictor.path, "sha256": predictor.checksum, "epoch": predictor.epoch,
                  **_members(predictor)},
        "targets": {s.head.name: {"channels": s.head.channels, "activation": s.head.activation,
                                  "kind": s.head.kind, "dtype": str(s.dtype)}
                    for s in [*stored, *instance_specs(request.instances)]},
        "windows": {**settings["windows"], "patch_size": list(plan.patch_size), "count": len(plan),
                    "weights": "gaussian, sigma 1/8", "tile": list(plan.tile)},
        "region": [list(bounds) for bounds in work.plan.box],
        "blocks": list(work.plan.block_shape),
        **({} if work.resampling is None else {"resampling": {
            "shape": list(work.resampling.resampled_shape), "step": list(work.resampling.step),
            "spacing": list(predictor.spacing or ()), "unit": predictor.unit}}),
        **({} if work.prepared is None else {"prepared": plain(work.prepared.plain())}),
        "precision": machine.precision,
        "device": machine.device,
        "nonfinite": nonfinite_rule(request, predictor),
        "format": format_of(request.output, request.format)[0],
        "instances": None if request.instances is None else request.instances.plain(),
        "voxel_size": list(work.voxel_size),
        "versions": dict(machine.versions),
        "machine": {"threads": machine.threads, "device": machine.name},
        "made_of": plain(predictor.config),
    }  # fmt: skip


def _members(predictor: Predictor) -> dict[str, Any]:
    """Return the networks that an ensemble averages; nothing for a single one."""
    return {} if not predictor.members else {
        "members": [{"path": member.path, "sha256": member.checksum, "epoch": member.epoch,
                     "patch_size": list(member.patch_size)} for member in predictor.members]
    }  # fmt: skip


def nonfinite_rule(request: PredictRequest, predictor: Predictor) -> str:
    """Return how NaN and infinity are handled: as the request states, else as in training."""
    trained = predictor.config.get("dataset_config", {}).get("nonfinite")
    return request.nonfinite or trained or "zero"


def plain(value: Any) -> Any:
    """Return a value with tuples as lists and keys as text, as it is after a round trip through JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
