"""Instance labels as foreground, boundary and interior."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import generate_binary_structure, grey_dilation, grey_erosion

from volumen.transforms.instances import InstancesToTargetd
from volumen.utils.errors import VolumenError

RNG = np.random.default_rng(0)


def _blocks(ndim):
    return RNG.integers(0, 5, (4,) * ndim).repeat(4, 0).repeat(4, 1).astype(np.uint32) * 1000


def _turn(label, mode, known=None, in_volume=None):
    known = np.ones((1, *label.shape[1:]), bool) if known is None else known
    out = InstancesToTargetd({"m": mode})({"m": label, "m_mask": known, "in_volume": in_volume})
    assert out["m"].dtype == np.uint8
    return out["m"], out["m_mask"]


@pytest.mark.parametrize("ndim", [2, 3])
def test_boundary_equals_the_morphological_one(ndim):
    label = _blocks(ndim)
    cross = generate_binary_structure(ndim, 1)
    apart = grey_dilation(label, footprint=cross) != grey_erosion(label, footprint=cross)
    boundary, mask = _turn(label[None], "boundary")
    np.testing.assert_array_equal(boundary[0], apart & (label > 0))
    assert mask.all()


def test_boundary_and_interior_make_up_the_foreground():
    label = _blocks(3)[None]
    foreground, boundary, interior = (
        _turn(label, mode)[0] for mode in ("foreground", "boundary", "interior")
    )
    np.testing.assert_array_equal(foreground, label > 0)
    np.testing.assert_array_equal(boundary + interior, foreground)


def test_touching_instances_are_separated():
    label = np.array([[[1, 1, 1, 2, 2, 2]]])
    np.testing.assert_array_equal(_turn(label, "interior")[0], [[[1, 1, 0, 0, 1, 1]]])


def test_what_an_unknown_neighbour_would_decide_is_unknown():
    label = np.array([[[1, 1, 0, 0, 2, 0, 0]]])
    known = np.array([[[True, True, False, True, True, True, False]]])
    boundary, mask = _turn(label, "boundary", known)
    # Voxel 1 cannot be decided; voxels 3 and 5 are background whatever their neighbours are.
    np.testing.assert_array_equal(mask, [[[True, False, False, True, True, True, False]]])
    np.testing.assert_array_equal(boundary[mask], [0, 0, 1, 0])


def test_the_end_of_the_volume_is_no_boundary_and_no_doubt():
    label = np.array([[[1, 1, 1, 0]]])
    inside = np.array([[[True, True, True, False]]])
    boundary, mask = _turn(label, "boundary", inside.copy(), inside)
    assert not boundary.any()
    np.testing.assert_array_equal(mask, inside)


def test_unknown_modes_are_refused():
    with pytest.raises(VolumenError, match=r"'m'.*foreground, boundary, interior.*'edges'"):
        InstancesToTargetd({"m": "edges"})
