"""Plans the architecture of a residual U-Net from the size and spacing of its patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from volumen.utils.terminal.text import aligned, by

# Two axes whose spacings differ by at least this factor count as different resolutions.
ANISOTROPY = 2.0
# Spacings come from headers as float32; a ratio this close to 2 counts as 2, and so is not "less than 2".
TIE = 1e-5
BASE_FEATURES = 32
FIRST_STAGES_BLOCKS = (1, 3, 4)
LATER_STAGES_BLOCKS = 6


@dataclass(frozen=True)
class NetworkPlan:
    """The properties of a network that follow from a patch and its spacing.

    Tuples of axes are in spatial order (Z, Y, X) or (Y, X); tuples of stages start at full resolution.

    Args:
        patch_size: voxels per axis, enlarged to be divisible by the product of the strides.
        requested_patch_size: voxels per axis before the enlargement.
        spacing: physical size of a voxel per axis.
        pools_per_axis: how often each axis is halved.
        strides: pooling kernel of each stage; the first is all ones.
        kernel_sizes: convolution kernel of each stage.
        features_per_stage: channels of each stage.
        blocks_per_stage: residual blocks of each encoder stage.
    """

    patch_size: tuple[int, ...]
    requested_patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    pools_per_axis: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    features_per_stage: tuple[int, ...]
    blocks_per_stage: tuple[int, ...]

    @property
    def stages(self) -> int:
        """Return the number of resolutions, including the full one."""
        return len(self.strides)

    def table(self) -> str:
        """Return the plan as a table for people, one line per stage."""
        header = ("stage", "size", "spacing", "pool", "kernel", "features", "blocks")
        lines = aligned([header, *self._rows()], ruled=True)
        if self.patch_size != self.requested_patch_size:
            divisor = tuple(2**pools for pools in self.pools_per_axis)
            lines.append(
                f"patch {by(self.requested_patch_size)} becomes {by(self.patch_size)},"
                f" divisible by {by(divisor)}"
            )
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, ...]]:
        size, spacing = self.patch_size, self.spacing
        rows: list[tuple[str, ...]] = []
        for stage, stride in enumerate(self.strides):
            size = tuple(voxels // step for voxels, step in zip(size, stride))
            spacing = tuple(width * step for width, step in zip(spacing, stride))
            row = (
                str(stage),
                by(size),
                by(f"{width:g}" for width in spacing),
                by(stride),
                by(self.kernel_sizes[stage]),
                str(self.features_per_stage[stage]),
                str(self.blocks_per_stage[stage]),
            )
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return only lists and numbers, as JSON and YAML require."""
        return {key: _listed(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkPlan:
        """Return the plan from the result of `to_dict`."""
        return cls(**{key: _tupled(value) for key, value in values.items()})


def plan_network(
    patch_size: Sequence[int],
    spacing: Sequence[float],
    *,
    base_features: int = BASE_FEATURES,
    max_features: int = 320,
    min_feature_size: int = 4,
    max_pools: int | None = None,
) -> NetworkPlan:
    """Plan pooling, kernels, features and blocks.

    The rule is nnU-Net's (Isensee et al. 2021, Nature Methods 18:203) without its exception for a last single
    axis. An axis is pooled while its size is at least twice `min_feature_size` and its spacing is less than
    twice the smallest spacing among the axes that are large enough; pooling halves its size, rounding up,
    and doubles its spacing. A kernel grows from 1 to 3 on an axis once its spacing is less than twice the
    smallest of all; the last stage is 3 everywhere. The patch is then padded to be divisible by the strides.

    Args:
        patch_size: voxels per axis, two or three axes.
        spacing: physical size of a voxel per axis, in the same order, in any unit.
        base_features: channels at full resolution; stage i has min(base_features * 2^i, max_features).
        max_features: maximum number of channels of any stage.
        min_feature_size: smallest size of a feature map along an axis that was pooled.
        max_pools: maximum number of poolings per axis; None is no limit.

    Returns:
        The plan.

    Raises:
        ValueError: for anything but two or three axes, a size below 1, or a spacing that is not positive.
    """
    patch, widths = _checked(patch_size, spacing)
    if base_features < 1 or max_features < 1 or min_feature_size < 1:
        raise ValueError(
            "base_features, max_features and min_feature_size must be at least 1, got "
            f"{base_features}, {max_features} and {min_feature_size}"
        )
    strides, kernels = _pooling(patch, widths, min_feature_size, max_pools)
    pools = tuple(sum(stride[axis] == 2 for stride in strides) for axis in range(len(patch)))
    stages = len(strides)
    return NetworkPlan(
        patch_size=tuple(math.ceil(size / 2**pool) * 2**pool for size, pool in zip(patch, pools)),
        requested_patch_size=patch,
        spacing=widths,
        pools_per_axis=pools,
        strides=strides,
        kernel_sizes=kernels,
        features_per_stage=plan_features(stages, base_features, max_features),
        blocks_per_stage=plan_blocks(stages),
    )


def plan_features(
    stages: int, base_features: int = BASE_FEATURES, max_features: int = 320
) -> tuple[int, ...]:
    """Return min(base_features * 2^i, max_features) for every stage i."""
    return tuple(min(base_features * 2**stage, max_features) for stage in range(stages))


def plan_blocks(stages: int) -> tuple[int, ...]:
    """Return the residual blocks of every encoder stage: 1, 3, 4, then 6 each."""
    return (FIRST_STAGES_BLOCKS + (LATER_STAGES_BLOCKS,) * stages)[:stages]


def _checked(
    patch_size: Sequence[int], spacing: Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    patch = tuple(int(size) for size in patch_size)
    widths = tuple(float(width) for width in spacing)
    if len(patch) not in (2, 3):
        raise ValueError(f"patch_size must have two or three axes, got {tuple(patch_size)}")
    if patch != tuple(patch_size) or min(patch) < 1:
        raise ValueError(f"patch_size must be positive whole numbers, got {tuple(patch_size)}")
    if len(widths) != len(patch):
        raise ValueError(f"spacing must have {len(patch)} axes as the patch has, got {tuple(spacing)}")
    if not all(math.isfinite(width) and width > 0 for width in widths):
        raise ValueError(f"spacing must be positive and finite, got {tuple(spacing)}")
    return patch, widths


def _pooling(
    patch: tuple[int, ...], spacing: tuple[float, ...], min_feature_size: int, max_pools: int | None
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return the strides and kernel sizes of all stages."""
    axes = range(len(patch))
    size, width = list(patch), list(spacing)
    pools, kernel = [0] * len(patch), [1] * len(patch)
    strides, kernels = [(1,) * len(patch)], []
    while True:
        large = [axis for axis in axes if size[axis] >= 2 * min_feature_size]
        pooled = [
            axis
            for axis in large
            if _close(width[axis], min(width[other] for other in large))
            and (max_pools is None or pools[axis] < max_pools)
        ]
        if not pooled:
            break
        kernel = [3 if kernel[axis] == 3 or _close(width[axis], min(width)) else 1 for axis in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in pooled else 1 for axis in axes))
        for axis in pooled:
            size[axis] = math.ceil(size[axis] / 2)
            width[axis] *= 2
            pools[axis] += 1
    kernels.append((3,) * len(patch))
    return tuple(strides), tuple(kernels)


def _close(width: float, smallest: float) -> bool:
    return width / smallest < ANISOTROPY * (1 - TIE)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value
