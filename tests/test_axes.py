"""Which axis is which, for shapes with and without metadata."""

from __future__ import annotations

import numpy as np
import pytest

from volumen.data.formats.axes import AmbiguousAxesError, map_axes
from volumen.utils.errors import VolumenError


@pytest.mark.parametrize(
    ("shape", "options", "spatial", "channel"),
    [
        ((40, 50), {}, (0, 1), None),
        ((30, 40, 50), {}, (0, 1, 2), None),
        ((1, 40, 50), {}, (0, 1, 2), None),  # one slice: an axis of one entry is no channel
        ((1, 1, 1), {}, (0, 1, 2), None),
        ((3, 4, 4), {}, (0, 1, 2), None),  # tiny all over: nothing stands out
        ((3, 40, 50), {"ndim": 2}, (1, 2), 0),
        ((40, 50, 3), {"ndim": 2}, (0, 1), 2),
        ((3, 40, 50), {"ndim": 3}, (0, 1, 2), None),
        ((3, 40, 50), {"requested": "cyx"}, (1, 2), 0),
        ((40, 50, 3), {"requested": "YXC"}, (0, 1), 2),
        ((40, 50), {"requested": "yxc"}, (0, 1), None),  # the label of an image with channels
        (
            (9, 40, 50),
            {"requested": "tczyx"},
            (0, 1, 2),
            None,
        ),  # as a reader gives it that drops single entries
        ((1, 40, 50), {"requested": "yx"}, (1, 2), None),
        ((2, 30, 40, 50), {}, (1, 2, 3), 0),
        ((30, 40, 50, 3), {}, (0, 1, 2), 3),
        ((12, 30, 40, 50), {}, (1, 2, 3), 0),  # many channels, still the smallest axis
        ((1, 2, 30, 40, 50), {}, (2, 3, 4), 1),
        ((1, 1, 5, 40, 50), {"known": "tczyx"}, (2, 3, 4), 1),
        ((3, 40, 50), {"known": "?yx", "ndim": 2}, (1, 2), 0),
        ((9, 40, 50), {"known": "?yx"}, (0, 1, 2), None),
        ((4, 2, 40, 50), {"known": "zcyx"}, (0, 2, 3), 1),
        ((50, 40, 30), {"known": "xyz"}, (2, 1, 0), None),
        ((1, 40, 50), {"known": "zyx", "ndim": 2}, (1, 2), None),
    ],
)
def test_axes_found(shape, options, spatial, channel):
    found = map_axes("a", shape, **options)
    assert (found.spatial, found.channel) == (spatial, channel)


@pytest.mark.parametrize("shape", [(3, 40, 50), (40, 50, 3), (2, 30, 40, 3), (50, 40, 30, 20)])
def test_open_shapes_name_the_setting(shape):
    with pytest.raises(
        AmbiguousAxesError,
        match=r"a: shape .* is the small axis a channel\?; set dataset_config.axes, or --axes of v",
    ):
        map_axes("a", shape)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((0, 4, 5), {}, r"a: expected voxels, found shape \(0, 4, 5\)"),
        ((5,), {}, r"a: expected 2 or 3 spatial axes and channels, found shape \(5,\)"),
        ((2, 3, 30, 40, 50), {}, r"found shape \(2, 3, 30, 40, 50\)"),
        ((9, 40, 50), {"known": "tyx"}, r"found 'tyx' with t=9; set dataset_config.axes"),
        ((40, 50), {"ndim": 3}, r"found shape \(40, 50\) for 3 spatial axes"),
        ((30, 40, 50), {"known": "zyx", "ndim": 2}, r"expected 2 spatial axes, found shape"),
        ((30, 40, 50), {"requested": "zy?"}, r"dataset_config.axes: expected letters among t, c, z, y, x"),
        ((30, 40, 50), {"requested": "zyy"}, r"expected axes with y and x, each once, found 'zyy'"),
        ((30, 40, 50), {"requested": "yx"}, r"expected 2 axes \(dataset_config.axes: yx\), found shape"),
    ],
)
def test_refusals(shape, options, message):
    with pytest.raises(VolumenError, match=message):
        map_axes("a", shape, **options)


@pytest.mark.parametrize("letters", ["zyx", "xyz", "czyx", "zyxc", "zcyx", "tczyx", "yxc", "yx"])
def test_regions_and_transposition_agree(letters):
    sizes = {"t": 1, "c": 2, "z": 5, "y": 6, "x": 7}
    stored = np.random.default_rng(0).random([sizes[letter] for letter in letters])
    axis_map = map_axes("a", stored.shape, known=letters)
    spatial = [letter for letter in "zyx" if letter in letters]
    order = [*(letter for letter in "tc" if letter in letters), *spatial]
    whole = stored.transpose([letters.index(letter) for letter in order])
    whole = whole.reshape(-1, *whole.shape[-len(spatial) :])
    region = tuple(slice(1, 4) for _ in spatial)
    block = axis_map.channels_first(stored[axis_map.stored_region(region)])
    np.testing.assert_array_equal(block, whole[(slice(None), *region)])
    assert (axis_map.channels, *axis_map.shape) == whole.shape
