"""`volumen pretrain` from end to end: its files, exact resume, hostile volumes, the training that starts from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
import zarr
from conftest import ROOT
from data_folders import ball, shells, write_tiff_folder
from ignite.engine import Events
from PIL import Image

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main
from volumen.config.pretraining import PretrainingConfig
from volumen.run import run_bundle
from volumen.time_budget import fit
from volumen.time_budget.measure import Cost, measure, training_objects
from volumen.time_budget.memory_fit import smallest as smallest_candidate
from volumen.utils.bundle_root import configs_dir

TINY = [
    "--set", "model_config.features_per_stage=[4,8]", "--set", "model_config.n_blocks_per_stage=[1,1]",
    "--workers", "0", "--device", "cpu",
]  # fmt: skip
SHORT = ["--patch-size", "16,16,16", "--steps-per-epoch", "2", "--max-epochs", "2", *TINY]
SHORT2D = ["--patch-size", "16,16", "--steps-per-epoch", "2", "--max-epochs", "1", *TINY]


def images_folder(root: Path, **images: np.ndarray) -> Path:
    """Write a folder with images alone."""
    (root / "images").mkdir(parents=True)
    for name, image in images.items():
        tifffile.imwrite(root / "images" / f"{name}.tif", image)
    return root


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A volume with labels."""
    root = tmp_path_factory.mktemp("labelled")
    return write_tiff_folder(root / "data", {"a": {"shell": shells((24, 40, 40))}})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, folder):
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("out")
    assert main(["pretrain", "-i", str(folder), "-o", str(out), *SHORT]) == 0
    return out / "pretrained"


def encoder_of(path: Path) -> dict[str, torch.Tensor]:
    model = load_checkpoint(path)["model"]
    return {name: value for name, value in model.items() if name.startswith("encoder.")}


def test_a_run_leaves_checkpoint_snapshot_curve_and_picture(pretrained):
    names = {path.name for path in pretrained.iterdir()}
    assert {
        f"pretrained_{what}"
        for what in ("1.pth", "2.pth", "final.pth", "config.yaml", "debug.gif", "split.json")
    } <= names
    assert "metrics.csv" in names
    assert "pretrained_best.pth" not in names
    with Image.open(pretrained / "pretrained_debug.gif") as picture:
        assert picture.n_frames == 16
        frame = np.asarray(picture.convert("RGB")).astype(int)
    # The second of four columns shows hidden blocks in their own colour, the others do not.
    hidden = np.abs(frame - (44, 58, 82)).sum(axis=2) < 30
    shares = [part[60:-20].mean() for part in np.array_split(hidden, 4, axis=1)]
    assert shares[1] > 0.4
    assert max(shares[0], shares[2], shares[3]) < 0.2
    settings = yaml.safe_load((pretrained / "pretrained_config.yaml").read_text())
    assert settings["model_config"]["features_per_stage"] == [4, 8]
    assert load_checkpoint(pretrained / "pretrained_final.pth")["model_config"]["pretraining"]


def test_labels_and_masks_have_no_influence(tmp_path, folder, pretrained):
    bare = images_folder(tmp_path / "bare", a=tifffile.imread(folder / "images" / "a.tif"))
    assert main(["pretrain", "-i", str(bare), "-o", str(tmp_path / "out"), *SHORT]) == 0
    found = encoder_of(tmp_path / "out" / "pretrained" / "pretrained_final.pth")
    expected = encoder_of(pretrained / "pretrained_final.pth")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, folder, pretrained, workers):
    half = [*SHORT, "--workers", workers, "--model-name", "pretrained"]
    half[half.index("--max-epochs") + 1] = "1"
    out = ["-o", str(tmp_path / "out")]
    assert main(["pretrain", "-i", str(folder), *out, *half, "--set", "tr_config.scheduler=constant"]) == 0
    whole = [*SHORT, "--workers", workers, "--set", "tr_config.scheduler=constant"]
    assert main(["pretrain", "-i", str(folder), *out, *whole, "--resume"]) == 0
    other = ["-o", str(tmp_path / "other")]
    assert main(["pretrain", "-i", str(folder), *other, *SHORT, "--set", "tr_config.scheduler=constant"]) == 0
    runs = [tmp_path / name / "pretrained" for name in ("out", "other")]
    states = [load_checkpoint(run / "pretrained_2.pth") for run in runs]
    for name, value in states[1]["model"].items():
        assert torch.equal(states[0]["model"][name], value), name
    assert (runs[0] / "metrics.csv").read_bytes() == (runs[1] / "metrics.csv").read_bytes()


class Terminate:
    """Sends this process SIGTERM after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), self.stop)

    def stop(self, engine) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_within_an_epoch_ends_with_the_same_bits(tmp_path, folder):
    def run(name, *handlers, resume=False):
        config = PretrainingConfig(
            dataset_dir=str(folder), output_dir=str(tmp_path / name), device="cpu", tr_setup={"resume": resume},
            tr_config={"patch_size": [16, 16, 16], "max_steps_per_epoch": 3, "max_epoch": 2,
                       "num_dataloader_workers": 0},
            model_config={"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1], "stochastic_depth_p": 0.3},
        )  # fmt: skip
        overlay = [str(configs_dir() / "pretrain.yaml")]
        run_bundle("train.yaml", overlay, {"experiment": config, "config": config}, handlers=handlers)
        return load_checkpoint(config.run_dir / "model_final.pth")["model"]

    with pytest.raises(SystemExit, match="143"):
        run("stopped", Terminate(2))
    assert (tmp_path / "stopped" / "model" / "model_interrupted.pth").is_file()
    found, expected = run("stopped", resume=True), run("whole")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_seeds_decide_places_and_hidden_blocks(tmp_path, folder):
    def samples(seed, epoch=0):
        config = PretrainingConfig(
            dataset_dir=str(folder), output_dir=str(tmp_path), device="cpu", tr_setup={"seed": seed},
            tr_config={"patch_size": [16, 16, 16], "max_steps_per_epoch": 4},
            model_config={"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1]},
        )  # fmt: skip
        dataset = training_objects(config).get_parsed_content("train#dataset")
        return [dataset[(epoch, index)] for index in range(4)]

    first, again, other, later = samples(0), samples(0), samples(1), samples(0, 1)
    for key in ("image", "hidden"):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again))
        assert not all(torch.equal(a[key], b[key]) for a, b in zip(first, other))
        assert not all(torch.equal(a[key], b[key]) for a, b in zip(first, later))
    assert all(sample["hidden"].sum() == 48 for sample in first)


def test_a_training_takes_the_encoder_and_warms_up_its_decoders_first(tmp_path, folder, pretrained, capsys):
    words = ["train", "-i", str(folder), "-o", str(tmp_path), "--patch-size", "16,16,16", "--max-epochs", "6",
             "--steps-per-epoch", "1", "--val-steps", "1", "--workers", "0", "--device", "cpu",
             "--set", "tr_config.final_val_steps=1", "--set", "tr_config.finetune_warmup=0.3"]  # fmt: skip
    path = pretrained / "pretrained_final.pth"
    assert main([*words, "--finetune", str(path)]) == 0
    encoder = encoder_of(path)
    for epoch, unchanged in ((1, True), (2, True), (3, False)):
        trained = encoder_of(tmp_path / "model" / f"model_{epoch}.pth")
        assert all(torch.equal(trained[name], value) for name, value in encoder.items()) == unchanged, epoch
    log = capsys.readouterr().err
    assert "the network follows it (features_per_stage, kernel_sizes, n_blocks_per_stage, strides)" in log
    assert "learning rate: tr_config.finetune_schedule sawtooth" in log
    assert "took the whole encoder, " in log
    settings = yaml.safe_load((tmp_path / "model" / "model_config.yaml").read_text())
    assert settings["tr_config"]["finetune_schedule"] == "sawtooth"
    # Resumed without the flag, the run keeps network and schedule.
    words[words.index("--max-epochs") + 1] = "7"
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "model" / "model_7.pth").is_file()
    words[words.index("--max-epochs") + 1] = "8"
    assert main([*words, "--resume", "--set", "tr_config.finetune_schedule=sawtooth"]) == 0
    assert (tmp_path / "model" / "model_8.pth").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--set", "model_config.features_per_stage=[4,12]"],
            "model_config.features_per_stage, expected [4, 8]",
        ),
        (["--set", "model_config.strides=[1,1]"], "model_config.strides, expected [[1, 1, 1], [2, 2, 2]]"),
        (["--set", "model_config.norm_op=group"], "model_config.norm_op, expected instance, found group"),
    ],
    ids=["widths", "strides", "norm"],
)
def test_settings_of_the_user_that_do_not_fit_are_refused(
    tmp_path, folder, pretrained, capsys, extra, message
):
    words = ["train", "-i", str(folder), "-o", str(tmp_path / "out"), "--patch-size", "16,16,16", "--max-epochs", "1",
             "--workers", "0", "--device", "cpu", "--finetune", str(pretrained / "pretrained_final.pth")]  # fmt: skip
    assert main([*words, *extra]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the pretrained encoder is another one: {message}" in line
    assert not (tmp_path / "out").exists()


def test_images_of_other_channels_are_refused(tmp_path, pretrained, capsys):
    colour = write_tiff_folder(
        tmp_path / "data", {"a": {"ball": ball((16, 16))}}, images={"a": noise((16, 16, 3))}
    )
    words = ["train", "-i", str(colour), "-o", str(tmp_path / "out"), "--max-epochs", "1", "--workers", "0",
             "--device", "cpu", "--finetune", str(pretrained / "pretrained_final.pth")]  # fmt: skip
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the pretrained encoder is another one: dimensions of the images, expected 3, found 2" in line


def test_a_pretrained_encoder_does_not_predict(tmp_path, folder, pretrained, capsys):
    words = [
        "predict",
        "-m",
        str(pretrained / "pretrained_final.pth"),
        "-i",
        str(folder),
        "-o",
        str(tmp_path / "p"),
    ]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "an encoder pretrained without labels predicts no target; start a training from it" in line


def test_colour_pictures(tmp_path):
    folder = images_folder(tmp_path / "data", a=noise((40, 24, 3)), b=noise((9, 50, 3), 1))
    assert main(["pretrain", "-i", str(folder), "-o", str(tmp_path / "out"), *SHORT2D]) == 0
    run = tmp_path / "out" / "pretrained"
    assert load_checkpoint(run / "pretrained_final.pth")["model_config"]["in_channels"] == 3
    with Image.open(run / "pretrained_debug.png") as picture:
        assert picture.size[0] > 4 * 200


def test_anisotropic_volumes_of_two_channels_thinner_than_the_patch(tmp_path):
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    zarr.save_array(images / "a.zarr", noise((2, 5, 40, 40)))
    words = ["pretrain", "-i", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--patch-size", "8,32,32",
             "--steps-per-epoch", "1", "--max-epochs", "1", "--workers", "0", "--device", "cpu",
             "--set", "dataset_config.axes=czyx", "--set", "dataset_config.spacing=[45,5,5]",
             "--set", "model_config.base_features=4", "--set", "model_config.n_stages=4"]  # fmt: skip
    assert main(words) == 0
    content = load_checkpoint(tmp_path / "out" / "pretrained" / "pretrained_final.pth")
    assert content["model_config"]["in_channels"] == 2
    assert content["model_config"]["strides"] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]]


@pytest.mark.parametrize(
    ("image", "extra", "message"),
    [
        (
            np.full((20, 20, 20), 7, np.uint8),
            [],
            "expected images with contrast, found the same value everywhere",
        ),
        (np.zeros((20, 20, 20), np.uint8), [], "expected images with contrast"),
        (noise((20, 20, 20)), ["--mask-ratio", "1.5"], "pretrain_mask_ratio: expected a number below 1"),
        (
            noise((20, 20, 20)),
            ["--set", "tr_config.pretrain_mask_block=[3,4,4]"],
            "expected multiples of [2, 2, 2]",
        ),
        (
            noise((20, 20, 20)),
            ["--patch-size", "2,2,4", "--set", "model_config.strides=[1,2]"],
            "a patch with at least 3 blocks of 2x2x2",
        ),
        (
            noise((20, 20, 20)),
            ["--set", "dataset_config.normalization_scheme=ct"],
            "ct takes its statistics from labelled objects, and pretraining reads no labels",
        ),
    ],
    ids=["constant", "empty", "ratio", "block", "patch", "ct without labels"],
)
def test_what_cannot_be_learned_from_is_refused_in_one_line(tmp_path, capsys, image, extra, message):
    folder = images_folder(tmp_path / "data", a=image)
    words = ["pretrain", "-i", str(folder), "-o", str(tmp_path / "out"), *SHORT, *extra]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert "may be a defect" not in line
    assert not (tmp_path / "out").exists()


def test_tiny_volumes_are_reflected_and_their_rim_does_not_count(tmp_path, caplog):
    folder = images_folder(tmp_path / "data", a=noise((3, 6, 7)), b=noise((2, 30, 30), 1))
    words = [*SHORT, "--set", "dataset_config.axes=zyx"]
    assert main(["pretrain", "-i", str(folder), "-o", str(tmp_path / "out"), *words]) == 0
    loss = (tmp_path / "out" / "pretrained" / "metrics.csv").read_text().splitlines()[1].split(",")[3]
    assert 0 < float(loss) < 10


def test_images_that_validate_are_left_out(tmp_path, folder):
    data = images_folder(tmp_path / "data", a=noise((20, 20, 20)), b=noise((20, 20, 20), 1))

    def regions(**dataset):
        config = PretrainingConfig(dataset_dir=str(data), device="cpu", dataset_config=dataset)
        assert not config.validates
        return set(config.split.train)

    assert regions() == {"a", "b"}
    assert regions(val_volumes=["b"]) == {"a"}
    assert regions(val_path=str(folder)) == {"a", "b"}


def test_a_time_budget_chooses_network_and_steps(tmp_path, monkeypatch, capsys):
    folder = images_folder(tmp_path / "data", a=noise((16, 20, 20)))
    config = PretrainingConfig(dataset_dir=str(folder), output_dir=str(tmp_path), device="cpu")
    smallest = smallest_candidate(config)
    cost = measure(config, smallest, enough=0.0)
    network = smallest.applied_to(config).new_network()
    assert cost.parameters == sum(weight.numel() for weight in network.parameters())
    # Measured times would depend on what else the machine does.
    monkeypatch.setattr(fit, "measure", lambda config, candidate, enough: Cost(5.0, 0.1, 1.0, 100_000))
    out = tmp_path / "out"
    words = [
        "pretrain",
        "-i",
        str(folder),
        "-o",
        str(out),
        "--time-budget",
        "30s",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    assert "<- chosen" in capsys.readouterr().err
    settings = yaml.safe_load((out / "pretrained" / "pretrained_config.yaml").read_text())
    assert settings["tr_config"]["time_budget_choice"].startswith("30s on cpu: ")
    assert settings["model_config"]["features_per_stage"][0] == 16


def test_monai_runs_the_same_from_its_own_command(tmp_path, folder, pretrained):
    configs = str([str(ROOT / "bundle" / "configs" / name) for name in ("train.yaml", "pretrain.yaml")])
    words = [
        "--config_file", configs, "--dataset_dir", str(folder), "--output_dir", str(tmp_path), "--device_name", "cpu",
        "--tr_setup#model_name", "pretrained", "--tr_config#patch_size", "[16,16,16]", "--tr_config#max_epoch", "2",
        "--tr_config#max_steps_per_epoch", "2", "--tr_config#num_dataloader_workers", "0",
        "--model_config#features_per_stage", "[4,8]", "--model_config#n_blocks_per_stage", "[1,1]",
    ]  # fmt: skip
    command = [sys.executable, "-m", "monai.bundle", "run", "training", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bundle")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found, expected = (
        encoder_of(run / "pretrained_final.pth") for run in (tmp_path / "pretrained", pretrained)
    )
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_two_processes_pretrain_together(tmp_path, folder):
    words = ["pretrain", "-i", str(folder), "-o", str(tmp_path), *SHORT, "--nproc", "2"]
    assert main(words) == 0
    assert (tmp_path / "pretrained" / "pretrained_final.pth").is_file()


def test_other_voxels_and_normalisation_are_warned_of(tmp_path, folder, pretrained, capsys):
    words = ["train", "-i", str(folder), "-o", str(tmp_path), "--patch-size", "16,16,16", "--max-epochs", "1",
             "--steps-per-epoch", "1", "--val-steps", "1", "--workers", "0", "--device", "cpu",
             "--set", "tr_config.final_val_steps=1", "--finetune", str(pretrained / "pretrained_final.pth"),
             "--set", "dataset_config.normalization_scheme=zscore"]  # fmt: skip
    assert main(words) == 0
    log = capsys.readouterr().err
    assert (
        "was pretrained with dataset_config.normalization_scheme unit, and this training uses zscore" in log
    )
    assert "no warm-up, as 1 epochs are too few" in log
