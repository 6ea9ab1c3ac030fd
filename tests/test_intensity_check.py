"""Images unlike the training volumes are warned of, and volumes that differ are normalised one by one."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from data_folders import ball, write_tiff_folder
from patch_cases import case_of, smooth
from prediction import make_predictor

from volumen.config.manager import ConfigManager
from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.intensity_check import check_intensities
from volumen.inference.predictor import predict_array
from volumen.transforms.intensity_properties import sample_intensity_properties
from volumen.transforms.normalize import Normalizer

SCHEMES = ("unit", "percentile", "zscore", "ct", "none")
TEXTURE = smooth((40, 40, 40), sigma=1.5)


def _tissue(gain: float = 1.0, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    values = np.roll(TEXTURE, seed * 7, axis=1) * 60 + 30
    most = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else np.inf
    return np.clip(values * gain, 0, most).astype(dtype)


def _trained(scheme: str, dtype: str = "uint8"):
    sampled = sample_intensity_properties([case_of(_tissue(dtype=dtype, seed=seed)) for seed in (0, 1)])
    dataset = {"normalization_scheme": scheme, "trained_intensities": sampled["volumes"]}
    return replace(
        make_predictor(), config={"dataset_config": dataset}, normalizer=Normalizer(scheme, sampled)
    )


def check(predictor, image) -> None:
    check_intensities(predictor.config, predictor.normalizer, image)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gain", [4.0, 0.25])
def test_four_times_brighter_or_darker_is_warned_of_with_both_figures(scheme, dtype, gain, caplog):
    image = _tissue(gain, dtype)
    check(_trained(scheme, dtype), ArrayVolume(image))
    (line,) = caplog.messages
    seen, trained = line.split("but the network was trained on")
    for values, text in ((image, seen), (_tissue(dtype=dtype), trained)):
        numbers = [float(number) for number in re.findall(r"[0-9.]+", text)][:3]
        np.testing.assert_allclose(numbers, [*np.percentile(values, [0.5, 99.5]), values.mean()], rtol=0.03)
    assert "normalize_per_volume" in line
    assert "percentile" in line


@pytest.mark.parametrize("scheme", SCHEMES)
def test_images_like_the_training_volumes_are_not_warned_of(scheme, caplog):
    predictor = _trained(scheme)
    crop = _tissue(seed=2)[:12, :20, :20]
    background = _tissue(seed=3)
    background[:, :10] = 0
    for image in (_tissue(seed=2), _tissue(1.1), crop, background):
        check(predictor, ArrayVolume(image))
    assert not caplog.messages


def test_images_in_memory_are_compared_and_old_checkpoints_say_nothing(caplog):
    predict_array(_trained("unit"), _tissue(4.0)[None])
    assert len(caplog.messages) == 1
    caplog.clear()
    predict_array(make_predictor(), _tissue(4.0)[None])
    assert not caplog.messages


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore"])
def test_volumes_normalised_by_themselves_are_the_same_at_any_brightness(scheme, caplog):
    cases = [case_of(_tissue(gain)) for gain in (1.0, 4.0)]
    for number, case in enumerate(cases):
        case.name = case.image.path = str(number)
    with caplog.at_level(logging.INFO):
        sampled = sample_intensity_properties(cases)
    assert "each volume is normalised by its own statistics" in caplog.text
    normalizer = Normalizer(scheme, sampled)
    dark = normalizer.for_array(_tissue()[None])(_tissue()[None])
    bright = normalizer.for_array(_tissue(2.0)[None])(_tissue(2.0)[None])
    # But for the rounding of bytes.
    np.testing.assert_allclose(dark, bright, atol=0.06)
    caplog.clear()
    predictor = replace(_trained(scheme), normalizer=normalizer)
    check(predictor, ArrayVolume(_tissue(4.0)))
    assert not caplog.messages


def test_bytes_of_earlier_checkpoints_keep_the_range_of_their_type():
    known = sample_intensity_properties([case_of(_tissue())])["channels"]
    image = _tissue()[None]
    old = Normalizer("unit", {"channels": known, "per_volume": True})
    np.testing.assert_allclose(old.for_array(image)(image), image / np.float32(255), rtol=1e-6)


def _folder(tmp_path, gains):
    label = ball((32, 32, 64))
    root = write_tiff_folder(tmp_path, {f"v{i}": {"cell": label} for i in range(len(gains))})
    import tifffile

    for number, gain in enumerate(gains):
        tifffile.imwrite(root / "images" / f"v{number}.tif", _tissue(gain)[:32, :32].repeat(2, 2)[..., :64])
    return root


@pytest.mark.parametrize("gains", [(1.0, 1.0), (1.0, 4.0)])
def test_a_run_records_its_intensities_and_chooses_by_how_far_its_volumes_differ(gains, tmp_path):
    config = ConfigManager(
        tr_setup={"tr_val_split": 1.0},
        tr_config={"patch_size": [16, 16, 16]},
        dataset_dir=str(_folder(tmp_path, gains)),
    )
    dataset = config.snapshot()["dataset_config"]
    (channel,) = dataset["trained_intensities"]
    lows, highs = zip(*(np.percentile(_tissue(gain)[:32, :32], [0.5, 99.5]) for gain in gains))
    np.testing.assert_allclose(channel["percentile_00_5"], [min(lows), max(lows)], atol=3)
    np.testing.assert_allclose(channel["percentile_99_5"], [min(highs), max(highs)], atol=3)
    assert bool(dataset["intensity_properties"].get("per_volume")) is (gains[1] != gains[0])
    again = ConfigManager(**config.snapshot())
    assert again.snapshot()["dataset_config"] == dataset
