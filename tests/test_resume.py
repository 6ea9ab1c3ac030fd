"""A run that was stopped and resumed equals the uninterrupted run."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext

import pytest
import torch
from ignite.engine import Engine, Events
from training_toys import ToyLoss, ToyNetwork, make_trainer, same_weights, weights

from volumen.checkpoints.comparison import changed_data
from volumen.checkpoints.file import load_checkpoint, save_checkpoint
from volumen.handlers.early_stopping import EarlyStopping
from volumen.handlers.metric import KeyMetric
from volumen.handlers.records.resumable import check_resumable, newest_checkpoint
from volumen.handlers.records.run_directory import RunDirectory
from volumen.losses.multitask import MultiTaskLoss
from volumen.utils.errors import VolumenError


class Stop(Exception):
    """An exception that stands for a crash."""


def crash_at(trainer, iteration: int) -> None:
    """Raise in the middle of a run, after this iteration."""

    def crash(engine) -> None:
        if engine.state.iteration == iteration:
            raise Stop

    trainer.add_event_handler(Events.ITERATION_COMPLETED, crash)


def run_with_crashes(out, crashes, **options):
    """Run, crash at each of the iterations, resume; return the last trainer."""
    for count, iteration in enumerate(crashes):
        trainer = make_trainer(out, resume=True if count else None, **options)
        crash_at(trainer, iteration)
        with pytest.raises(Stop):
            trainer.run()
    trainer = make_trainer(out, resume=True, **options)
    trainer.run()
    return trainer


def files(out):
    """Return the names in the run's folder, without TensorBoard's."""
    return sorted(path.name for path in (out / "toy").iterdir())


def checkpoint_equal(one, other) -> bool:
    """Return whether two nested structures are bitwise equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(checkpoint_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(checkpoint_equal, one, other))
    return one == other


@pytest.mark.parametrize(
    ("options", "crashes"),
    [
        ({}, [5]),
        ({}, [6, 9, 11]),  # several crashes
        ({"workers": 1}, [5]),
        ({"accumulation": 3}, [7]),  # a partial group at each epoch's end
        ({"scheduler": "onecycle", "optimizer": "SGD"}, [9]),
        ({"ema": 0.9}, [5]),
        ({"amp": "bfloat16"}, [6]),
        ({"keep": 1}, [10]),
        ({"best": 2}, [9]),
    ],
)
def test_resumed_run_equals_uninterrupted(tmp_path, options, crashes):
    whole = make_trainer(tmp_path / "whole", **options)
    whole.run()
    resumed = run_with_crashes(tmp_path / "resumed", crashes, **options)

    assert same_weights(weights(whole), weights(resumed))
    assert files(tmp_path / "whole") == files(tmp_path / "resumed")
    for name in files(tmp_path / "whole"):
        one, other = tmp_path / "whole" / "toy" / name, tmp_path / "resumed" / "toy" / name
        if name.endswith(".pth"):
            assert checkpoint_equal(load_checkpoint(one), load_checkpoint(other)), name
        else:
            assert one.read_bytes() == other.read_bytes(), name


def test_worker_count_may_change_on_resuming(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    first = make_trainer(tmp_path / "resumed", workers=1)
    crash_at(first, 5)
    with pytest.raises(Stop):
        first.run()
    second = make_trainer(tmp_path / "resumed", workers=2, resume=True)
    second.run()
    assert same_weights(weights(whole), weights(second))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    make_trainer(tmp_path).run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    trainer = make_trainer(tmp_path, resume=True)
    trainer.run()
    assert trainer.state.epoch == 3
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}


def test_more_epochs_on_resuming_follow_the_new_schedule(tmp_path):
    make_trainer(tmp_path, epochs=2).run()
    rates = []
    trainer = make_trainer(tmp_path, epochs=6, resume=True)
    trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda engine: rates.append(engine.optimizer.param_groups[0]["lr"])
    )
    trainer.run()
    fresh = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(fresh, T_max=6)
    expected = []
    for _ in range(6):
        expected.append(fresh.param_groups[0]["lr"])
        fresh.step()
        reference.step()
    assert rates == pytest.approx(expected[2:])


def test_the_optimizers_options_come_from_the_configuration(tmp_path):
    make_trainer(tmp_path, epochs=1).run()
    trainer = make_trainer(tmp_path, epochs=2, resume=True)
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.5
    trainer.run()
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_changed_settings_are_logged(tmp_path, caplog):
    make_trainer(tmp_path, epochs=1).run()
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, epochs=2, resume=True).run()
    assert "changed since the checkpoint: tr_config.max_epoch: 1, now 2" in caplog.text


def test_damaged_newest_is_skipped_for_the_one_before(tmp_path, caplog):
    whole = make_trainer(tmp_path)
    whole.run()
    newest = tmp_path / "toy" / "toy_3.pth"
    newest.unlink()  # `best` may be the same file
    newest.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        resumed = make_trainer(tmp_path, resume=True)
        resumed.run()
    assert "toy_3.pth" in caplog.text
    assert "skipped" in caplog.text
    assert same_weights(weights(whole), weights(resumed))


def test_all_damaged_is_an_error(tmp_path):
    make_trainer(tmp_path, epochs=1).run()
    (tmp_path / "toy" / "toy_1.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(VolumenError, match=r"every checkpoint is damaged \(toy_1.pth\)"):
        make_trainer(tmp_path, resume=True).run()


def test_resuming_from_an_older_file_sets_newer_ones_aside(tmp_path):
    whole = make_trainer(tmp_path)
    whole.run()
    resumed = make_trainer(tmp_path, resume=str(tmp_path / "toy" / "toy_1.pth"))
    crash_at(resumed, 6)
    with pytest.raises(Stop):
        resumed.run()
    assert (tmp_path / "toy" / "toy_3.pth.old").is_file()
    again = make_trainer(tmp_path, resume=True)
    again.run()
    assert same_weights(weights(whole), weights(again))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 5}, r"another architecture: model_config.features, expected 4, found 5; .*--finetune"),
        (
            {"digests": {"scroll/image": "data-2"}},
            r"other data: scroll/image of other content; give the same",
        ),
        (
            {"digests": {"roll/image": "data-1"}},
            r"other data: scroll/image missing; roll/image new; .*--finetune",
        ),
        ({"optimizer": "SGD"}, r"saved with another optimizer"),
    ],
)
def test_a_mismatch_is_refused_before_anything_runs(tmp_path, options, message):
    make_trainer(tmp_path, epochs=1).run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    trainer = make_trainer(tmp_path, epochs=2, resume=True, **options)
    with pytest.raises(VolumenError, match=message):
        trainer.run()
    assert trainer.state.iteration == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}


@pytest.mark.parametrize(
    ("features", "digest", "message"),
    [(5, "data-1", "another architecture"), (4, "data-2", "other data"), (4, "data-1", None)],
)
@pytest.mark.parametrize("resume", ["latest", "file"])
def test_a_mismatch_is_refused_before_the_data_are_searched(tmp_path, features, digest, message, resume):
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.run()
    directory = trainer.toy_directory
    given = resume if resume == "latest" else directory.file("1.pth")
    with torch.device("meta"):
        network = ToyNetwork(features)
    with pytest.raises(VolumenError, match=message) if message else nullcontext():
        check_resumable(directory, given, network, {"scroll/image": digest})


def test_many_changed_volumes_are_counted():
    old = {f"scroll{n}/image": "a" for n in range(6)}
    assert changed_data(old, dict.fromkeys(old, "b")) == (
        "scroll0/image, scroll1/image, scroll2/image and 3 more of other content"
    )
    assert changed_data(old, old) == changed_data(old, {}) == changed_data({}, old) == ""


def test_a_missing_file_is_refused_before_the_data_are_searched(tmp_path):
    with pytest.raises(VolumenError, match=r"absent\.pth: there is no such checkpoint"):
        check_resumable(RunDirectory(tmp_path, "toy"), tmp_path / "absent.pth", ToyNetwork(), {})


def test_an_unreadable_checkpoint_is_left_to_the_run(tmp_path):
    directory = RunDirectory(tmp_path, "toy")
    check_resumable(directory, "latest", ToyNetwork(), {})
    directory.path.mkdir()
    directory.file("1.pth").write_bytes(b"damaged")
    check_resumable(directory, "latest", ToyNetwork(), {})


def test_the_newest_checkpoint_is_found_by_its_epoch_not_by_the_clock(tmp_path):
    """A clock that was set back makes the newest file look like the oldest."""
    whole = make_trainer(tmp_path)
    whole.run()
    for epoch, hours in ((1, 0), (2, -5), (3, -9)):
        path = tmp_path / "toy" / f"toy_{epoch}.pth"
        moment = path.stat().st_mtime + 3600 * hours
        os.utime(path, (moment, moment))
    assert newest_checkpoint(whole.toy_directory).name == "toy_3.pth"
    resumed = make_trainer(tmp_path, resume=True)
    resumed.run()
    assert resumed.state.iteration == whole.state.iteration
    assert same_weights(weights(whole), weights(resumed))


def balanced_loss(balancing):
    """Return the multi-task loss with a state of its own."""
    targets = {
        "ink": {"kind": "binary", "losses": [{"name": "BCEWithLogitsLoss"}, {"name": "SoftDiceLoss"}]},
        "depth": {"kind": "field", "losses": [{"name": "MaskedMSELoss"}]},
    }
    return MultiTaskLoss(targets, balancing=balancing)


@pytest.mark.parametrize("balancing", ["uncertainty", "gradnorm"])
def test_what_a_balancing_has_learned_is_restored(tmp_path, balancing):
    def trainer(out, resume=None):
        loss = balanced_loss(balancing)
        made = make_trainer(tmp_path / out, loss=loss, resume=resume)
        if balancing == "gradnorm":
            loss.set_shared_parameters(list(made.network.body.parameters()))
        return made

    whole = trainer("whole")
    whole.run()
    first = trainer("resumed")
    crash_at(first, 6)
    with pytest.raises(Stop):
        first.run()
    resumed = trainer("resumed", resume=True)
    resumed.run()
    learned = whole.loss_function.state_dict()
    assert any(bool((value != 0).any()) for value in learned.values())
    assert checkpoint_equal(dict(learned), dict(resumed.loss_function.state_dict()))
    assert same_weights(weights(whole), weights(resumed))


def test_the_count_of_early_stopping_goes_on(tmp_path):
    """Epochs 1 to 4 with a loss that gets worse from epoch 2 on: patience 2 ends after epoch 3, resumed or not."""

    class Worsening(ToyLoss):
        def forward(self, outputs, batch):
            return outputs["ink"].sum() * 0 + 1 + self.epoch

    def trainer(out, **options):
        return make_trainer(tmp_path / out, epochs=9, patience=2, loss=Worsening(), **options)

    whole = trainer("whole")
    whole.run()
    assert whole.state.epoch == 3
    first = trainer("resumed")
    crash_at(first, 10)  # in the third epoch, after one validation without improvement
    with pytest.raises(Stop):
        first.run()
    saved = load_checkpoint(tmp_path / "resumed" / "toy" / "toy_2.pth")["handlers"]["early_stopping"]
    assert saved == {"best": 1.0, "waited": 1, "metric": None}
    resumed = trainer("resumed", resume=True)
    resumed.run()
    assert resumed.state.epoch == 3


def test_the_best_epoch_by_another_metric_is_not_compared_with_the_one_before(tmp_path, caplog):
    """A Dice of 0.9 is no better than a distance of 5 voxels, although it is a smaller number."""

    def trainer(metric, epochs, **options):
        made = make_trainer(tmp_path, epochs=epochs, key_metric=KeyMetric(metric), **options)

        def measure(engine):
            engine.state.metrics.update({"val/ink/dice": 0.9, "val/ink/hd95": 9.0 - engine.state.epoch})

        made.add_event_handler(Events.EPOCH_COMPLETED, measure)
        return made

    trainer("val/ink/dice", 2).run()
    trainer("val/ink/hd95", 4, resume=True).run()
    best = load_checkpoint(tmp_path / "toy" / "toy_best.pth")
    assert (best["epoch"], best["best_metric"]) == (4, 5.0)
    assert "chosen by val/ink/dice, this run chooses by val/ink/hd95" in caplog.text
    # The same metric goes on.
    caplog.clear()
    trainer("val/ink/hd95", 5, resume=True).run()
    assert load_checkpoint(tmp_path / "toy" / "toy_5.pth")["ranking"][0] == [4.0, 5]
    assert "chosen by" not in caplog.text


def test_the_count_of_early_stopping_by_another_metric_is_dropped():
    state = EarlyStopping(KeyMetric("val/ink/dice"), patience=2).state_dict() | {"best": 0.9, "waited": 2}
    for name, best in (("val/ink/dice", 0.9), ("val/ink/hd95", None)):
        other = EarlyStopping(KeyMetric(name), patience=2)
        other.load_state_dict(state)
        assert (other.best, other.waited) == (best, 0 if best is None else 2)


def test_a_finished_run_is_reported(tmp_path, caplog):
    make_trainer(tmp_path).run()
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, resume=True).run()
    assert "all 3 epochs are done; train on with a larger max_epoch" in caplog.text


def test_another_loss_balancing_is_refused(tmp_path):
    learned = ToyLoss()
    learned.register_buffer("log_factors", torch.zeros(2))
    make_trainer(tmp_path, epochs=1, loss=learned).run()
    with pytest.raises(VolumenError, match=r"toy_1.pth: was saved with another loss balancing; .*--finetune"):
        make_trainer(tmp_path, epochs=2, resume=True).run()


def test_a_run_that_cannot_continue_is_refused(tmp_path):
    make_trainer(tmp_path, epochs=1).run()
    path = tmp_path / "toy" / "toy_1.pth"
    whole = load_checkpoint(path)
    longer = {**whole, "epoch_length": whole["epoch_length"] + 1, "sampler": {**whole["sampler"], "batch": 2}}
    save_checkpoint(longer, path)
    with pytest.raises(
        VolumenError, match=r"was saved in the middle of an epoch, expected 5 steps .*, found 4"
    ):
        make_trainer(tmp_path, epochs=2, resume=True).run()
    other = {**whole["model"], "ink.weight": torch.zeros(2, 4, 1, 1)}
    save_checkpoint({**whole, "model": other}, path)
    with pytest.raises(VolumenError, match=r"is of another architecture: weight ink\.weight"):
        make_trainer(tmp_path, epochs=2, resume=True).run()


def test_another_torch_version_is_logged(tmp_path, caplog):
    make_trainer(tmp_path, epochs=1).run()
    path = tmp_path / "toy" / "toy_1.pth"
    content = load_checkpoint(path)
    content["versions"]["torch"] = "1.0"
    save_checkpoint(content, path)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, epochs=2, resume=True).run()
    assert "was saved by torch 1.0" in caplog.text


def test_early_stopping_waits_from_the_best_value_whichever_way_is_better():
    def epochs(values, **metric):
        trainer = Engine(lambda engine, batch: None)
        remaining = iter(values)

        @trainer.on(Events.EPOCH_COMPLETED)
        def measure(engine):
            value = next(remaining)
            engine.state.metrics = {} if value is None else {"val/x": value}

        EarlyStopping(KeyMetric("val/x", **metric), patience=2).attach(trainer)
        return trainer.run([0], max_epochs=len(values)).epoch

    # An equal value is not better, a better value restarts the count, an epoch without validation does not count.
    values = [0.5, 0.6, 0.6, 0.7, None, 0.65, None, 0.7, 0.9]
    assert epochs(values, mode="max") == 8
    assert epochs([-value if value else value for value in values], mode="min") == 8
    assert epochs(values, mode="min") == 3


def test_early_stopping_ends_and_stays_ended(tmp_path):
    class Constant(torch.nn.Module):
        """A loss that cannot improve."""

        components: dict = {}  # noqa: RUF012

        def set_epoch(self, epoch):
            pass

        def forward(self, outputs, batch):
            return outputs["ink"].sum() * 0 + 1

    def trainer(**options):
        made = make_trainer(tmp_path, epochs=9, patience=2, loss=Constant(), **options)
        made.run()
        return made

    assert trainer().state.epoch == 3
    assert trainer(resume=True).state.epoch == 3
