"""A trainer runs again: in a notebook, after an interruption, with more epochs."""

from __future__ import annotations

import csv
import os
import signal

import pytest
import torch
from ignite.engine import Events
from training_toys import make_trainer, same_weights, weights

from volumen.checkpoints.finetune import Finetune


def rows(trainer) -> list[dict[str, str]]:
    with (trainer.toy_directory.path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def names(trainer) -> set[str]:
    return {path.name for path in trainer.toy_directory.path.glob("*.pth")}


def test_running_a_finished_trainer_again_trains_as_many_epochs_more(tmp_path):
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.run()
    first = torch.load(tmp_path / "toy" / "toy_2.pth", weights_only=True)
    assert names(trainer) == {"toy_1.pth", "toy_2.pth", "toy_best.pth", "toy_final.pth"}
    trainer.run()
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2", "3", "4"]
    assert trainer.state.epoch == trainer.state.max_epochs == 4
    again = torch.load(tmp_path / "toy" / "toy_2.pth", weights_only=True)
    assert same_weights(first["model"], again["model"]), "an epoch of the first run was written over"
    final = torch.load(tmp_path / "toy" / "toy_final.pth", weights_only=True)
    assert final["epoch"] == 4
    assert same_weights(final["model"], weights(trainer))


def test_two_runs_of_two_epochs_end_as_one_of_four_with_a_constant_rate(tmp_path):
    once = make_trainer(tmp_path / "once", epochs=4, scheduler="constant")
    once.run()
    twice = make_trainer(tmp_path / "twice", epochs=2, scheduler="constant")
    twice.run()
    twice.run()
    assert same_weights(weights(once), weights(twice))
    assert rows(once) == rows(twice)


def test_the_learning_rate_of_a_second_run_is_that_of_the_longer_run(tmp_path):
    """Half a cosine over two epochs is 1, 1/2; over four it goes on with 1/2 and (1 - sqrt(1/2)) / 2."""
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.run()
    trainer.run()
    rates = [float(row["learning_rate"]) for row in rows(trainer)]
    assert rates == pytest.approx([0.01, 0.005, 0.005, 0.01 * (1 - 0.5**0.5) / 2], rel=1e-6)


def test_raising_max_epochs_goes_on_up_to_that_number(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    for done in (1, 2, 3):
        trainer.state.max_epochs = done
        trainer.run()
        assert trainer.state.epoch == done
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2", "3"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trainer_that_was_interrupted_ends_its_epoch_as_if_it_had_not_been(tmp_path):
    whole = make_trainer(tmp_path / "whole", epochs=2, stop_on_signal=True)
    whole.run()
    trainer = make_trainer(tmp_path / "cut", epochs=2, stop_on_signal=True)

    @trainer.on(Events.ITERATION_COMPLETED(once=6))
    def interrupt(_):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        trainer.run()
    assert trainer.state.iteration in (6, 7)
    trainer.run()
    assert trainer.state.iteration == whole.state.iteration
    assert same_weights(weights(whole), weights(trainer))
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2"]


def test_a_second_round_keeps_weights_that_were_put_in_between(tmp_path):
    """Federated learning gives the network the server's weights; neither resuming nor fine-tuning takes them away."""
    other = make_trainer(tmp_path / "other", epochs=1, seed=1)
    other.run()
    checkpoint = tmp_path / "other" / "toy" / "toy_1.pth"
    trainer = make_trainer(tmp_path / "mine", epochs=1, extra_handlers=[])
    Finetune(trainer.network, checkpoint).attach(trainer)
    trainer.run()
    server = {name: torch.full_like(value, 0.25) for name, value in weights(trainer).items()}
    trainer.network.load_state_dict(server)
    found = {}
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: found.update(weights(trainer)))
    trainer.run()
    assert same_weights(found, server)

    resumed = make_trainer(tmp_path / "mine", epochs=3, resume=True)
    resumed.run()
    resumed.network.load_state_dict(server)
    found.clear()
    resumed.add_event_handler(Events.EPOCH_STARTED(once=4), lambda _: found.update(weights(resumed)))
    resumed.run()
    assert same_weights(found, server)
    assert [row["epoch"] for row in rows(resumed)] == ["1", "2", "3", "4", "5", "6"]


def test_a_resumed_run_that_was_finished_trains_on_when_it_is_run_again(tmp_path):
    make_trainer(tmp_path, epochs=2).run()
    trainer = make_trainer(tmp_path, epochs=2, resume=True)
    trainer.run()
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2"]
    trainer.run()
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2", "3", "4"]


def test_another_trainer_of_the_same_folder_is_refused_as_before(tmp_path):
    make_trainer(tmp_path, epochs=1).run()
    with pytest.raises(Exception, match="holds a run of 'toy' already"):
        make_trainer(tmp_path, epochs=1).run()
