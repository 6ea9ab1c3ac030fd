"""Plans a volume's prediction from a request: windows and blocks, how outputs are stored, which blocks are empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from volumen.data.space.geometry import AxisTurn
from volumen.inference.blocks.block_maker import PARTIAL_SUMS_BYTES
from volumen.inference.output.exports import format_of
from volumen.inference.output.ome_zarr import LABELS, target_group
from volumen.inference.output.stored import OutputSpec
from volumen.inference.predictor import Predictor
from volumen.inference.request import OpenBox, PredictRequest
from volumen.inference.rules import CleaningRules
from volumen.inference.windows.heads import Head
from volumen.inference.windows.plan import Box, PredictPlan, choose_block_shape, choose_tile
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume


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
        rules=predictor.window_rules,
    )


def resolve_region(region: OpenBox | None, shape: tuple[int, ...], flag: str = "--region") -> Box | None:
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
    raise VolumenError(flag, expected=f"start:stop per axis inside {shape}", found=region)


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
        if rules.fill_holes and item.is_labels and item.head.has_classes:
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


def check_names(stored: Sequence[OutputSpec]) -> None:
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
