"""What a model card says is what the network needs: numbers, code that runs, versions, names."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from prediction import make_predictor, save_checkpoint

from volumen.inference.predictor import load_predictor, predict_array
from volumen.sharing.export import export
from volumen.sharing.metadata import build_metadata
from volumen.sharing.model_card import model_card, pip_line, runtime_code
from volumen.sharing.preprocessing import preprocessing_code, preprocessing_lines
from volumen.transforms.normalize import Normalizer

CHANNEL = {
    "min": -5.0,
    "max": 1995.0,
    "mean": 300.0,
    "std": 125.0,
    "percentile_00_5": 10.0,
    "percentile_99_5": 900.0,
}
OTHER = {
    **CHANNEL,
    "min": 0.0,
    "max": 4.0,
    "mean": 1.0,
    "std": 0.5,
    "percentile_00_5": 0.0,
    "percentile_99_5": 2.0,
}


def normalized_by(scheme, channels=(), per_volume=False):
    properties = {"channels": list(channels), "per_volume": per_volume} if channels else None
    predictor = make_predictor(in_channels=max(1, len(channels)))
    return replace(predictor, normalizer=Normalizer(scheme, properties))


@pytest.mark.parametrize(
    ("predictor", "lines"),
    [
        (normalized_by("unit"), ["8-bit images: divide by 255"]),
        (normalized_by("none"), ["values as they are"]),
        (
            normalized_by("unit", [CHANNEL]),
            ["8-bit images: divide by 255", "other images: add 5, divide by 2000"],
        ),
        (normalized_by("percentile", [CHANNEL]), ["clip to 10 to 900, subtract 10, divide by 890"]),
        (normalized_by("zscore", [CHANNEL]), ["subtract 300, divide by 125"]),
        (normalized_by("ct", [CHANNEL]), ["clip to 10 to 900, subtract 300, divide by 125"]),
        (
            normalized_by("zscore", [CHANNEL, OTHER]),
            ["channel 0: subtract 300, divide by 125; channel 1: subtract 1, divide by 0.5"],
        ),
        (
            normalized_by("zscore", [CHANNEL], per_volume=True),
            ["subtract the image's mean and divide by its standard deviation"],
        ),
    ],
)
def test_preprocessing_is_told_in_numbers(predictor, lines):
    assert preprocessing_lines(predictor) == lines


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore", "ct", "none"])
@pytest.mark.parametrize("channels", [[CHANNEL], [CHANNEL, OTHER]])
def test_the_code_of_the_preprocessing_is_the_normaliser(scheme, channels):
    predictor = normalized_by(scheme, channels)
    raw = np.random.default_rng(0).uniform(-100, 2500, (len(channels), 4, 5, 6)).astype(np.float32)
    image = raw if len(channels) > 1 else raw[0]
    found = eval(preprocessing_code(predictor), {"np": np, "image": image})
    expected = predictor.normalizer(raw)
    np.testing.assert_allclose(found, expected if len(channels) > 1 else expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore"])
def test_the_code_goes_by_each_image_where_the_normaliser_does(scheme):
    predictor = normalized_by(scheme, [CHANNEL], per_volume=True)
    raw = np.random.default_rng(0).normal(50, 9, (1, 9, 10, 11)).astype(np.float32)
    found = eval(preprocessing_code(predictor), {"np": np, "image": raw[0]})
    np.testing.assert_allclose(found, predictor.normalizer.for_array(raw)(raw)[0], atol=2e-3)


def test_the_card_s_code_for_onnx_runtime_gives_the_prediction(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    predictor = load_predictor(checkpoint)
    export(checkpoint, tmp_path / "model.onnx", "onnx")
    raw = np.random.default_rng(0).integers(0, 256, (12, 8, 11), dtype=np.uint8)
    monkeypatch.chdir(tmp_path)
    found = {"image": raw}
    exec(runtime_code(predictor), found)
    assert found["outputs"]["tissue"].shape == (12, 8, 11)
    # One window over the image, which the code pads to an even size by reflection.
    padded = np.pad(raw, [(0, 0), (0, 0), (0, 1)], mode="reflect")
    expected = predict_array(predictor, padded[None], patch_size=padded.shape)
    np.testing.assert_allclose(found["outputs"]["ink"], expected["ink"][..., :11], atol=1e-4)
    np.testing.assert_array_equal(found["outputs"]["tissue"], expected["tissue"].argmax(axis=0)[..., :11])
    assert "255" in runtime_code(predictor)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return load_predictor(save_checkpoint(tmp_path_factory.mktemp("card") / "m.pth"))


def test_the_user_is_the_author_or_nobody(predictor):
    mine = build_metadata(predictor, name="m", authors="Ada Lovelace")
    assert (mine["authors"], mine["copyright"]) == ("Ada Lovelace", "Copyright Ada Lovelace")
    nobody = build_metadata(predictor, name="m")
    assert nobody["authors"] == nobody["copyright"] == "not stated"
    training = {
        "epochs": 1,
        "patch_size": [8] * 3,
        "batch_size": 1,
        "optimizer": "x",
        "learning_rate": 1,
        "seed": 0,
    }
    for metadata, line in ((mine, "## Authors\n\nAda Lovelace."), (nobody, "## Authors\n\nNot stated.")):
        metadata["training"] = training
        card = model_card(predictor, metadata, picture=None, parameters=1)
        assert line in card
        assert "volumen authors" not in card
        assert "divide by 255" in card
        assert "onnxruntime.InferenceSession" in card
    assert "volumen authors" not in str(nobody)
    assert "divide by 255" in nobody["image_classes"]


def test_the_pip_line_names_every_package_with_the_version_in_use(predictor):
    line = pip_line(build_metadata(predictor, name="m"))
    assert line.startswith("pip install torch==")
    assert f"torch=={torch.__version__.partition('+')[0]} monai==" in line
    assert re.fullmatch(r"pip install( [a-z0-9.-]+==[0-9][0-9a-z.]*)+", line)
