"""Reflected voxels are those of NumPy's own padding, at any distance."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from volumen.data.space.reflection import reflect, reflected_positions


@given(size=st.integers(1, 9), before=st.integers(0, 30), after=st.integers(0, 30))
def test_positions_equal_numpys_reflection(size, before, after):
    expected = np.pad(np.arange(size), (before, after), mode="reflect")
    np.testing.assert_array_equal(reflected_positions(-before, size + before + after, size), expected)


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 2),
    start=st.tuples(*[st.integers(-9, 9)] * 2),
    box=st.tuples(*[st.integers(1, 9)] * 2),
)
def test_a_box_is_the_crop_of_the_padded_image(shape, start, box):
    image = np.random.default_rng(0).random((2, *shape))
    padded = np.pad(image, ((0, 0), (20, 20), (20, 20)), mode="reflect")
    place = tuple(slice(s + 20, s + 20 + n) for s, n in zip(start, box))
    np.testing.assert_array_equal(reflect(image, start, box), padded[(slice(None), *place)])
