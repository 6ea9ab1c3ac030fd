"""One voxel size for volumes of different voxel sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from volumen.data.formats.volumes import Volume
from volumen.data.layout import OpenCase
from volumen.data.resampled import ResampledVolume, resampling_of, stored_volume
from volumen.data.space.resampling import Resampling
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import by, counted

logger = logging.getLogger(__name__)

KEY = "dataset_config.target_spacing"
AUTO = "auto"
ANISOTROPY_LIMIT = 3.0
_LOW_PERCENTILE = 10
_LARGEST_FACTOR = 64
"""A target that is this many times finer or coarser than the stored voxels is a wrong unit, not a choice."""


def automatic_spacing(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]
) -> tuple[float, ...]:
    """Return the voxel size that nnU-Net's planner chooses (Isensee et al. 2021, `determine_fullres_target_spacing`).

    The median over the volumes, per axis. If the coarsest axis is more than 3 times coarser than the others and has
    3 times fewer voxels, it takes the 10th percentile instead, but does not become finer than the others.

    Args:
        spacings: voxel size per volume and axis.
        shapes: voxels per volume and axis.
    """
    sizes = np.asarray(spacings, dtype=float)
    target, counts = np.median(sizes, axis=0), np.median(np.asarray(shapes), axis=0)
    worst = int(target.argmax())
    others = [axis for axis in range(len(target)) if axis != worst]
    coarsest_other = float(target[others].max())
    coarse = target[worst] > ANISOTROPY_LIMIT * coarsest_other
    few = counts[worst] * ANISOTROPY_LIMIT < counts[others].min()
    if coarse and few:
        target[worst] = max(float(np.percentile(sizes[:, worst], _LOW_PERCENTILE)), coarsest_other)
    return tuple(float(value) for value in target)


def to_target_spacing(
    cases: Sequence[OpenCase], setting: Sequence[float] | str, *, stated: bool = False
) -> list[OpenCase]:
    """Return cases whose volumes are read on grids of one voxel size; nothing is read or written here.

    Args:
        cases: the opened cases, with their voxel sizes in one unit.
        setting: "auto" for `automatic_spacing`, or the voxel size per axis in the unit of the cases.
        stated: whether the settings give the voxel size of the cases, so that no file has to.

    Raises:
        VolumenError: the setting does not fit, or no file states a voxel size.
    """
    if not stated:
        _check_stated(cases)
    if setting == AUTO:
        target = automatic_spacing([case.spacing for case in cases], [case.image.shape for case in cases])
    else:
        target = _checked(setting, cases[0])
    resampled = [resample_case(case, target) for case in cases]
    changed = sum(resampling_of(case.image) is not None for case in resampled)
    unit = f" {cases[0].unit}" if cases[0].unit else ""
    logger.info(
        "target spacing %s%s: %d of %s resampled while they are read",
        by(f"{value:g}" for value in target),
        unit,
        changed,
        counted(len(cases), "volume"),
    )
    return resampled


def resample_case(case: OpenCase, target: Sequence[float]) -> OpenCase:
    """Return a case whose image, labels and masks are read on the grid of a voxel size.

    Args:
        case: an opened case.
        target: voxel size per axis, in the unit of the case.
    """
    resampling = Resampling.between(case.image.shape, case.spacing, target)
    size = tuple(float(value) for value in target)
    if resampling.is_identity:
        return replace(case, spacing=size)
    # A mask that all targets share stays one volume, so that it is read once.
    views: dict[int, Volume] = {}

    def view(volume: Volume) -> Volume:
        return views.setdefault(id(volume), ResampledVolume(volume, resampling, is_label=True))

    return replace(
        case,
        image=ResampledVolume(case.image, resampling),
        labels={name: view(volume) for name, volume in case.labels.items()},
        masks={name: view(volume) for name, volume in case.masks.items()},
        spacing=size,
    )


def stored_case(case: OpenCase) -> OpenCase:
    """Return a case on its stored grid; its `spacing` stays that of the resampled grid."""
    if resampling_of(case.image) is None:
        return case
    return replace(
        case,
        image=stored_volume(case.image),
        labels={name: stored_volume(volume) for name, volume in case.labels.items()},
        masks={name: stored_volume(volume) for name, volume in case.masks.items()},
    )


def _check_stated(cases: Sequence[OpenCase]) -> None:
    if all(case.image.spacing is None and set(case.spacing) == {1.0} for case in cases):
        raise VolumenError(
            KEY,
            expected="files that state their voxel size",
            found=f"none in {cases[0].image.source}",
            remedy="set dataset_config.spacing, or leave target_spacing out",
        )


def _checked(setting: Sequence[float] | str, case: OpenCase) -> tuple[float, ...]:
    ndim = len(case.spacing)
    unit = f" in {case.unit}" if case.unit else ""
    if (
        isinstance(setting, str)
        or len(setting) != ndim
        or not all(math.isfinite(value) and value > 0 for value in setting)
    ):
        raise VolumenError(KEY, expected=f"auto, or {ndim} positive voxel sizes{unit}", found=repr(setting))
    factors = [float(value) / own for value, own in zip(setting, case.spacing, strict=True)]
    if max(factors) > _LARGEST_FACTOR or min(factors) < 1 / _LARGEST_FACTOR:
        raise VolumenError(
            KEY,
            expected=f"voxel sizes{unit} near those of the data ({by(f'{v:g}' for v in case.spacing)})",
            found=by(f"{value:g}" for value in setting),
            remedy="check the unit",
        )
    return tuple(float(value) for value in setting)
