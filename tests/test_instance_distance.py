"""The distance to the nearest other instance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volumen.derived.arrays.fields import signed_distance
from volumen.derived.arrays.instance_distance import instance_distance
from volumen.derived.batches import fields as torch_fields
from volumen.derived.derivation import derive_target

SHAPE = (14, 18, 20)


def voronoi(shape, count=9, seed=0):
    """Return numbered cells that touch, with numbers beyond 32 bits, and background far from their centres."""
    rng = np.random.default_rng(seed)
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    squared = ((place[..., None, :] - rng.uniform(0, 1, (count, len(shape))) * shape) ** 2).sum(-1)
    numbers = (squared.argmin(-1) + 1).astype(np.uint64) * 10**15
    numbers[squared.min(-1) > 30] = 0
    return numbers


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_each_instance_has_the_distance_it_has_alone(ndim, turned):
    shape, spacing = SHAPE[-ndim:], (2.0, 1.0, 1.5)[-ndim:]
    numbers = voronoi(shape)
    known = np.random.default_rng(1).random(shape) > 0.02
    in_volume = np.indices(shape).sum(0) > 8 if turned else None
    region = tuple(slice(2, size - 3) for size in shape)
    options = {"spacing": spacing, "reach": 6, "known": known, "in_volume": in_volume, "region": region}
    found, valid = instance_distance(numbers, **options)
    assert len(np.unique(numbers)) > 5
    for number in np.unique(numbers):
        alone = numbers == number if number else numbers > 0
        expected, sure = signed_distance(alone, **options)
        own = numbers[region] == number
        np.testing.assert_array_equal(valid[own], sure[own])
        np.testing.assert_allclose(found[own], expected[own], atol=1e-5)


@pytest.mark.parametrize("shape", [(26, 31), (11, 16, 15)])
@pytest.mark.parametrize("seed", range(3))
def test_in_batches_each_instance_of_a_turned_volume_has_the_distance_it_has_alone(shape, seed):
    rng = np.random.default_rng(seed)
    spacing = (2.0, 1.0, 1.5)[-len(shape) :]
    numbers = (voronoi(shape, 60, seed) // 10**15).astype(np.int32)
    in_volume = np.indices(shape).sum(0) > 10
    # Lines that leave the volume and enter it again lead from one instance to another.
    in_volume &= rng.random(shape) > 0.15
    region = tuple(slice(2, size - 3) for size in shape)
    found, valid = torch_fields.instance_distance(
        torch.from_numpy(numbers)[None],
        spacing=spacing,
        reach=6,
        known=None,
        in_volume=torch.from_numpy(in_volume)[None],
        region=region,
    )
    assert len(np.unique(numbers)) > 20
    for number in np.unique(numbers):
        alone = numbers == number if number else numbers > 0
        expected, sure = signed_distance(alone, spacing=spacing, reach=6, in_volume=in_volume, region=region)
        own = numbers[region] == number
        np.testing.assert_array_equal(valid[0].numpy()[own], sure[own])
        np.testing.assert_allclose((found * valid)[0].numpy()[own], (expected * sure)[own], atol=1e-5)


def test_one_instance_has_the_distance_of_the_foreground():
    label = (voronoi(SHAPE) == 3 * 10**15).astype(np.uint8)
    for one, other in zip(instance_distance(label), signed_distance(label > 0)):
        np.testing.assert_array_equal(one, other)


def test_the_distance_task_separates_touching_instances_if_labels_number_them():
    touching = np.repeat(np.array([0, 7, 7, 7, 9, 9, 9, 0]), 1)[None, None].repeat(3, 1)
    parted, _ = derive_target("distance_transform", touching, instances=True)
    union, _ = derive_target("distance_transform", touching)
    np.testing.assert_allclose(parted[0, 1], [0.5, -0.5, -1.5, -0.5, -0.5, -1.5, -0.5, 0.5])
    np.testing.assert_allclose(union[0, 1], [0.5, -0.5, -1.5, -2.5, -2.5, -1.5, -0.5, 0.5])


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="known has shape"):
        instance_distance(np.zeros((4, 4), np.uint8), known=np.ones((4, 5), bool))
