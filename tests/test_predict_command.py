"""What `volumen predict` does follows from flags, then the experiment file, then the checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import pytest
from scripts.errors import VolumenError
from scripts.inference.command import add_predict_arguments, file_settings, request_fields, request_from
from scripts.inference.predict import PredictRequest
from scripts.sections import InferenceConfig


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_predict_arguments(parser)
    return parser.parse_args(["-i", "image.tif", "-o", "out.zarr", *words])


def test_every_key_of_inference_config_is_a_field_of_the_request():
    section = {name: 1 if value is None else value for name, value in asdict(InferenceConfig()).items()}
    section["instances"] = {"boundary": "membrane"}
    assert len(request_fields(section)) == len(section) - len({"load_strict"})
    assert set(request_fields(section)) <= set(PredictRequest.__dataclass_fields__)
    assert request_fields({"output_targets": ["ink"], "load_strict": False, "of_another_version": 1}) == {
        "targets": ("ink",)
    }


def test_a_flag_goes_before_the_file_and_the_file_before_the_checkpoint(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("inference_config: {overlap: 0.25, batch_size: 3}\n")
    arguments = parsed("-m", "a.pth", "--config-path", str(path), "--batch-size", "7")
    trained = request_fields({"overlap": 0.75, "batch_size": 2, "tta": "mirror"})
    request = request_from(arguments, {**trained, **file_settings(arguments)})
    assert (request.overlap, request.batch_size, request.tta) == (0.25, 7, "mirror")


def test_the_file_may_name_the_checkpoint(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("inference_config: {checkpoint_path: b.pth}\n")
    arguments = parsed("--config-path", str(path))
    assert request_from(arguments, file_settings(arguments)).checkpoint == "b.pth"
    with pytest.raises(VolumenError, match="-m"):
        request_from(parsed())


def test_a_wrong_key_of_the_file_is_told(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("inference_config: {overlp: 0.25}\n")
    with pytest.raises(VolumenError, match="did you mean overlap"):
        file_settings(parsed("-m", "a.pth", "--config-path", str(path)))
