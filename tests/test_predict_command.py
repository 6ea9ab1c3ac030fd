"""What `volumen predict` does follows from flags, then the experiment file, then the checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import numpy as np
import pytest
import tifffile
import torch
from prediction import save_checkpoint

from volumen.cli.main import main
from volumen.cli.predict import _inference_section, add_predict_arguments, request_from
from volumen.config.prediction import InferenceConfig
from volumen.inference.request import PredictRequest
from volumen.inference.settings import request_fields
from volumen.utils.errors import VolumenError


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
    request = request_from(arguments, {**trained, **request_fields(_inference_section(arguments))})
    assert (request.overlap, request.batch_size, request.tta) == (0.25, 7, "mirror")


def test_the_file_may_name_the_checkpoint(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("inference_config: {checkpoint_path: b.pth}\n")
    arguments = parsed("--config-path", str(path))
    assert request_from(arguments, request_fields(_inference_section(arguments))).checkpoint == "b.pth"
    with pytest.raises(VolumenError, match="-m"):
        request_from(parsed())


def test_a_wrong_key_of_the_file_is_told(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("inference_config: {overlp: 0.25}\n")
    with pytest.raises(VolumenError, match="did you mean overlap"):
        request_fields(_inference_section(parsed("-m", "a.pth", "--config-path", str(path))))


def predicted(tmp_path, *words: str) -> int:
    return main(
        ["predict", "-m", str(tmp_path / "m.pth"), "-o", str(tmp_path / "out"), "--device", "cpu", *words]
    )


def images(tmp_path, **arrays):
    (tmp_path / "images").mkdir()
    for name, array in arrays.items():
        tifffile.imwrite(tmp_path / "images" / f"{name}.tif", array, photometric="minisblack")
    return str(tmp_path / "images")


GREY = np.random.default_rng(0).integers(0, 255, (9, 10, 11)).astype(np.uint8)


def test_the_file_says_whether_weights_may_be_missing(tmp_path, capfd):
    content = torch.load(save_checkpoint(tmp_path / "m.pth"), weights_only=True)
    left_out = sorted(content["model"])[0]
    del content["model"][left_out]
    torch.save(content, tmp_path / "m.pth")
    folder = images(tmp_path, a=GREY)
    assert predicted(tmp_path, "-i", folder) == 2
    assert "weights do not fit" in capfd.readouterr().err
    (tmp_path / "my.yaml").write_text("inference_config: {load_strict: false}\n")
    assert predicted(tmp_path, "-i", folder, "--config-path", str(tmp_path / "my.yaml")) == 0
    assert f"1 weights are not in it and stay random: {left_out}" in capfd.readouterr().err
    assert (tmp_path / "out" / "a.zarr").is_dir()


def broken(path, content=b""):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("b.tif", broken, "b.tif: is empty"),
        (
            "b.nii.gz",
            lambda path: broken(path, b"hello" * 9),
            "b.nii.gz: expected zarr, TIFF, NIfTI, PNG, HDF5, MRC, NRRD,",
        ),
        (
            "b.tif",
            lambda path: path.mkdir(),
            "b.tif: expected a volume, or a folder of numbered TIFF or PNG slices",
        ),
        ("b.tif", lambda path: path.symlink_to(path.with_name("gone.tif")), "b.tif"),
        ("b.tif", lambda path: tifffile.imwrite(path, GREY[0]), "b.tif: expected 3 spatial axes"),
        ("b.tif", lambda path: tifffile.imwrite(path, GREY / 255.0), "b.tif: expected values of type uint8"),
    ],
)
def test_a_wrong_image_of_a_folder_is_told_before_the_first_is_predicted(tmp_path, capfd, name, spoil, said):
    save_checkpoint(tmp_path / "m.pth")
    folder = images(tmp_path, a=GREY)
    spoil(tmp_path / "images" / name)
    assert predicted(tmp_path, "-i", folder) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert said in line
    assert not (tmp_path / "out").exists()


def test_another_type_than_in_training_is_told(tmp_path, capfd):
    save_checkpoint(tmp_path / "m.pth")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("another kind of file is passed over")
    tifffile.imwrite(tmp_path / "images" / "a.tif", GREY.astype(np.uint16) * 16)
    assert predicted(tmp_path, "-i", str(tmp_path / "images")) == 0
    assert "a.tif: values of type uint16, the network was trained on uint8" in capfd.readouterr().err
