"""The plan of a network from its patch and spacing."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volumen.networks.planning import NetworkPlan, plan_blocks, plan_features, plan_network

CUBE, PLANE = (2, 2, 2), (1, 2, 2)
FLAT, FULL = (1, 3, 3), (3, 3, 3)

# patch, spacing, pools per axis, pooling kernels, convolution kernels, final patch
REFERENCE_PLANS = [
    # isotropic, already divisible
    ((192,) * 3, (1, 1, 1), (5, 5, 5), [(1, 1, 1)] + [CUBE] * 5, [FULL] * 6, (192,) * 3),
    # isotropic, padded
    ((100,) * 3, (1, 1, 1), (4, 4, 4), [(1, 1, 1)] + [CUBE] * 4, [FULL] * 5, (112,) * 3),
    # serial sections: the thin axis is pooled once, when the spacing of the others has reached its own
    (
        (8, 256, 256),
        (45, 4.6, 4.6),
        (1, 6, 6),
        [(1, 1, 1), PLANE, PLANE, PLANE, CUBE, PLANE, PLANE],
        [FLAT] * 3 + [FULL] * 4,
        (8, 256, 256),
    ),
    # sizes that stop at 5 and 7
    ((40, 56, 40), (1, 1, 1), (3, 3, 3), [(1, 1, 1)] + [CUBE] * 3, [FULL] * 4, (40, 56, 40)),
    # 2D, one axis pooled alone at the end
    ((300, 200), (1, 1), (6, 5), [(1, 1)] + [(2, 2)] * 5 + [(2, 1)], [(3, 3)] * 7, (320, 224)),
    # mildly anisotropic
    (
        (32, 128, 128),
        (3, 1, 1),
        (3, 5, 5),
        [(1, 1, 1), PLANE, CUBE, CUBE, CUBE, PLANE],
        [FLAT] + [FULL] * 5,
        (32, 128, 128),
    ),
    # thick slices
    (
        (16, 320, 320),
        (5, 0.5, 0.5),
        (2, 6, 6),
        [(1, 1, 1), PLANE, PLANE, PLANE, CUBE, CUBE, PLANE],
        [FLAT] * 3 + [FULL] * 4,
        (16, 320, 320),
    ),
]


@pytest.mark.parametrize(("patch", "spacing", "pools", "strides", "kernels", "final"), REFERENCE_PLANS)
def test_reference_plans(patch, spacing, pools, strides, kernels, final):
    plan = plan_network(patch, spacing)
    assert plan.pools_per_axis == pools
    assert list(plan.strides) == strides
    assert list(plan.kernel_sizes) == kernels
    assert plan.patch_size == final
    assert plan.stages == len(strides)


def test_features_and_blocks_follow_the_stages():
    plan = plan_network((192,) * 3, (1, 1, 1))
    assert plan.features_per_stage == (32, 64, 128, 256, 320, 320)
    assert plan.blocks_per_stage == (1, 3, 4, 6, 6, 6)
    assert plan_features(3, base_features=16, max_features=40) == (16, 32, 40)
    assert plan_blocks(2) == (1, 3)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.6, 4.6e-9, 1e6])
def test_a_spacing_of_exactly_twice_the_smallest_is_a_tie_and_not_pooled(scale):
    plan = plan_network((64, 64, 64), (2 * scale, scale, scale))
    assert plan.strides[1] == (1, 2, 2)
    assert plan.kernel_sizes[0] == (1, 3, 3)


def test_a_tie_survives_the_rounding_of_a_header():
    # 1.2 / 0.6 as float32 from an affine matrix: slightly below 2
    plan = plan_network((64, 64), (1.1999999284744263, 0.6000000238418579))
    assert plan.strides[1] == (1, 2)


def test_a_size_of_twice_the_minimum_is_pooled_and_one_less_is_not():
    assert plan_network((8, 8), (1, 1)).pools_per_axis == (1, 1)
    assert plan_network((7, 7), (1, 1)).pools_per_axis == (0, 0)
    assert plan_network((6, 5), (1, 1), min_feature_size=3).pools_per_axis == (1, 0)


def test_an_odd_size_rounds_up_when_halved():
    # 15 -> 8 -> 4: rounding down would stop at 7
    assert plan_network((15, 15), (1, 1)).pools_per_axis == (2, 2)


def test_pools_can_be_capped_per_axis():
    plan = plan_network((8, 256, 256), (45, 4.6, 4.6), max_pools=4)
    assert plan.pools_per_axis == (1, 4, 4)


sizes = st.integers(1, 300)
spacings = st.floats(0.01, 100, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(sizes, spacings), min_size=2, max_size=3))
def test_any_plan_is_consistent(axes):
    patch, spacing = tuple(size for size, _ in axes), tuple(width for _, width in axes)
    plan = plan_network(patch, spacing)
    for axis, size in enumerate(plan.patch_size):
        total = math.prod(stride[axis] for stride in plan.strides)
        assert total == 2 ** plan.pools_per_axis[axis]
        assert size % total == 0
        assert 0 <= size - patch[axis] < total
        assert total == 1 or size // total >= 4
    assert len(plan.strides) == len(plan.kernel_sizes) == len(plan.features_per_stage)
    assert set(plan.kernel_sizes[-1]) == {3}
    # the finest axis is always pooled at least as often
    finest = min(range(len(patch)), key=lambda axis: spacing[axis])
    assert plan.pools_per_axis[finest] >= (patch[finest] >= 8)
    # the unit does not matter
    metres = plan_network(patch, tuple(width * 2**-30 for width in spacing))
    assert metres.strides == plan.strides
    # the order of axes does not matter either
    mirrored = plan_network(patch[::-1], spacing[::-1])
    assert mirrored.pools_per_axis == plan.pools_per_axis[::-1]


def test_the_plan_survives_json():
    plan = plan_network((8, 256, 256), (45, 4.6, 4.6))
    assert NetworkPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_table_reads_by_stage():
    lines = plan_network((100, 100, 100), (1, 1, 1)).table().splitlines()
    assert lines[0].split() == ["stage", "size", "spacing", "pool", "kernel", "features", "blocks"]
    assert lines[2].split() == ["0", "112x112x112", "1x1x1", "1x1x1", "3x3x3", "32", "1"]
    assert lines[6].split() == ["4", "7x7x7", "16x16x16", "2x2x2", "3x3x3", "320", "6"]
    assert lines[7] == "patch 100x100x100 becomes 112x112x112, divisible by 16x16x16"


@pytest.mark.parametrize(
    ("patch", "spacing", "message"),
    [
        ((64,), (1,), "two or three axes"),
        ((64, 0), (1, 1), "positive whole numbers"),
        ((64.5, 64), (1, 1), "positive whole numbers"),
        ((64, 64), (1, 1, 1), "spacing must have 2 axes"),
        ((64, 64), (1, 0), "positive and finite"),
        ((64, 64), (1, math.nan), "positive and finite"),
    ],
)
def test_bad_arguments_are_refused(patch, spacing, message):
    with pytest.raises(ValueError, match=message):
        plan_network(patch, spacing)
