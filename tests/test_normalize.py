"""Normalisation schemes, and the sampling of the intensities that they use."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from patch_cases import RecordingVolume, case_of

from volumen.transforms.intensity_properties import sample_intensity_properties
from volumen.transforms.normalize import SCHEMES, Normalizer
from volumen.utils.errors import VolumenError

RNG = np.random.default_rng(3)
KNOWN = {"min": -2.0, "max": 6.0, "mean": 1.0, "std": 0.5, "percentile_00_5": 0.0, "percentile_99_5": 4.0}
PROPERTIES = {"channels": [KNOWN], "foreground": [{**KNOWN, "mean": 2.0}]}
VALUES = np.array([[-2.0, 0, 1, 2, 4, 6]], np.float32)


def test_properties_of_another_shape_are_refused():
    with pytest.raises(
        VolumenError, match=r"intensity_properties: expected statistics under channels.*found mean"
    ):
        Normalizer("zscore", {"mean": 1})(np.zeros((1, 2, 2), np.uint16))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("unit", [0, 0.25, 0.375, 0.5, 0.75, 1]),
        ("percentile", [0, 0, 0.25, 0.5, 1, 1]),
        ("zscore", [-6, -2, 0, 2, 6, 10]),
        ("ct", [-4, -4, -2, 0, 4, 4]),
        ("none", [-2, 0, 1, 2, 4, 6]),
    ],
)
def test_schemes(scheme, expected):
    out = Normalizer(scheme, PROPERTIES)(VALUES)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[0], expected)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 0, 255), ("uint16", 0, 65535), ("int16", -32768, 32767), ("int8", -128, 127), ("bool", 0, 1)],
)
def test_unit_maps_the_range_of_an_integer_type_to_0_1(dtype, low, high):
    out = Normalizer("unit")(np.array([[low, high]], dtype=dtype))
    np.testing.assert_allclose(out, [[0, 1]], atol=1e-7)


def test_percentiles_that_do_not_begin_at_zero_span_0_to_1():
    known = {**KNOWN, "percentile_00_5": 1.0, "percentile_99_5": 5.0}
    out = Normalizer("percentile", {"channels": [known], "foreground": [known]})(VALUES)
    np.testing.assert_allclose(out[0], [0, 0, 0, 0.25, 0.75, 1])


@pytest.mark.parametrize("ndim", [2, 3])
def test_an_image_in_memory_is_normalised_as_a_volume_of_the_same_content(ndim):
    image = (RNG.random((2, *(9, 10, 11)[:ndim])) * 50).astype(np.float32)
    one = Normalizer("zscore", PROPERTIES)
    assert one.for_array(image) is one
    each = Normalizer("zscore", {**PROPERTIES, "per_volume": True})
    out = each.for_array(image)(image)
    np.testing.assert_allclose(out.reshape(2, -1).mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(out.reshape(2, -1).std(1), 1, atol=1e-3)


def test_unit_prefers_the_sampled_range_but_for_bytes():
    values = np.array([[0, 4]])
    np.testing.assert_allclose(Normalizer("unit", PROPERTIES)(values.astype(np.int16)), [[0.25, 0.75]])
    np.testing.assert_allclose(Normalizer("unit", PROPERTIES)(values.astype(np.uint8)), [[0, 4 / 255]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float16", "float64", ">u2", ">f4"])
def test_every_dtype_and_layout_gives_the_same_floats(dtype):
    image = RNG.integers(0, 100, (2, 5, 6, 7)).astype(dtype)[:, ::-1].transpose(0, 3, 1, 2)
    out = Normalizer("percentile", {"channels": [KNOWN, {**KNOWN, "percentile_99_5": 50.0}]})(image)
    assert out.flags.c_contiguous
    exact = image.astype(np.float64)
    expected = np.stack([exact[0].clip(0, 4) / 4, exact[1].clip(0, 50) / 50])
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_channels_have_their_own_statistics():
    properties = {"channels": [KNOWN, {**KNOWN, "mean": 3.0, "std": 2.0}]}
    out = Normalizer("zscore", properties)(np.repeat(VALUES, 2, axis=0))
    np.testing.assert_allclose(out[1], (VALUES[0] - 3) / 2)


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore", "ct"])
def test_a_constant_image_stays_finite(scheme):
    image = np.full((1, 4, 4, 4), 5.0, np.float32)
    flat = {**dict.fromkeys(KNOWN, 5.0), "std": 0.0}
    out = Normalizer(scheme, {"channels": [flat], "foreground": None})(image)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_properties_survive_json_and_give_the_same_map(scheme):
    case = case_of(
        RNG.normal(100, 20, (40, 40, 40)).astype(np.float32), {"m": np.ones((40, 40, 40), np.uint8)}
    )
    sampled = sample_intensity_properties([case])
    restored = json.loads(json.dumps(sampled))
    assert restored == sampled
    image = case.image.data[:, :8]
    np.testing.assert_array_equal(
        Normalizer(scheme, sampled)(image), Normalizer.from_config(scheme, restored)(image)
    )


@pytest.mark.parametrize("scheme", ["percentile", "zscore", "ct"])
def test_missing_properties_are_refused(scheme):
    with pytest.raises(VolumenError, match="intensity_properties"):
        Normalizer(scheme)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(VolumenError, match=r"normalization_scheme.*one of unit.*'minmax'"):
        Normalizer("minmax")
    with pytest.raises(VolumenError, match=r"expected 2 channels.*found 1"):
        Normalizer("zscore", PROPERTIES)(np.zeros((2, 3, 3), np.float32))
    with pytest.raises(VolumenError, match="float32"):
        Normalizer("unit")(np.zeros((1, 3, 3), np.float32))


def test_sampled_statistics_match_the_whole():
    image = RNG.gamma(4.0, 10.0, (80, 80, 80)).astype(np.float32)
    label = (image > 60).astype(np.uint8)
    case = case_of(image, {"m": label})
    sampled = sample_intensity_properties([case], max_regions=40)
    for region, values in (("channels", image), ("foreground", image[label > 0])):
        (known,) = sampled[region]
        assert known["mean"] == pytest.approx(values.mean(), rel=0.02)
        assert known["std"] == pytest.approx(values.std(), rel=0.04)
        assert known["percentile_00_5"] == pytest.approx(np.percentile(values, 0.5), rel=0.05)
        assert known["percentile_99_5"] == pytest.approx(np.percentile(values, 99.5), rel=0.05)
    assert sampled["dtypes"] == ["float32"]


def test_sampling_is_reproducible_streamed_and_stays_in_the_boxes():
    image = RNG.integers(0, 1000, (64, 64, 64)).astype(np.uint16)
    box = ((10, 40), (0, 64), (20, 50))
    runs = []
    for _ in range(2):
        case = case_of(image, {"m": np.zeros_like(image)}, allowed=box)
        runs.append(sample_intensity_properties([case], boxes={"case": [box]}, max_regions=5, seed=4))
        assert len(case.image.regions) == 5
        assert all(s.stop - s.start <= 16 for region in case.image.regions for s in region)
    assert runs[0] == runs[1]
    assert runs[0]["foreground"] is None


def test_ignored_voxels_are_no_foreground():
    image = np.zeros((32, 32, 32), np.uint8)
    image[:16], image[16:] = 10, 200
    label = np.where(image > 100, 255, 1).astype(np.uint8)
    case = case_of(image, {"m": label})
    (known,) = sample_intensity_properties([case], ignore_labels={"m": 255})["foreground"]
    assert (known["min"], known["max"]) == (10, 10)


def test_sampling_leaves_out_what_is_not_finite():
    image = np.full((32, 32, 32), 2.0, np.float32)
    image[::3] = np.nan
    image[1::3] = np.inf
    (known,) = sample_intensity_properties([case_of(image)])["channels"]
    assert (known["min"], known["max"], known["std"]) == (2, 2, 0)


def test_sampling_counts_every_case_and_channel():
    cases = [case_of(np.full((2, 32, 32), value, np.uint8), channels=True) for value in (10, 30)]
    sampled = sample_intensity_properties(cases, max_regions=1)
    assert [known["mean"] for known in sampled["channels"]] == [20, 20]


def test_nothing_to_sample_is_an_error():
    with pytest.raises(ValueError, match="no region"):
        sample_intensity_properties([case_of(np.zeros((8, 8), np.uint8))], boxes={})


def test_an_image_without_contrast_is_warned_of(caplog):
    image = np.stack([np.arange(72).reshape(8, 9), np.full((8, 9), 7)]).astype(np.uint16)
    sample_intensity_properties([case_of(image, channels=True)])
    (line,) = caplog.messages
    assert line.endswith(": channel 1: every value sampled is 7")
    caplog.clear()
    sample_intensity_properties([case_of(image[:1], channels=True)])
    assert not caplog.messages


def _two_units():
    shape, base = (32, 32, 32), RNG.random((32, 32, 32)).astype(np.float32)
    names = ("dim", "bright")
    cases = [case_of(base.reshape(shape) * factor) for factor in (1, 1000)]
    for case, name in zip(cases, names):
        case.name = case.image.path = name
    return cases


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore"])
def test_per_volume_statistics_bring_volumes_in_other_units_together(scheme):
    cases = _two_units()
    normalizer = Normalizer(scheme, sample_intensity_properties(cases, per_volume=True))
    dim, bright = (normalizer.for_volume(case.image)(case.image.data) for case in cases)
    np.testing.assert_allclose(dim, bright, atol=1e-5)
    assert dim.std() > 0.2
    with pytest.raises(ValueError, match="for_volume"):
        normalizer(cases[0].image.data)


def test_per_volume_statistics_follow_from_the_content_alone():
    image = RNG.normal(50, 9, (1, 40, 40, 40)).astype(np.float32)
    properties = {**PROPERTIES, "per_volume": True}
    results = [
        Normalizer("zscore", json.loads(json.dumps(properties)))
        .for_volume(RecordingVolume(image, channels=True, path=path))
        .coefficients(image.dtype, 1)
        for path in ("training", "prediction")
    ]
    np.testing.assert_array_equal(*results)


def test_bytes_ct_and_global_statistics_need_no_volume():
    volume = RecordingVolume(np.zeros((8, 8, 8), np.uint8))
    for scheme, properties in (
        ("unit", {**PROPERTIES, "per_volume": True}),
        ("ct", {**PROPERTIES, "per_volume": True}),
        ("zscore", PROPERTIES),
    ):
        normalizer = Normalizer(scheme, properties)
        assert normalizer.for_volume(volume) is normalizer
        normalizer(volume.data)
    assert volume.regions == []


def test_volumes_in_other_units_are_logged_and_normalised_separately(caplog):
    with caplog.at_level(logging.INFO):
        assert sample_intensity_properties(_two_units())["per_volume"] is True
        assert "dim span" in caplog.text
        assert "bright" in caplog.text
        caplog.clear()
        assert sample_intensity_properties(_two_units(), per_volume=False)["per_volume"] is False
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        caplog.clear()
        assert sample_intensity_properties(_two_units(), per_volume=True)["per_volume"] is True
        assert sample_intensity_properties(_two_units()[:1])["per_volume"] is False
    assert not caplog.records
