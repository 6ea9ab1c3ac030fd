"""The files and lines that a run writes, and the handlers that write them."""

from __future__ import annotations

import csv
import io
import logging
import math
import re

import pytest
import torch
import yaml
from ignite.engine import Events
from torch.utils.data import DataLoader
from toy_process import SlowData
from training_toys import ToyData, ToyNetwork, make_trainer, same_weights, weights

from volumen.checkpoints.file import load_checkpoint
from volumen.checkpoints.finetune import Finetune, inference_weights, load_weights, report_lines
from volumen.checkpoints.weights import LoadReport
from volumen.handlers.epochs import remaining_batches
from volumen.handlers.metric import KeyMetric
from volumen.handlers.records.logs import Progress, Smoothed, TensorBoardLog, span
from volumen.handlers.state import register_state
from volumen.utils.errors import VolumenError


def read_metrics(out):
    """Return the rows of `metrics.csv`."""
    with (out / "toy" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file_has_every_loss_and_is_an_average(tmp_path):
    trainer = make_trainer(tmp_path, epochs=2)
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output["losses"]["ink/BCE"])
    )
    trainer.run()
    rows = read_metrics(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["iteration"] for row in rows] == ["4", "8"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.01, 0.005])
    for name in ("loss", "loss/ink", "loss/depth", "gradient_norm", "val/loss", "val/loss/ink/BCE"):
        assert all(float(row[name]) > 0 for row in rows)
    assert float(rows[1]["loss/ink/BCE"]) == pytest.approx(sum(seen[4:]) / 4)


def test_validation_every_other_epoch_and_the_last(tmp_path):
    make_trainer(tmp_path, epochs=5, val_every=2).run()
    assert [bool(row["val/loss"]) for row in read_metrics(tmp_path)] == [False, True, False, True, True]


def test_tensorboard_has_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, epochs=2)
    TensorBoardLog(trainer.toy_directory, trainer.optimizer, every=2).attach(trainer)
    trainer.run()
    events = EventAccumulator(str(tmp_path / "toy" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    row = read_metrics(tmp_path)[0]
    assert set(row) - {"epoch", "iteration"} <= tags
    assert {"patches_per_second", "iteration/loss", "iteration/ink", "iteration/gradient_norm"} <= tags
    assert [event.step for event in events.Scalars("iteration/loss")] == [2, 4, 6, 8]
    assert events.Scalars("val/loss")[0].value == pytest.approx(float(row["val/loss"]))


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("bar", [True, False])
def test_progress_shows_bars_on_a_terminal_only_and_two_lines_per_epoch(tmp_path, caplog, bar):
    stream = Terminal() if bar else io.StringIO()
    trainer = make_trainer(tmp_path, epochs=2, data=SlowData(8, 0.05), scores=True, validation_delay=0.12)
    evaluator = trainer.toy_evaluator
    Progress(
        trainer.optimizer, validator=evaluator, running=lambda: {"mean_dice": 0.25}, stream=stream
    ).attach(trainer)
    with caplog.at_level(logging.INFO, logger="volumen.handlers.records.logs"):
        trainer.run()
    lines = [
        record.getMessage() for record in caplog.records if record.name == "volumen.handlers.records.logs"
    ]
    assert [line.split()[0] for line in lines] == ["epoch", "validation:"] * 2
    assert lines[0].startswith("epoch 1/2: loss ")
    assert "learning rate 0.01" in lines[0]
    assert "patches/s" in lines[0]
    assert lines[0].endswith(" s left")
    assert "left" not in lines[2]
    assert "BCE" not in lines[0]
    shown = stream.getvalue()
    if not bar:
        assert shown == ""
        return
    # What one sees: how far, how fast, how long still, the loss; then the validation; then its Dice beside the loss.
    assert re.search(r"epoch 1/2: +\d+%.* \d/4 \[\d\d:\d\d left, loss 0\.\d{4}, .* patches/s\]", shown)
    assert re.search(r"epoch 1/2, validation: +\d+%.* \d/4 \[.*left, loss \d\.\d{4}, Dice 0\.250", shown)
    dice = evaluator.state.metrics["mean_dice"]
    assert 0 < dice < 1
    assert re.search(r"epoch 2/2: .*loss \d\.\d{4}, Dice 0\.\d{3}[,\]]", shown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4, "4 s"),
        (59.9, "60 s"),
        (600, "10 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations_are_formatted_for_people(seconds, text):
    assert span(seconds) == text


def test_a_smoothed_value_is_the_mean_at_first_and_leaves_out_nan():
    smooth, mean = Smoothed(share=0.5), Smoothed(share=None)
    for value in (2.0, math.nan, 4.0, 9.0):
        smooth.add(value)
        mean.add(value)
    assert smooth.value == pytest.approx(6.0)
    assert mean.value == pytest.approx(5.0)


def test_snapshot_is_the_configuration(tmp_path):
    make_trainer(tmp_path, epochs=1).run()
    text = (tmp_path / "toy" / "toy_config.yaml").read_text()
    assert yaml.safe_load(text) == {"tr_config": {"max_epoch": 1}}


def test_samplers_and_losses_are_notified_of_the_epoch_from_0(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: seen.append((engine.loss_function.epoch, engine.state.batch["start"].tolist())),
    )
    trainer.run()
    assert seen[0] == (0, [[0, 0], [0, 1]])
    assert seen[-1] == (1, [[1, 6], [1, 7]])


@pytest.mark.parametrize("workers", [0, 1])
def test_remaining_batches_are_the_epochs_last(workers):
    loader = DataLoader(ToyData(7), batch_size=2, num_workers=workers)
    whole = [batch["start"].tolist() for batch in loader]
    rest = remaining_batches(loader, 3)
    assert [batch["start"].tolist() for batch in rest] == whole[3:]
    assert len(list(rest)) == 1


@pytest.mark.parametrize(
    ("name", "mode", "smaller"),
    [
        ("val/loss", "auto", True),
        ("val/membrane/dice", "auto", False),
        ("val/normals/angular_error", "auto", True),
        ("val/membrane/hd95", "auto", True),
        ("val/surface_dice", "auto", False),
        ("val/dice", "min", True),
    ],
)
def test_key_metric_knows_which_way_is_better(name, mode, smaller):
    metric = KeyMetric(name, mode)
    assert metric.smaller_is_better(None) == smaller
    assert metric.better(1.0, 2.0, None) == smaller


def test_key_metric_without_a_value(tmp_path):
    trainer = make_trainer(tmp_path)
    assert KeyMetric("val/dice").value(trainer) is None
    trainer.state.metrics["val/dice"] = torch.tensor(float("nan"))
    assert KeyMetric("val/dice").value(trainer) is None
    with pytest.raises(VolumenError, match="key_metric_mode"):
        KeyMetric("val/dice", "largest")


def test_a_key_metric_that_is_never_measured_is_refused(tmp_path):
    with pytest.raises(VolumenError, match=r"tr_config\.key_metric: .*one of .*val/loss.*found 'val/dise'"):
        make_trainer(tmp_path, key_metric=KeyMetric("val/dise")).run()


def test_weight_average_validates_and_is_saved(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    averaged = make_trainer(tmp_path / "averaged", ema=0.9)
    plain.run()
    averaged.run()
    assert same_weights(weights(plain), weights(averaged))
    content = load_checkpoint(tmp_path / "averaged" / "toy" / "toy_3.pth")
    average = inference_weights(content)
    assert not same_weights(average, content["model"])
    assert same_weights(
        inference_weights(load_checkpoint(tmp_path / "plain" / "toy" / "toy_3.pth")), weights(plain)
    )
    assert averaged.state.metrics["val/loss"] != plain.state.metrics["val/loss"]


def test_weight_average_is_the_recursion(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, ema=0.3)
    history = []

    def remember(engine):
        history.append(engine.network.ink.bias.item())

    trainer.add_event_handler(Events.STARTED, remember)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    trainer.run()
    average = history[0]
    for step, value in enumerate(history[1:], 1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    saved = inference_weights(load_checkpoint(tmp_path / "toy" / "toy_1.pth"))
    assert saved["ink.bias"].item() == pytest.approx(average)


def test_finetune_loads_matching_weights_and_reports_the_others(tmp_path, caplog):
    source = make_trainer(tmp_path / "a", epochs=1)
    source.run()
    path = tmp_path / "a" / "toy" / "toy_1.pth"
    network = ToyNetwork()
    network.depth = torch.nn.Conv2d(4, 2, 1)
    network.new = torch.nn.Conv2d(4, 1, 1)
    report = load_weights(network, path)
    assert torch.equal(network.body.weight, source.network.body.weight)
    assert {name for name, *_ in report.mismatched} == {"depth.weight", "depth.bias"}
    assert set(report.missing) == {"new.weight", "new.bias"}

    target = make_trainer(tmp_path / "b", epochs=1)
    finetune = Finetune(target.network, path)
    target.add_event_handler(Events.STARTED, finetune)
    first = []
    target.add_event_handler(Events.STARTED, lambda engine: first.append(weights(engine)))
    with caplog.at_level(logging.INFO):
        target.run()
    assert same_weights(first[0], weights(source))
    assert "loaded 8 of the network's 8 weights: body.weight 1, body.bias 1" in caplog.text


def test_finetune_names_all_that_was_not_loaded():
    report = LoadReport(
        loaded=("encoder.stem.weight", "encoder.stem.bias", "encoder.stages.0.weight"),
        missing=("heads.ink.weight",),
        unexpected=("heads.old.weight", "heads.old.bias"),
        mismatched=(("heads.depth.weight", (2, 4), (1, 4)),),
    )
    assert report_lines(report) == [
        "loaded 3 of the network's 5 weights: encoder.stem 2, encoder.stages 1",
        "of another shape, not loaded: heads.depth.weight (1, 4) for (2, 4)",
        "not in the file, left as initialised: heads.ink.weight",
        "in the file alone: heads.old.weight, heads.old.bias",
    ]


def test_finetune_refuses_useless_files(tmp_path):
    with pytest.raises(VolumenError, match="no such file"):
        Finetune(ToyNetwork(), tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(VolumenError, match=r"damaged or of another kind"):
        load_weights(ToyNetwork(), tmp_path / "text.pth")
    torch.save({"model": {"other": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(VolumenError, match="no weight of this file fits"):
        load_weights(ToyNetwork(), tmp_path / "other.pth")


def test_two_states_of_one_name_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="'losses'"):
        register_state(trainer, "losses", KeyMetric())
