"""The documented examples of handlers do what their page says."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from data_folders import shells, write_tiff_folder
from monai.bundle import ConfigParser
from training_toys import make_trainer

from volumen.cli.main import main
from volumen.utils.bundle_root import configs_dir

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def service():
    """A local service that keeps what is posted to it."""
    received: list[dict] = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Keep)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/training", received
    server.shutdown()
    server.server_close()


def test_the_webhook_tells_of_every_epoch(tmp_path, service):
    from webhook import Webhook

    url, received = service
    make_trainer(tmp_path, epochs=2, extra_handlers=[Webhook(url)]).run()
    assert [message["epoch"] for message in received] == [1, 2]
    assert received[0]["metrics"]["loss"] > 0
    assert received[1]["text"].startswith("epoch 2: ")


def test_the_webhook_sends_the_metrics_asked_for(tmp_path, service):
    from webhook import Webhook

    url, received = service
    make_trainer(tmp_path, epochs=1, extra_handlers=[Webhook(url, names=["loss", "val/loss"])]).run()
    assert set(received[0]["metrics"]) == {"loss", "val/loss"}


def test_a_silent_service_does_not_end_training(tmp_path, caplog):
    from webhook import Webhook

    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, epochs=1, extra_handlers=[Webhook("http://127.0.0.1:1/", timeout=0.5)]
        )
        trainer.run()
    assert trainer.state.epoch == 1
    assert "not told of the epoch" in caplog.text


def test_samples_hold_what_was_trained_on(tmp_path):
    from sample_saver import SampleSaver

    make_trainer(
        tmp_path, epochs=3, extra_handlers=[SampleSaver(tmp_path / "samples", every=2, most=4)]
    ).run()
    files = sorted((tmp_path / "samples").iterdir())
    # 12 steps, every second one, the newest four.
    assert [path.name for path in files] == [f"sample_{n:08d}.npz" for n in (6, 8, 10, 12)]
    sample = np.load(files[-1])
    assert sample["image"].shape == (1, 8, 8)
    assert (sample["true/ink"] == (sample["image"] > 0.5)).all()
    assert sample["pred/depth"].shape == sample["true/depth"].shape
    assert sample["start"].tolist()[0] == 2
    assert str(sample["volume_name"]).startswith("scroll")


def test_bfloat16_outputs_are_saved():
    from sample_saver import _array

    assert _array(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32


def test_the_learning_rate_finder_covers_its_range_and_ends_training(tmp_path):
    from lr_finder import LearningRateFinder

    trainer = make_trainer(tmp_path, epochs=5, length=40)
    finder = LearningRateFinder(trainer.optimizer, tmp_path / "rates.csv", 1e-4, 1e-2, steps=10, explode=100)
    finder.attach(trainer)
    trainer.run()
    assert trainer.state.iteration == 10
    rows = list(csv.reader((tmp_path / "rates.csv").open()))
    rates = [float(rate) for rate, _ in rows[1:]]
    assert rates == pytest.approx(np.geomspace(1e-4, 1e-2, 10))
    assert finder.suggestion is None or 1e-4 <= finder.suggestion <= 1e-2


def test_the_learning_rate_finder_stops_where_the_loss_explodes(tmp_path):
    from lr_finder import LearningRateFinder

    trainer = make_trainer(tmp_path, epochs=1, length=200, optimizer="SGD", clip=None)
    finder = LearningRateFinder(trainer.optimizer, tmp_path / "rates.csv", 1e-3, 1e4, steps=100)
    finder.attach(trainer)
    trainer.run()
    assert 2 < trainer.state.iteration < 100


def test_the_learning_rate_finder_names_the_steepest_fall():
    from lr_finder import LearningRateFinder

    finder = LearningRateFinder(torch.optim.SGD([torch.zeros(1)], lr=0.1), Path("unused.csv"))
    finder.rows = [(1e-3, 5.0), (1e-2, 4.5), (1e-1, 2.0), (1.0, 3.0)]
    assert finder.suggestion == 1e-2


@pytest.mark.parametrize("name", ["hooks.yaml", "lr_finder.yaml"])
def test_an_overlay_appends_to_the_handlers(name):
    own, joined = ConfigParser(), ConfigParser()
    own.read_config(str(configs_dir() / "train.yaml"))
    joined.read_config([str(configs_dir() / "train.yaml"), str(EXAMPLES / name)])
    before, after = own["train#handlers"], joined["train#handlers"]
    added = yaml.safe_load((EXAMPLES / name).read_text())["+train#handlers"]
    assert after[: len(before)] == before
    assert after[len(before) :] == added


def test_two_overlays_are_both_appended(tmp_path):
    joined = ConfigParser()
    joined.read_config(
        [str(configs_dir() / "train.yaml"), *(str(EXAMPLES / n) for n in ("hooks.yaml", "lr_finder.yaml"))]
    )
    classes = [entry["_target_"] for entry in joined["train#handlers"][-3:]]
    assert classes == ["webhook.Webhook", "sample_saver.SampleSaver", "lr_finder.LearningRateFinder"]


SMALL = [
    *(
        "--patch-size",
        "16,16,16",
        "--max-epochs",
        "1",
        "--steps-per-epoch",
        "4",
        "--val-steps",
        "1",
        "--workers",
        "0",
    ),
    *("--amp", "off", "--device", "cpu", "--set", "model_config.features_per_stage=[4, 8]"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hooks") / "data"
    return write_tiff_folder(folder, {"scroll": {"surface": shells((24, 24, 64))}})


def hooks_for(url: str, folder: Path) -> Path:
    """The documented overlay, with the service that listens here; saves every second step."""
    text = (EXAMPLES / "hooks.yaml").read_text()
    text = text.replace("http://127.0.0.1:8080/training", url).replace("every: 50", "every: 2")
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def check_hooks_ran(run: Path, received: list[dict]) -> None:
    assert [message["epoch"] for message in received] == [1]
    assert received[0]["metrics"]["loss"] > 0
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        "sample_00000002.npz",
        "sample_00000004.npz",
    ]
    assert (run / "model_1.pth").is_file()


def test_the_overlay_runs_from_the_users_own_folder(data, tmp_path, monkeypatch, service):
    url, received = service
    hooks_for(url, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-i", str(data), "-o", "out", *SMALL, "--config-file", "mine.yaml"]) == 0
    check_hooks_ran(tmp_path / "out" / "model", received)


def test_the_learning_rate_finder_runs_as_documented(data, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    overlay = str(EXAMPLES / "lr_finder.yaml")
    command = [
        "train",
        "-i",
        str(data),
        "-o",
        "out",
        "--model-name",
        "lr_finder",
        *SMALL,
        "--config-file",
        overlay,
    ]
    assert main(command) == 0
    rows = list(csv.reader((tmp_path / "out" / "lr_finder" / "learning_rates.csv").open()))
    assert len(rows) == 1 + 4
    assert float(rows[1][0]) < float(rows[-1][0])


def test_an_overlay_has_validation_measure_more(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("validate#scores#names: [dice, iou, surface_dice, hd95, cldice]\n")
    assert main(["train", "-i", str(data), "-o", "out", *SMALL, "--config-file", "mine.yaml"]) == 0
    with Path("out/model/metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert all(
        float(row[f"val/surface/{name}"]) >= 0 for name in ("dice", "iou", "surface_dice", "hd95", "cldice")
    )


@pytest.mark.slow
def test_monais_runner_takes_the_overlay_too(data, tmp_path, service):
    url, received = service
    mine = hooks_for(url, tmp_path)
    words = [
        *("--dataset_dir", str(data), "--output_dir", "out", "--device_name", "cpu"),
        *("--tr_config#patch_size", "[16,16,16]", "--model_config#features_per_stage", "[4,8]"),
        *("--tr_config#max_epoch", "1", "--tr_config#max_steps_per_epoch", "4", "--tr_config#amp", "off"),
        *("--tr_config#max_val_steps_per_epoch", "1", "--tr_config#num_dataloader_workers", "0"),
    ]
    files = str([str(configs_dir() / "train.yaml"), str(mine)])
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", files, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'bundle'}:{EXAMPLES}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_hooks_ran(tmp_path / "out" / "model", received)


@pytest.mark.parametrize("handlers", ["webhook.Webhok", "nowhere.Webhook"])
def test_a_handler_that_is_not_there_is_told_in_one_line(data, tmp_path, monkeypatch, capsys, handlers):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"+train#handlers:\n  - _target_: {handlers}\n    url: http://127.0.0.1/\n")
    code = main(["train", "-i", str(data), "-o", "out", *SMALL, "--config-file", "mine.yaml"])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert told == (
        f"volumen: error: mine.yaml: {handlers}: there is no such object; "
        "correct the name, install its package, or put its folder on PYTHONPATH"
    )
    assert not Path("out").exists()
