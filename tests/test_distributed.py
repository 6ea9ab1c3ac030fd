"""Two processes: the same gradients as with the whole batch, one writer, a common stop."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from training_toys import ToyNetwork, make_trainer, same_weights, weights
from two_processes import in_two_processes

from volumen.checkpoints.file import checksum, load_checkpoint
from volumen.cli.running.execution import leave
from volumen.data.sampling.regions import RegionSampler
from volumen.handlers.losses import LossAverages
from volumen.handlers.running_dice import RunningDice
from volumen.handlers.state import register_state, restore_states, saved_states
from volumen.utils import distributed


def _train(rank: int, out: Path, options: dict) -> None:
    trainer = make_trainer(out, world=(rank, 2), dropout=0.0, **options)
    trainer.run()
    torch.save(weights(trainer), out.parent / f"rank{rank}.pt")
    (out.parent / f"metrics{rank}.json").write_text(json.dumps(trainer.state.metrics))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one_on_the_joined_batch(tmp_path, accumulation):
    options = {"epochs": 2, "optimizer": "SGD", "accumulation": accumulation}
    assert in_two_processes(_train, tmp_path / "two", {**options, "batch_size": 1}) == [0, 0]
    alone = make_trainer(tmp_path / "one", dropout=0.0, batch_size=2, **options)
    alone.run()

    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    ranks = [{name.removeprefix("module."): value for name, value in state.items()} for state in ranks]
    assert same_weights(*ranks)
    for name, value in weights(alone).items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-6, atol=1e-6)
    metrics = [json.loads((tmp_path / f"metrics{rank}.json").read_text()) for rank in range(2)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["loss"] == pytest.approx(alone.state.metrics["loss"], rel=1e-5)
    # There is one set of files, with the names of weights that a single process writes.
    saved = load_checkpoint(tmp_path / "two" / "toy" / "toy_2.pth")["model"]
    assert same_weights(saved, ranks[0])
    assert sorted(path.name for path in (tmp_path / "two" / "toy").iterdir()) == sorted(
        path.name for path in (tmp_path / "one" / "toy").iterdir()
    )


def _train_poisoned(rank: int, out: Path) -> None:
    logging.getLogger("volumen.engines.guard").addHandler(logging.FileHandler(out.parent / f"log{rank}"))
    trainer = make_trainer(out, world=(rank, 2), epochs=1, batch_size=1, poison=(0, 2))
    trainer.run()
    state = weights(trainer)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    torch.save(state, out.parent / f"rank{rank}.pt")


def test_nan_in_one_process_skips_the_step_in_both(tmp_path):
    assert in_two_processes(_train_poisoned, tmp_path / "out") == [0, 0]
    assert same_weights(*(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)))
    # The first process reports for both: it also names what only the other one has seen.
    logs = [(tmp_path / f"log{rank}").read_text().splitlines() for rank in range(2)]
    assert logs[0] == logs[1]
    (line,) = logs[0]
    assert "MSE of target 'depth' is nan (volume 'scroll0' at (0, 2))" in line


def _stop_one(rank: int, out: Path) -> None:
    import signal

    from ignite.engine import Events

    trainer = make_trainer(out, world=(rank, 2), epochs=1, batch_size=1, stop_on_signal=True)
    if rank == 1:
        trainer.add_event_handler(
            Events.ITERATION_STARTED(once=2), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    trainer.run()


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    assert in_two_processes(_stop_one, tmp_path / "out") == [143, 143]
    assert load_checkpoint(tmp_path / "out" / "toy" / "toy_interrupted.pth")["iteration"] == 2


def _run(rank: int, out: Path, stop_at: int | None, resume: bool) -> None:
    import signal

    from ignite.engine import Events

    trainer = make_trainer(
        out,
        world=(rank, 2),
        epochs=2,
        batch_size=1,
        length=12,
        stop_on_signal=True,
        resume=resume,
        train_dice=True,
        scores=True,
    )
    if stop_at is not None and rank == 1:
        trainer.add_event_handler(
            Events.ITERATION_STARTED(once=stop_at), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    trainer.run()


@pytest.mark.parametrize("stop_at", [3, 8, 12], ids=["first epoch", "second epoch", "last step"])
def test_a_run_that_was_stopped_within_an_epoch_goes_on_with_every_process_s_part(tmp_path, stop_at):
    assert in_two_processes(_run, tmp_path / "whole", None, False) == [0, 0]
    assert in_two_processes(_run, tmp_path / "resumed", stop_at, False) == [143, 143]
    stopped = load_checkpoint(tmp_path / "resumed" / "toy" / "toy_interrupted.pth")["handlers"]
    first, second = stopped["losses"]["by_process"]
    assert first["sums"] != second["sums"]
    assert in_two_processes(_run, tmp_path / "resumed", None, True) == [0, 0]

    whole, resumed = tmp_path / "whole" / "toy", tmp_path / "resumed" / "toy"
    assert "train/mean_dice" in (whole / "metrics.csv").read_text()
    assert (resumed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    checkpoints = [load_checkpoint(folder / "toy_2.pth") for folder in (whole, resumed)]
    assert same_weights(checkpoints[0]["model"], checkpoints[1]["model"])
    assert checksum(checkpoints[0]["handlers"]) == checksum(checkpoints[1]["handlers"])


def test_one_process_goes_on_with_the_sums_of_two(tmp_path):
    """The reverse holds too: nothing is counted twice, and nothing is lost."""
    assert in_two_processes(_run, tmp_path / "out", 3, False) == [143, 143]
    engine = Engine(lambda *_: None)
    averages, dice = LossAverages("losses"), RunningDice({"ink": "binary"})
    register_state(engine, "losses", averages)
    register_state(engine, "train_dice", dice)
    saved = load_checkpoint(tmp_path / "out" / "toy" / "toy_interrupted.pth")["handlers"]
    restore_states(engine, saved)
    parts = saved["losses"]["by_process"]
    assert averages.state_dict()["counts"] == {
        name: sum(part["counts"][name] for part in parts) for name in parts[0]["counts"]
    }
    assert averages.state_dict()["sums"]["loss"] == sum(part["sums"]["loss"] for part in parts)
    counts = [part["ink"] for part in saved["train_dice"]["by_process"]]
    assert torch.equal(dice.state_dict()["ink"], counts[0] + counts[1])
    alone = saved_states(engine)
    restore_states(engine, alone)
    assert checksum(saved_states(engine)) == checksum(alone)


def test_alone_nothing_is_reduced():
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main()
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.sum_over_ranks({"a": 1.5}) == {"a": 1.5}
    assert distributed.initialize("cpu") == torch.device("cpu")


def _reduce(rank: int, out: Path) -> None:
    assert distributed.any_rank(rank == 1)
    assert not distributed.any_rank(False)
    values = {"a": 1.0 + rank, **({"b": 5.0} if rank else {})}
    assert distributed.sum_over_ranks(values) == {"a": 3.0, "b": 5.0}
    assert distributed.is_main() == (rank == 0)
    distributed.barrier()


def test_values_are_summed_over_processes(tmp_path):
    assert in_two_processes(_reduce, tmp_path) == [0, 0]


class BatchNormalised(ToyNetwork):
    """A network with buffers, which `DistributedDataParallel` exchanges in a forward pass."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.norm = torch.nn.BatchNorm2d(4)


def _validate(rank: int, out: Path, blocks: int) -> None:
    trainer = make_trainer(
        out, world=(rank, 2), network=BatchNormalised(), validation_length=blocks, scores=True, val_every=9
    )
    # The buffers of each rank's own batches, of which only those of the first rank are saved.
    trainer.network.module.norm.running_mean.fill_(0.3 + rank)
    trainer.toy_evaluator.run(1)
    (out.parent / f"scores{rank}.json").write_text(json.dumps(trainer.toy_evaluator.state.metrics))
    (out.parent / f"blocks{rank}.txt").write_text(str(trainer.toy_evaluator.state.iteration))


@pytest.mark.parametrize(
    ("blocks", "each"),
    [
        (4, [2, 2]),
        (5, [3, 2]),  # not divided evenly: no process may wait for another at a block
        (1, [1, 1]),  # fewer blocks than processes
    ],
)
def test_validation_is_divided_and_its_scores_are_those_of_one_process(tmp_path, blocks, each):
    assert in_two_processes(_validate, tmp_path / "two", blocks) == [0, 0]
    alone = make_trainer(
        tmp_path / "one", network=BatchNormalised(), validation_length=blocks, scores=True, val_every=9
    )
    alone.network.norm.running_mean.fill_(0.3)
    alone.toy_evaluator.run(1)

    expected = alone.toy_evaluator.state.metrics
    assert {"loss", "loss/ink", "ink/dice", "ink/iou", "depth/mae", "mean_dice"} <= set(expected)
    for rank in range(2):
        found = json.loads((tmp_path / f"scores{rank}.json").read_text())
        assert found == pytest.approx(expected, rel=1e-6)
        assert int((tmp_path / f"blocks{rank}.txt").read_text()) == each[rank]


@pytest.mark.parametrize(("count", "world"), [(7, 3), (4, 4), (12, 5)])
def test_every_block_is_validated_by_one_process(count, world):
    shares = [list(RegionSampler(count, rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(block for share in shares for block in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # The preview shows the same block as with one process.
    assert shares[0][0] == 0


def _stop_in_validation(rank: int, out: Path) -> None:
    import signal

    from ignite.engine import Events

    trainer = make_trainer(
        out, world=(rank, 2), batch_size=1, validation_length=7, scores=True, stop_on_signal=True, ema=0.9
    )
    if rank == 1:
        trainer.toy_evaluator.add_event_handler(
            Events.ITERATION_STARTED(once=2), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    trainer.run()


def test_a_signal_during_validation_stops_both_and_loses_no_step(tmp_path):
    assert in_two_processes(_stop_in_validation, tmp_path / "out") == [143, 143]
    saved = load_checkpoint(tmp_path / "out" / "toy" / "toy_interrupted.pth")
    assert (saved["iteration"], saved["sampler"]) == (4, {"epoch": 0, "batch": 4})


@pytest.mark.parametrize(("code", "waits"), [(0, True), (143, False), (1, False)])
def test_a_process_among_several_that_fails_does_not_tidy_up(monkeypatch, code, waits):
    ends = []
    monkeypatch.setattr(os, "_exit", lambda number: ends.append(number))
    with pytest.raises(SystemExit):
        leave(code)
    assert ends == []
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        leave(code)
    assert ends == ([] if waits else [code])


_kept: list = []


def _die(rank: int, out: Path) -> None:
    import signal

    from ignite.engine import Events

    trainer = make_trainer(out, world=(rank, 2), epochs=3, batch_size=1, workers=2, stop_on_signal=True)
    _kept.append(trainer)  # as a traceback does, which also holds the workers
    if rank == 1:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: os._exit(9))
    else:
        # Torchrun sends this signal to the others.
        trainer.add_event_handler(
            Events.ITERATION_STARTED(once=6), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    trainer.run()


@pytest.mark.slow
def test_a_dead_process_ends_the_other(tmp_path):
    began = time.monotonic()
    codes = in_two_processes(_die, tmp_path / "out", timeout=120)
    assert time.monotonic() - began < 60
    assert codes[0] != 0
    assert codes[1] == 9
    assert load_checkpoint(tmp_path / "out" / "toy" / "toy_1.pth")["epoch"] == 1
