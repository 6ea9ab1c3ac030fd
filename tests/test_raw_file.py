"""Regions of raw arrays against NumPy's own slicing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volumen.data.formats import raw_file
from volumen.data.formats.raw_file import read_raw
from volumen.utils.errors import VolumenError


@st.composite
def arrays_and_regions(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, tuple(slice(low, high) for low, high in bounds)


@settings(max_examples=150, deadline=None)
@given(
    case=arrays_and_regions(),
    dtype=st.sampled_from(["u1", ">u2", "<f4", ">f8"]),
    order=st.sampled_from(["C", "F"]),
    offset=st.sampled_from([0, 3]),
    call=st.sampled_from([0, 40, 8192]),
)
def test_reads_like_numpy(tmp_path_factory, case, dtype, order, offset, call):
    shape, region = case
    file = tmp_path_factory.mktemp("raw") / "a.raw"
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    file.write_bytes(b"x" * offset + array.tobytes(order=order))
    with pytest.MonkeyPatch.context() as patch, file.open("rb") as handle:
        patch.setattr(raw_file, "_CALL_BYTES", call)
        block = read_raw(handle, offset, shape, np.dtype(dtype), region, order)
    np.testing.assert_array_equal(block, array[region])
    assert block.dtype.isnative


def test_file_too_short(tmp_path):
    file = tmp_path / "a.raw"
    file.write_bytes(bytes(99))
    with file.open("rb") as handle, pytest.raises(VolumenError, match="expected 100 bytes, found 99"):
        read_raw(handle, 0, (10, 10), np.dtype("u1"), (slice(5, 10), slice(0, 10)))
