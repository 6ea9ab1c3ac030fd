"""Prediction end to end: streaming equals the plain computation, hostile inputs, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from prediction import blend_in_memory, make_predictor, save_checkpoint

from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.checks.image import check_image
from volumen.inference.jobs import Job
from volumen.inference.predict import predict, predict_volume
from volumen.inference.predictor import load_predictor, predict_array
from volumen.inference.request import PredictRequest
from volumen.inference.windows.sliding import SlidingWindow
from volumen.inference.windows.tta import transforms
from volumen.transforms.normalize import Normalizer
from volumen.utils.errors import VolumenError

ALL_HEADS_3D = {
    "ink": (1, "sigmoid", "binary"),
    "tissue": (3, "softmax", "multiclass"),
    "normals": (3, "none", "vector"),
    "distance": (1, "none", "distance"),
    "tensor": (6, "none", "tensor"),
    "direction": (3, "none", "axis"),
}


def request_for(output, **settings):
    return PredictRequest(
        **{"input": "", "checkpoint": "", "output": str(output), "dtype": "float32", "amp": "off", **settings}
    )


def logits_reference(predictor, image, name, overlap=0.5):
    def run(window):
        with torch.no_grad():
            tensor = torch.from_numpy(window.astype(np.float32))[None]
            return predictor.network(tensor)[name][0].numpy()

    window = predictor.fit_patch(predictor.patch_size, image.shape[1:])
    return blend_in_memory(run, predictor.normalizer(image), window, overlap)


@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((20, 23, 31), (8, 8, 8), 0.5),
        ((5, 40, 9), (8, 16, 8), 0.3),
        ((3, 4, 5), (8, 8, 8), 0.5),
        ((16, 16, 16), (16, 16, 16), 0.5),
        ((37, 41), (16, 8), 0.5),
        ((7, 100), (16, 16), 0.7),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_streamed_prediction_equals_blending_in_memory(shape, patch, overlap, batch_size, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, *shape), dtype=np.uint8)
    predictor = make_predictor(len(shape), patch)
    reference, windows = logits_reference(predictor, image, "ink", overlap)
    volume = ArrayVolume(image[0], axes="zyx"[-len(shape) :])
    predictor.network.calls = 0
    request = request_for(tmp_path / "out.zarr", overlap=overlap, batch_size=batch_size)
    report = predict_volume(predictor, Job(volume, tmp_path / "out.zarr"), request)
    assert predictor.network.calls == windows == report.windows
    stored = zarr.open_array(tmp_path / "out.zarr" / "ink" / "0", mode="r")[...]
    np.testing.assert_allclose(stored, 1 / (1 + np.exp(-reference[0])), atol=1e-5)


def test_predict_array_and_the_inferer_agree_with_the_reference():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2, 11, 19, 14), dtype=np.uint8)
    predictor = make_predictor(3, (8, 8, 8), {"tissue": (3, "softmax", "multiclass")}, in_channels=2)
    reference, _ = logits_reference(predictor, image, "tissue")
    inferer = SlidingWindow((8, 8, 8), overlap=0.5, batch_size=4)
    batch = torch.from_numpy(predictor.normalizer(image))[None].repeat(2, 1, 1, 1, 1)
    with torch.no_grad():
        outputs = inferer(batch, predictor.network)
    np.testing.assert_allclose(outputs["tissue"][1], reference, atol=1e-5)
    expected = torch.softmax(torch.from_numpy(reference), 0)
    np.testing.assert_allclose(predict_array(predictor, image)["tissue"], expected, atol=1e-5)


SMALL = [((5, 19, 4), (8, 20, 4)), ((8, 3, 8), (8, 4, 8)), ((2, 2, 2), (8, 8, 8)), ((1, 30, 30), (4, 16, 16))]


@pytest.mark.parametrize(("shape", "window"), SMALL)
def test_windows_shrink_to_small_images_and_reflect_the_rest(shape, window, tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (1, *shape), dtype=np.uint8)
    predictor = replace(make_predictor(3, (8, 8, 8)), divisor=(4, 4, 4))
    seen = []
    predictor.network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    reference, _ = logits_reference(predictor, image, "ink")
    with torch.no_grad():
        batch = torch.from_numpy(predictor.normalizer(image))[None]
        found = SlidingWindow((8, 8, 8), overlap=0.5, divisor=(4, 4, 4))(batch, predictor.network)["ink"]
    assert found.shape == (1, 1, *shape)
    np.testing.assert_allclose(found[0], reference, atol=1e-5)
    probability = 1 / (1 + np.exp(-reference))
    np.testing.assert_allclose(predict_array(predictor, image)["ink"], probability, atol=1e-5)
    predict_volume(
        predictor,
        Job(ArrayVolume(image[0], axes="zyx"), tmp_path / "o.zarr"),
        request_for(tmp_path / "o.zarr"),
    )
    stored = zarr.open_array(tmp_path / "o.zarr" / "ink" / "0", mode="r")[...]
    np.testing.assert_allclose(stored, probability[0], atol=1e-5)
    assert set(seen) == {window}


def test_the_inferer_asks_the_network_for_its_divisor_and_else_keeps_its_window():
    seen = []

    def network(windows):
        seen.append(tuple(windows.shape[2:]))
        return {"ink": windows}

    image = torch.rand(1, 1, 5, 8)
    plain = SlidingWindow((8, 8))(image, network)["ink"]
    torch.testing.assert_close(plain, image)
    network.divisor = (2, 2)
    torch.testing.assert_close(SlidingWindow((8, 8))(image, network)["ink"], image)
    assert seen == [(8, 8), (6, 8)]


def test_a_small_image_is_logged_in_one_line(tmp_path, caplog):
    predictor = replace(make_predictor(3, (8, 8, 8)), divisor=(4, 4, 4))
    volume = ArrayVolume(np.random.default_rng(0).integers(0, 256, (5, 30, 30), dtype=np.uint8))
    with caplog.at_level("INFO"):
        predict_volume(predictor, Job(volume, tmp_path / "o.zarr"), request_for(tmp_path / "o.zarr"))
    lines = [r.getMessage() for r in caplog.records if "smaller than a window" in r.getMessage()]
    assert len(lines) == 1
    assert (
        "5x30x30 is smaller than a window: windows of 8x8x8, of which 3 voxels along z are reflected"
        in lines[0]
    )


def test_turned_windows_of_small_images_give_what_the_whole_gives(tmp_path):
    # A network that sees one voxel at a time knows nothing of windows, so neither shape nor turns may show.
    image = np.random.default_rng(3).integers(0, 256, (5, 11, 6), dtype=np.uint8)
    predictor = replace(make_predictor(3, (8, 8, 8)), divisor=(2, 2, 2))
    volume = ArrayVolume(image)
    for mode in ("mirror", "rotate"):
        pixelwise = replace(predictor, network=OneVoxel())
        path = tmp_path / f"{mode}.zarr"
        predict_volume(pixelwise, Job(volume, path), request_for(path, tta=mode))
        stored = zarr.open_array(path / "ink" / "0", mode="r")[...]
        np.testing.assert_allclose(stored, 1 / (1 + np.exp(image / np.float32(-255))), atol=1e-5)


class OneVoxel(torch.nn.Module):
    """The identity with the interface of a network."""

    def forward(self, windows, targets=None):
        return {"ink": windows}


def test_every_kind_of_head_streams_as_it_does_in_memory(tmp_path):
    image = np.random.default_rng(2).integers(0, 256, (19, 13, 21), dtype=np.uint8)
    predictor = make_predictor(3, (8, 8, 8), ALL_HEADS_3D)
    predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "o.zarr"), request_for(tmp_path / "o.zarr"))
    expected = predict_array(predictor, image[None])
    root = zarr.open_group(tmp_path / "o.zarr", mode="r")
    for name, (channels, _, kind) in ALL_HEADS_3D.items():
        stored = root[f"{name}/0"][...]
        stored = stored[None] if channels == 1 else stored
        np.testing.assert_allclose(stored, expected[name], atol=2e-5, err_msg=name)
        if kind in ("vector", "axis"):
            np.testing.assert_allclose(np.linalg.norm(stored, axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_checkpoint_alone_is_enough(ndim, tmp_path):
    shape = (20, 33, 17)[:ndim]
    image = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    zarr.save_array(tmp_path / "scroll.zarr", image)
    checkpoint = save_checkpoint(tmp_path / "model_3.pth", ndim, (8,) * ndim)
    request = PredictRequest(
        str(tmp_path / "scroll.zarr"), str(checkpoint), str(tmp_path / "out"), amp="off", dtype="float32"
    )
    report = predict(request)
    assert report.volumes[0].output == str(tmp_path / "out" / "scroll.zarr")
    root = zarr.open_group(tmp_path / "out" / "scroll.zarr", mode="r")
    expected = predict_array(load_predictor(checkpoint), image[None])
    assert set(expected) == {"ink", "tissue", "normals"}
    for name, values in expected.items():
        stored = root[f"{name}/0"][...]
        np.testing.assert_allclose(stored, values[0] if len(values) == 1 else values, atol=1e-5)
    assert root.attrs["volumen"]["recipe"]["model"]["epoch"] == 3


def test_only_the_targets_asked_for_run(tmp_path):
    predictor = make_predictor(3, (8, 8, 8), ALL_HEADS_3D)
    asked = []
    predictor.network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(tuple(kwargs["targets"])), with_kwargs=True
    )
    image = np.random.default_rng(4).integers(0, 256, (9, 9, 9), dtype=np.uint8)
    request = request_for(tmp_path / "o.zarr", targets=("distance", "ink"))
    predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "o.zarr"), request)
    assert set(asked) == {("distance", "ink")}
    assert set(zarr.open_group(tmp_path / "o.zarr", mode="r").group_keys()) == {"OME", "distance", "ink"}


def test_a_region_is_the_crop_of_the_whole(tmp_path):
    image = np.random.default_rng(5).integers(0, 256, (30, 25, 20), dtype=np.uint8)
    predictor = make_predictor()
    region = ((3, 17), (0, 9), (11, 20))
    predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "a.zarr"), request_for("a"))
    predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "b.zarr"), request_for("b", region=region))
    whole = zarr.open_array(tmp_path / "a.zarr" / "ink" / "0", mode="r")
    part = zarr.open_array(tmp_path / "b.zarr" / "ink" / "0", mode="r")
    np.testing.assert_allclose(part[...], whole[3:17, 0:9, 11:20], atol=1e-6)
    ome = zarr.open_group(tmp_path / "b.zarr" / "ink", mode="r").attrs["ome"]
    shift = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][1]
    assert shift == {"type": "translation", "translation": [3.0, 0.0, 11.0]}


def test_a_mask_leaves_the_inside_as_it_was_and_saves_windows(tmp_path):
    image = np.random.default_rng(6).integers(0, 256, (40, 24, 24), dtype=np.uint8)
    mask = np.zeros(image.shape, np.uint8)
    mask[5:12, 3:20, 2:15] = 1
    predictor = make_predictor()
    predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "a.zarr"), request_for("a"))
    report = predict_volume(
        predictor, Job(ArrayVolume(image), tmp_path / "b.zarr", ArrayVolume(mask)), request_for("b")
    )
    whole = zarr.open_array(tmp_path / "a.zarr" / "ink" / "0", mode="r")[...]
    part = zarr.open_array(tmp_path / "b.zarr" / "ink" / "0", mode="r")[...]
    np.testing.assert_allclose(part[mask > 0], whole[mask > 0], atol=1e-6)
    assert not part[mask == 0].any()
    assert report.skipped > 0


def test_windows_without_contrast_are_skipped_and_left_empty(tmp_path):
    image = np.full((8, 8, 40), 7, np.uint8)
    image[:, :, 30:] = np.random.default_rng(7).integers(0, 256, (8, 8, 10))
    predictor = make_predictor()
    report = predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "o.zarr"), request_for("o"))
    stored = zarr.open_array(tmp_path / "o.zarr" / "ink" / "0", mode="r")[...]
    assert report.skipped == 6  # starts 0, 4, ..., 20: the one at 24 sees voxel 30
    assert not stored[..., :28].any()
    assert (stored[..., 28:] > 0).all()
    whole = predict_volume(
        predictor, Job(ArrayVolume(image), tmp_path / "p.zarr"), request_for("p", skip_empty=False)
    )
    assert whole.skipped == 0


def test_settings_can_be_replaced():
    request = request_for("x")
    assert replace(request, overlap=0.25).overlap == 0.25
    assert Path(request.output) == Path("x")


def test_another_number_of_channels_is_refused(tmp_path):
    predictor = make_predictor(in_channels=2)
    with pytest.raises(VolumenError, match=r"expected 2 channels.*found 1"):
        predict_volume(predictor, Job(ArrayVolume(np.zeros((9, 9, 9))), tmp_path / "o"), request_for("o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.random.default_rng(0).integers(0, 60000, (9, 9, 9)).astype(np.uint16),
            "intensities of [0-9.]+ to [0-9.e+]+ with mean",
        ),
        (
            np.random.default_rng(0).random((9, 9, 9)).astype(np.float32),
            "values of type float32, the network",
        ),
    ],
)
def test_another_type_or_range_than_in_training_is_told(values, message, tmp_path, caplog):
    import re

    predictor = make_predictor()
    properties = {"dtypes": ["uint16"], "channels": [{"min": 0, "max": 4095}]}
    object.__setattr__(predictor, "config", {"dataset_config": {"intensity_properties": properties}})
    object.__setattr__(predictor, "normalizer", Normalizer("none"))
    predict_volume(predictor, Job(ArrayVolume(values), tmp_path / "o.zarr"), request_for("o"))
    assert re.search(message, caplog.text)


def test_another_ratio_of_spacings_than_in_training_is_told_and_turns_keep_to_equal_ones(tmp_path, caplog):
    state = torch.load(save_checkpoint(tmp_path / "m.pth"), weights_only=True)
    state["config"]["dataset_config"].update(spacing=None, trained_spacing=[3.0, 1.0, 1.0])
    torch.save(state, tmp_path / "m.pth")
    predictor = load_predictor(tmp_path / "m.pth")
    assert predictor.spacing == (3.0, 1.0, 1.0)
    for spacing, told in (((6.0, 2.0, 2.0), False), ((1.0, 1.0, 1.0), True), (None, False)):
        caplog.clear()
        check_image(predictor, ArrayVolume(np.zeros((8, 8, 8), np.uint8), spacing=spacing))
        assert ("the network was trained on 3 x 1 x 1" in caplog.text) is told
    # Flips, and quarter turns in the plane of the axes that are alike: 8 flips of 2 orders.
    assert len(transforms("rotate", predictor.patch_size, predictor.spacing)) == 16


def test_nan_in_an_image_does_not_spread(tmp_path):
    image = np.random.default_rng(8).random((9, 9, 20), dtype=np.float32)
    image[4, 4, 4] = np.nan
    predictor = make_predictor()
    object.__setattr__(predictor, "normalizer", Normalizer("none"))
    predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "o.zarr"), request_for("o"))
    assert np.isfinite(zarr.open_array(tmp_path / "o.zarr" / "ink" / "0", mode="r")[...]).all()


def test_a_released_model_is_read_from_its_two_files(tmp_path):
    content = torch.load(save_checkpoint(tmp_path / "whole.pth", 2, (8, 8)), weights_only=True)
    torch.save(content.pop("model"), tmp_path / "model.pt")
    with pytest.raises(VolumenError, match="weights alone"):
        load_predictor(tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps(content))
    image = np.random.default_rng(0).integers(0, 256, (1, 12, 20), dtype=np.uint8)
    expected, found = (
        predict_array(load_predictor(tmp_path / name), image) for name in ("whole.pth", "model.pt")
    )
    assert np.array_equal(found["ink"], expected["ink"])


def test_nan_is_refused_where_training_refused_it(tmp_path, caplog):
    image = np.random.default_rng(8).random((9, 9, 20), dtype=np.float32)
    image[4, 5, 6] = np.inf
    predictor = make_predictor()
    object.__setattr__(predictor, "normalizer", Normalizer("none"))
    object.__setattr__(predictor, "config", {"dataset_config": {"nonfinite": "refuse"}})
    job = Job(ArrayVolume(image), tmp_path / "o.zarr")
    with pytest.raises(
        VolumenError, match=r"found 1 NaN or infinite values in a window, the first at \(4, 5, 6\)"
    ):
        predict_volume(predictor, job, request_for("o"))
    predict_volume(predictor, job, request_for("o", nonfinite="zero"))
    assert caplog.text.count("count as 0") == 1


def test_nan_counts_as_the_normalised_zero_and_windows_of_nothing_else_are_skipped(tmp_path):
    image = np.random.default_rng(9).integers(1, 9, (8, 8, 40)).astype(np.float32)
    image[:, :, :16] = np.nan
    image[2, 3, 20] = -np.inf
    predictor = make_predictor()
    object.__setattr__(
        predictor, "normalizer", Normalizer("zscore", {"channels": [{"mean": 5.0, "std": 2.0}]})
    )
    report = predict_volume(predictor, Job(ArrayVolume(image), tmp_path / "o.zarr"), request_for("o"))
    assert report.skipped == 3  # starts 0, 4 and 8; the one at 12 sees voxel 16
    clean = np.where(np.isfinite(image), image, 5.0).astype(np.float32)
    predict_volume(
        predictor, Job(ArrayVolume(clean), tmp_path / "p.zarr"), request_for("p", skip_empty=False)
    )
    ink, expected = (
        zarr.open_array(tmp_path / name / "ink" / "0", mode="r")[...] for name in ("o.zarr", "p.zarr")
    )
    np.testing.assert_array_equal(ink[..., 16:], expected[..., 16:])


@pytest.mark.parametrize("ndim", [2, 3])
def test_augmentation_tells_its_cost_and_the_dice_that_the_files_have(ndim, tmp_path):
    rng = np.random.default_rng(10)
    shape = (12, 20, 17)[-ndim:]
    for folder, name, values in (
        ("images", "a", rng.integers(0, 256, shape, dtype=np.uint8)),
        ("labels", "a_ink", rng.integers(0, 2, shape, dtype=np.uint8)),
        ("labels", "a_tissue", rng.integers(0, 3, shape, dtype=np.uint8)),
        ("masks", "a_ink", rng.integers(0, 2, shape, dtype=np.uint8)),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        zarr.save_array(tmp_path / folder / f"{name}.zarr", values)
    checkpoint = save_checkpoint(tmp_path / "m.pth", ndim, (8,) * ndim)
    image = str(tmp_path / "images" / "a.zarr")
    request = PredictRequest(image, str(checkpoint), str(tmp_path / "plain.zarr"), amp="off", dtype="labels")
    assert predict(request).volumes[0].augmentation is None
    report = (
        predict(replace(request, output=str(tmp_path / "mirror.zarr"), tta="mirror")).volumes[0].augmentation
    )
    assert report.passes == 2**ndim
    assert report.factor > 1
    mask = zarr.open_array(tmp_path / "masks" / "a_ink.zarr", mode="r")[...] > 0
    for name, known, classes in (("ink", mask, (1,)), ("tissue", np.ones_like(mask), (1, 2))):
        truth = zarr.open_array(tmp_path / "labels" / f"a_{name}.zarr", mode="r")[...]
        for found, output in zip(report.dice[name], ("plain", "mirror")):
            labels = zarr.open_array(tmp_path / f"{output}.zarr" / "labels" / name / "0", mode="r")[...]
            expected = np.mean(
                [
                    2 * ((labels == k) & (truth == k) & known).sum()
                    / (((labels == k) & known).sum() + ((truth == k) & known).sum())
                    for k in classes
                ]
            )  # fmt: skip
            assert found == pytest.approx(
                expected, abs=2e-3
            )  # a voxel on the threshold may fall to either side
    assert f"Dice of ink {report.dice['ink'][0]:.4f} without" in str(report)


def test_augmentation_without_labels_says_so(tmp_path):
    image = np.random.default_rng(11).integers(0, 256, (9, 9), dtype=np.uint8)
    predictor = make_predictor(2, (8, 8))
    report = predict_volume(
        predictor, Job(ArrayVolume(image), tmp_path / "o"), request_for("o", tta="mirror")
    )
    assert str(report.augmentation).startswith("test-time augmentation mirror: 4 forward passes a window, ")
    assert "no labels" in str(report.augmentation)
