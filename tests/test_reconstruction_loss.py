"""The loss of pretraining: only hidden voxels inside the volume count, against blocks normalised one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from volumen.losses.reconstruction import (
    EPSILON,
    MaskedReconstructionLoss,
    hidden_voxels,
    normalised_blocks,
)
from volumen.transforms.masking import HideBlocksd, blocks_of, hidden_count
from volumen.utils.errors import VolumenError

CASES = pytest.mark.parametrize(
    ("channels", "grid", "block"),
    [(1, (2, 3), (4, 5)), (3, (3, 2), (2, 4)), (1, (2, 2, 3), (2, 4, 3)), (2, (1, 3, 2), (5, 2, 2))],
    ids=["2D", "2D RGB", "3D", "anisotropic, two channels"],
)


def batch_of(channels, grid, block, outside=True, seed=0):
    """Return images, where the volume is, hidden blocks, and a prediction; the last rows lie outside the volume."""
    rng = np.random.default_rng(seed)
    size = [count * side for count, side in zip(grid, block)]
    image = rng.normal(3, 2, (2, channels, *size)).astype(np.float32)
    inside = np.ones((2, 1, *size), bool)
    if outside:
        inside[..., -block[-1] - 1 :] = False
    hidden = rng.random((2, 1, *grid)) < 0.6
    hidden.reshape(2, -1)[:, 0] = True
    prediction = rng.normal(0, 1, image.shape).astype(np.float32)
    return [torch.from_numpy(array) for array in (image, inside, hidden, prediction)]


def by_loops(image, inside, hidden, prediction, block) -> float:
    """Return the loss by loops over samples, channels, blocks and voxels."""
    total, count = 0.0, 0
    for n, c in np.ndindex(image.shape[:2]):
        for cell in np.ndindex(hidden.shape[2:]):
            place = tuple(slice(i * side, (i + 1) * side) for i, side in zip(cell, block))
            values, known = image[n, c][place].double(), inside[n, 0][place]
            if not hidden[n, 0][cell] or not known.any():
                continue
            shown = values[known]
            mean, deviation = shown.mean(), math.sqrt(shown.var(correction=0) + EPSILON)
            for voxel in np.ndindex(*block):
                if known[voxel]:
                    target = (values[voxel] - mean) / deviation
                    total += float((prediction[n, c][place][voxel] - target) ** 2)
                    count += 1
    return total / count


@CASES
def test_loss_equals_loops_over_the_voxels(channels, grid, block):
    image, inside, hidden, prediction = batch_of(channels, grid, block)
    batch = {"reconstruction": image, "reconstruction_mask": inside, "hidden": hidden}
    loss = MaskedReconstructionLoss(block)
    found = loss({"reconstruction": prediction}, batch)
    assert found.item() == pytest.approx(by_loops(image, inside, hidden, prediction, block), rel=1e-4)
    assert loss.components["reconstruction"] == found


@CASES
def test_gradients_are_those_of_hidden_voxels_inside_the_volume_alone(channels, grid, block):
    image, inside, hidden, prediction = batch_of(channels, grid, block)
    prediction.requires_grad_(True)
    batch = {"reconstruction": image, "reconstruction_mask": inside, "hidden": hidden}
    MaskedReconstructionLoss(block)({"reconstruction": prediction}, batch).backward()
    counted = (inside & hidden_voxels(hidden, block)).expand_as(image)
    assert torch.equal(prediction.grad != 0, counted)


@CASES
def test_normalised_blocks_have_mean_zero_and_turn_back(channels, grid, block):
    image, inside, _, _ = batch_of(channels, grid, block, outside=False)
    normal, mean, deviation = normalised_blocks(image, inside, block)
    torch.testing.assert_close(normal * deviation + mean, image, rtol=1e-5, atol=1e-5)
    first = normal[(0, 0, *(slice(side) for side in block))]
    assert first.mean().item() == pytest.approx(0, abs=1e-5)
    assert first.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_constant_blocks_and_batches_without_a_voxel_are_finite():
    image = torch.full((1, 1, 4, 4), 5.0)
    batch = {
        "reconstruction": image,
        "reconstruction_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "hidden": torch.ones(1, 1, 2, 2, dtype=torch.bool),
    }
    loss = MaskedReconstructionLoss((2, 2))
    assert loss({"reconstruction": torch.zeros_like(image)}, batch) == 0
    prediction = torch.ones_like(image, requires_grad=True)
    nothing = {**batch, "reconstruction_mask": torch.zeros(1, 1, 4, 4, dtype=torch.bool)}
    found = loss({"reconstruction": prediction}, nothing)
    found.backward()
    assert found == 0
    assert not prediction.grad.any()


def test_infinite_predictions_of_visible_voxels_do_not_reach_the_loss():
    image, inside, hidden, prediction = batch_of(1, (2, 3), (4, 5), outside=False)
    prediction[~hidden_voxels(hidden, (4, 5))] = torch.inf
    batch = {"reconstruction": image, "reconstruction_mask": inside, "hidden": hidden}
    assert torch.isfinite(MaskedReconstructionLoss((4, 5))({"reconstruction": prediction}, batch))


def test_every_patch_has_the_same_number_of_hidden_blocks_drawn_by_its_seed():
    draw = HideBlocksd((8, 16, 16), (2, 4, 4), 0.75)
    masks = [draw.set_random_state(seed=seed)({})["hidden"] for seed in range(20)]
    assert {int(mask.sum()) for mask in masks} == {48}
    assert masks[0].shape == (1, 4, 4, 4)
    assert (draw.set_random_state(seed=3)({})["hidden"] == masks[3]).all()
    assert len({mask.tobytes() for mask in masks}) == 20
    # Each block is hidden about as often as the ratio says.
    often = np.mean([draw.set_random_state(seed=seed)({})["hidden"] for seed in range(400)], axis=0)
    assert np.abs(often - 0.75).max() < 0.1


@pytest.mark.parametrize(
    ("blocks", "ratio", "expected"), [(64, 0.75, 48), (4, 0.9, 2), (3, 0.01, 1), (8, 0.99, 6)]
)
def test_some_blocks_stay_visible(blocks, ratio, expected):
    assert hidden_count(blocks, ratio) == expected


def test_a_patch_of_too_few_blocks_is_refused():
    with pytest.raises(
        VolumenError, match=r"tr_config.patch_size: expected a patch with at least 3 blocks of 8x8"
    ):
        blocks_of((16, 8), (8, 8))
    with pytest.raises(
        VolumenError, match=r"pretrain_mask_block: expected sides that divide the patch of 16x8"
    ):
        blocks_of((16, 8), (8, 3))
