"""Replaces parts of a network plan by the user's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from volumen.networks.planning import NetworkPlan, plan_blocks, plan_features
from volumen.utils.terminal.text import by

PerStage = Sequence[Any]


def apply_settings(
    plan: NetworkPlan,
    *,
    features_per_stage: Sequence[int] | None = None,
    strides: PerStage | None = None,
    kernel_sizes: PerStage | None = None,
    blocks_per_stage: Sequence[int] | None = None,
    n_stages: int | None = None,
    base_features: int = 32,
    max_features: int = 320,
    adjust_patch: bool = True,
) -> NetworkPlan:
    """Replace parts of a plan; arguments that are None leave the planned values.

    The settings decide the number of stages and must agree with each other. With fewer stages than planned
    the deepest ones are dropped; with more the deepest one is repeated without further pooling, unless strides are set.

    Args:
        plan: the network's plan.
        features_per_stage: channels per stage.
        strides: stride per stage, a number or one per axis; the first must be 1.
        kernel_sizes: convolution kernel per stage, a number or one per axis.
        blocks_per_stage: residual blocks per stage.
        n_stages: number of stages if no list determines it.
        base_features: channels at full resolution when features are planned.
        max_features: maximum number of channels when features are planned.
        adjust_patch: enlarge the patch to the next size that the strides divide; otherwise a patch they do not divide
            is an error.

    Returns:
        A new plan.

    Raises:
        ValueError: if the settings disagree with each other or with the patch.
    """
    stages = _stages(plan, n_stages, features_per_stage, strides, kernel_sizes, blocks_per_stage)
    dims = len(plan.patch_size)
    new_strides = _per_axis(strides, dims) if strides else _fitted(plan.strides, stages, (1,) * dims)
    if any(step != 1 for step in new_strides[0]):
        raise ValueError(
            f"the first stage keeps full resolution: its stride must be 1, got {by(new_strides[0])}"
        )
    kernels = (
        _per_axis(kernel_sizes, dims) if kernel_sizes else _fitted(plan.kernel_sizes, stages, (3,) * dims)
    )
    if not kernel_sizes:
        kernels = (*kernels[:-1], (3,) * dims)
    divisor = [math.prod(stride[axis] for stride in new_strides) for axis in range(dims)]
    patch = tuple(math.ceil(size / step) * step for size, step in zip(plan.requested_patch_size, divisor))
    if patch != plan.requested_patch_size and not adjust_patch:
        raise ValueError(
            f"patch {by(plan.requested_patch_size)} is not divisible by the strides' product {by(divisor)};"
            f" use {by(patch)}, or autoconfigure: true to adjust it"
        )
    return replace(
        plan,
        patch_size=patch,
        pools_per_axis=tuple(sum(stride[axis] > 1 for stride in new_strides) for axis in range(dims)),
        strides=new_strides,
        kernel_sizes=kernels,
        features_per_stage=tuple(features_per_stage or plan_features(stages, base_features, max_features)),
        blocks_per_stage=tuple(blocks_per_stage or plan_blocks(stages)),
    )


def _stages(plan: NetworkPlan, n_stages: int | None, *lists: Sequence | None) -> int:
    said = {len(values) for values in lists if values} | ({n_stages} if n_stages else set())
    if len(said) > 1:
        raise ValueError(
            "features_per_stage, strides, kernel_sizes, n_blocks_per_stage and n_stages must name the same"
            f" number of stages, got {sorted(said)}"
        )
    return said.pop() if said else plan.stages


def _fitted(
    values: tuple[tuple[int, ...], ...], stages: int, filler: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    return (values + (filler,) * stages)[:stages]


def _per_axis(values: PerStage, dims: int) -> tuple[tuple[int, ...], ...]:
    rows = []
    for value in values:
        row = tuple(value) if isinstance(value, list | tuple) else (value,) * dims
        if len(row) != dims or not all(isinstance(step, int) and step > 0 for step in row):
            raise ValueError(f"expected {dims} positive whole numbers per stage, got {value!r}")
        rows.append(row)
    return tuple(rows)
