"""A compiled network predicts what the network predicts, says by how much it differs, and names a missing compiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prediction import make_predictor, save_checkpoint

from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.jobs import Job
from volumen.inference.predict import predict_volume
from volumen.inference.predictor import load_predictor
from volumen.inference.request import PredictRequest
from volumen.networks.placement import prepare_network
from volumen.utils.errors import VolumenError

SHAPE = (12, 12, 20)


def predicted(predictor, folder, **settings):
    """Return the probabilities of a prediction of a random image."""
    import zarr

    image = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    request = PredictRequest("", "", str(folder), dtype="float32", amp="off", **settings)
    job = Job(ArrayVolume(image, axes="czyx"), folder / "out.zarr")
    predict_volume(predictor, job, request)
    return zarr.open_group(folder / "out.zarr", mode="r")


@pytest.fixture
def compiled_as(monkeypatch):
    """Return a function that replaces `torch.compile` by one that changes every output by a factor."""

    def replace(factor):
        class Stand(torch.nn.Module):
            def __init__(self, network):
                super().__init__()
                self.network, self.images = network, []

            def forward(self, images, targets):
                self.images.append(images.shape)
                return {name: value * factor for name, value in self.network(images, targets=targets).items()}

        stands = []
        monkeypatch.setattr(torch, "compile", lambda network, **_: stands.append(Stand(network)) or stands[0])
        return stands

    return replace


def test_every_window_runs_compiled_and_the_first_also_plain(tmp_path, compiled_as, caplog):
    stands = compiled_as(1.0)
    caplog.set_level("INFO", logger="volumen")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    predictor = make_predictor()
    plain = predicted(predictor, tmp_path / "a")["ink"]["0"][:]
    assert not stands
    windows, predictor.network.calls = predictor.network.calls, 0
    compiled = predicted(predictor, tmp_path / "b", compile=True)["ink"]["0"][:]
    assert np.array_equal(plain, compiled)
    assert len(stands[0].images) == windows == predictor.network.calls - 1
    assert "the compiled network differs from the network by ink 0.0e+00" in caplog.text


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_compiled_network_that_computes_something_else_is_refused(tmp_path, compiled_as, factor):
    compiled_as(factor)
    with pytest.raises(
        VolumenError, match=r"inference_config.compile: target 'ink' .* differs .* set it to f"
    ):
        predicted(make_predictor(), tmp_path, compile=True)


def test_a_missing_compiler_is_one_line_in_prediction_and_training(tmp_path, without_compiler):
    expected = "expected a C\\+\\+ compiler.*found none; install one, such as g\\+\\+, or set it to false"
    with pytest.raises(VolumenError, match=f"inference_config.compile: {expected}"):
        predicted(make_predictor(), tmp_path, compile=True)
    with pytest.raises(VolumenError, match=f"tr_config.compile: {expected}"):
        prepare_network(torch.nn.Conv2d(1, 1, 1), compile=True)


@pytest.mark.slow
def test_a_real_network_compiled_agrees(tmp_path):
    predictor = load_predictor(save_checkpoint(tmp_path / "m.pth", 3, (8, 8, 8)))
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    plain = predicted(predictor, folders[0])
    compiled = predicted(predictor, folders[1], compile=True)
    for name in ("ink", "tissue", "normals"):
        np.testing.assert_allclose(compiled[name]["0"][:], plain[name]["0"][:], atol=1e-4)
