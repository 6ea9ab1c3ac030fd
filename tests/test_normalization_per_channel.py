"""A scheme of normalisation for each channel: each channel as a network of that channel alone would see it."""

from __future__ import annotations

import numpy as np
import pytest
from data_folders import ball, write_tiff_folder

from volumen.config.manager import ConfigManager
from volumen.sharing.input_steps import input_steps
from volumen.transforms.normalize import SCHEMES, Normalizer
from volumen.utils.errors import VolumenError

STATISTICS = [
    {
        "min": -1000.0,
        "max": 3000.0,
        "mean": 40.0,
        "std": 200.0,
        "percentile_00_5": -900.0,
        "percentile_99_5": 900.0,
    },
    {"min": 0.0, "max": 99.0, "mean": 20.0, "std": 7.0, "percentile_00_5": 2.0, "percentile_99_5": 80.0},
]
PROPERTIES = {"channels": STATISTICS, "foreground": STATISTICS[::-1], "per_volume": False}


@pytest.mark.parametrize("first", SCHEMES)
@pytest.mark.parametrize("second", SCHEMES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_each_channel_is_normalised_by_its_own_scheme(first, second, dtype):
    image = np.random.default_rng(0).integers(0, 250, (2, 3, 4, 5)).astype(dtype)
    found = Normalizer([first, second], PROPERTIES)(image)
    assert np.array_equal(found[0], Normalizer(first, PROPERTIES)(image)[0])
    assert np.array_equal(found[1], Normalizer(second, PROPERTIES)(image)[1])


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(VolumenError, match="expected 1 schemes, one for each channel, found 2"):
        Normalizer(["unit", "none"], PROPERTIES)(np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(VolumenError, match="found 'bright'"):
        Normalizer(["unit", "bright"], PROPERTIES)


@pytest.mark.parametrize("schemes", [["ct", "percentile"], ["zscore", "none"], ["unit", "zscore"]])
def test_steps_for_other_programs_are_the_same(schemes):
    normalizer = Normalizer(schemes, PROPERTIES)
    image = np.random.default_rng(0).normal(0, 900, (2, 4, 5)).astype(np.float32)
    steps = input_steps(normalizer, image.dtype, 2)
    assert np.allclose(steps.apply(image[None])[0], normalizer(image), atol=1e-4)


def test_steps_that_clip_some_channels_alone_are_refused():
    with pytest.raises(VolumenError, match="some are clipped, some not"):
        input_steps(Normalizer(["ct", "zscore"], PROPERTIES), np.dtype("float32"), 2)


@pytest.fixture
def folder(tmp_path):
    label = ball((12, 16, 16))
    image = np.stack([label * 100 + 50, 255 - label * 60], axis=1).astype(np.uint8)  # (Z, C, Y, X)
    image = np.moveaxis(image, 1, 0)
    return write_tiff_folder(tmp_path / "data", {"a": {"ball": label}}, images={"a": image})


def config_of(folder, **settings):
    return ConfigManager(
        dataset_dir=str(folder),
        device="cpu",
        tr_config={"patch_size": [8, 8, 8]},
        dataset_config={"axes": "czyx", **settings},
    )


def test_a_run_samples_the_statistics_that_a_channel_needs(folder):
    config = config_of(folder, normalization_scheme=["unit", "zscore"])
    assert len(config.intensity_properties["channels"]) == 2
    assert not config.intensity_properties["per_volume"]
    assert config.snapshot()["dataset_config"]["normalization_scheme"] == ["unit", "zscore"]
    assert config_of(folder, normalization_scheme=["unit", "none"]).intensity_properties == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"normalization_scheme": ["ct"]},
            "expected 2 schemes, one for each channel of the images, found ct",
        ),
        ({"normalization_scheme": []}, "normalization_scheme"),
        ({"normalization_scheme": ["unit", "bright"]}, "normalization_scheme"),
        (
            {"normalization_scheme": ["unit", "ct"], "normalize_per_volume": True},
            "does not go with a scheme for each channel",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(folder, settings, message):
    with pytest.raises(VolumenError, match=message):
        _ = config_of(folder, **settings).intensity_properties
