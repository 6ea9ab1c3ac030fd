"""The report's colours for every kind of colour vision, its scale bars, and what stands in its head."""

from __future__ import annotations

import itertools
import re
from datetime import datetime

import numpy as np
import pytest
from scipy import ndimage
from test_evaluate import write

from volumen.evaluation.html.report_drawing import (
    COLOURS,
    PARTS,
    RAMP,
    in_columns,
    outline,
    ramp_colours,
    scale_bar,
)
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.handlers.preview.scale_bar import nice_length

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


def lab(colour, vision: str) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as somebody sees it."""
    share = np.asarray(colour, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1)
    matrix = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
    x, y, z = (np.asarray(matrix) @ seen) / [0.95047, 1.0, 1.08883]
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_found_missed_and_false_differ_for_every_eye(vision):
    for one, other in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 30


def test_a_red_and_a_green_of_equal_lightness_would_not_pass():
    """The test itself: the former colours of "found" and "false" are close for two kinds of eyes."""
    pair = (90, 200, 90), (255, 70, 60)
    assert min(np.linalg.norm(lab(pair[0], v) - lab(pair[1], v)) for v in VISION) < 40


@pytest.mark.parametrize("vision", VISION)
def test_the_colour_bar_gets_lighter_for_every_eye(vision):
    lightness = [lab(colour, vision)[0] for colour in ramp_colours(np.linspace(0, 1, 33))]
    assert np.all(np.diff(lightness) > 0)
    np.testing.assert_allclose(ramp_colours(np.array([0.0, 1.0])), [RAMP[0], RAMP[-1]])


@pytest.mark.parametrize(
    ("most", "length"), [(7.9, 5), (19.99, 10), (20, 20), (0.3, 0.2), (1234, 1000), (1, 1), (0.009, 0.005)]
)
def test_lengths_of_bars_are_round(most, length):
    assert nice_length(most) == pytest.approx(length)


@pytest.mark.parametrize(
    ("spacing", "unit", "words", "voxels"),
    [(None, "", "20 voxels", 20), (0.5, "µm", "10 µm", 20), (8.0, "nm", "100 nm", 12.5)],
)
def test_the_scale_bar_is_as_long_as_it_says(spacing, unit, words, voxels):
    bar = scale_bar(60, spacing, unit)
    assert bar.words == words
    assert bar.share * 60 == pytest.approx(voxels)
    assert float(words.split()[0]) == pytest.approx(voxels * (spacing or 1))


def test_a_picture_of_two_voxels_has_no_bar():
    assert scale_bar(2, None, "") is None


def test_the_parts_of_an_object_differ_for_every_eye_and_from_missed_and_added():
    fixed = (COLOURS["missed"], COLOURS["false"])
    for vision in VISION:
        for one, other in itertools.combinations((*PARTS, *fixed), 2):
            assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 25, (one, other, vision)


@pytest.mark.parametrize("seed", range(3))
def test_the_outline_of_a_mask_has_all_edges_to_its_outside_and_no_others(seed):
    mask = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(9, 14)), 1) > 0
    edges = set()
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", outline(mask)):
        x, y = int(x), int(y)
        edges |= {(x + i, y, way) if way == "h" else (x, y + i, way) for i in range(int(length))}
    padded = np.pad(mask, 1)
    expected = set()
    for y, x in np.argwhere(mask):
        around = {(x, y, "h"): (0, 1), (x, y + 1, "h"): (2, 1), (x, y, "v"): (1, 0), (x + 1, y, "v"): (1, 2)}
        expected |= {edge for edge, (dy, dx) in around.items() if not padded[y + dy, x + dx]}
    assert edges == expected


def test_columns_are_divided_evenly():
    assert in_columns(list("abcdefgh"), 7) == [list("abcd"), list("efgh")]
    assert in_columns(list("abc"), 7) == [list("abc")]


def test_the_head_names_model_and_date_and_headers_their_scope(tmp_path):
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 5:15] = 1
    write(tmp_path / "found" / "a_ink.tif", truth)
    write(tmp_path / "data" / "labels" / "a_ink.tif", truth)
    evaluate(EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out")))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<th scope=row>model<td>not recorded with the predictions" in page
    assert f"<th scope=row>date<td>{datetime.now().astimezone():%Y-%m-}" in page
    assert not re.findall(r"<th(?![a-z]| scope)", page.partition("</style>")[2])
    assert "z = 2, x to the right, y down" in page
    assert "y = 10, x to the right, z down" in page
    assert "5 voxels" in page
    assert "<th scope=col>hd95<small>voxels</small>" in page


@pytest.mark.parametrize(
    ("border", "words"), [(True, "is a surface, as MONAI takes it"), (False, "is no surface")]
)
def test_settings_stand_in_the_report_in_words(tmp_path, border, words):
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 5:15] = 1
    write(tmp_path / "found" / "a_ink.tif", truth)
    write(tmp_path / "data" / "labels" / "a_ink.tif", truth)
    request = EvaluateRequest(
        str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out"), surface_border=border
    )
    evaluation = evaluate(request)
    page = (tmp_path / "out" / "report.html").read_text()
    assert words in page
    assert "26 of a foreground voxel, 6 of a background voxel" in page
    for name in set(evaluation.settings) - {"predictions", "labels", "spacing"}:
        assert f"<th scope=row>{name}<td>" not in page
