"""The Python calls: train on arrays, predict, evaluate."""

from __future__ import annotations

import numpy as np
import pytest
from data_folders import shells

import volumen

SETTINGS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "max_epoch": 1,
        "max_steps_per_epoch": 1,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
    },
    "model_config": {"features_per_stage": [4, 8]},
}


def arrays(shape=(24, 32, 32)):
    label = shells(shape)
    noise = np.random.default_rng(0).integers(0, 60, shape)
    return (label * 100 + noise).astype(np.uint8), label.astype(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    image, label = arrays()
    folder = tmp_path_factory.mktemp("api")
    return volumen.train(
        output=folder,
        settings=SETTINGS,
        images={"a": image, "b": image[::-1]},
        labels={"a": {"cell": label}, "b": {"cell": label[::-1]}},
        masks={"a": {"cell": np.ones_like(label)}},
        device="cpu",
    )


def test_a_training_on_arrays_leaves_a_run(run):
    assert (run / "model_1.pth").is_file()
    assert (run / "model_config.yaml").is_file()


def test_an_array_is_predicted_with_and_without_a_channel_axis(run):
    image, _ = arrays()
    predictor = volumen.load(run / "model_1.pth")
    bare = volumen.predict_array(predictor, image)["cell"]
    channel = volumen.predict_array(run / "model_1.pth", image[None])["cell"]
    assert bare.shape == (1, *image.shape)
    assert (bare >= 0).all()
    assert (bare <= 1).all()
    np.testing.assert_array_equal(bare, channel)


def test_an_image_of_another_kind_is_refused(run):
    image, _ = arrays()
    with pytest.raises(volumen.VolumenError, match="1 channel"):
        volumen.predict_array(run / "model_1.pth", np.stack([image, image]))


def test_files_are_predicted_and_scored(run, tmp_path):
    import tifffile

    image, label = arrays()
    tifffile.imwrite(tmp_path / "a.tif", image)
    (tmp_path / "labels").mkdir()
    tifffile.imwrite(tmp_path / "labels" / "a_cell.tif", label)
    report = volumen.predict(tmp_path / "a.tif", run / "model_1.pth", tmp_path / "p" / "a.zarr", device="cpu")
    assert len(report.volumes) == 1
    scores = volumen.evaluate(tmp_path / "p", tmp_path / "labels", tmp_path / "report")
    assert 0 <= scores.mean["mean_dice"] <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected a data folder or images="),
        ({"images": {}}, "expected at least one array"),
        ({"data": "x", "labels": {}}, "belongs to images="),
        ({"images": {"a": np.zeros((4, 4))}, "labels": {"b": {}}}, "expected names of images: a, found 'b'"),
        (
            {"images": {"a": np.zeros((8, 8, 8)), "b": np.zeros((8, 8, 8))},
             "labels": {"a": {"cell": np.zeros((8, 8, 8), np.uint8)}}},
            "labels: b: has no label for the target 'cell'",
        ),
        (
            {"images": {"a": np.zeros((8, 8, 8))}, "labels": {"a": {"cell": np.zeros((8, 8, 9), np.uint8)}}},
            "shape",
        ),
        (
            {"images": {"a": np.zeros((8, 8))}, "labels": {"a": {"cell": np.zeros((8, 8), np.uint8)}},
             "masks": {"a": {"ink": np.zeros((8, 8))}}},
            "masks: a: expected targets among cell, found 'ink'",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(given, said, tmp_path):
    with pytest.raises(volumen.VolumenError, match=said.replace("(", r"\(")):
        volumen.train(output=tmp_path, settings=SETTINGS, device="cpu", **given)
