"""The training and evaluation steps inside MONAI's engines."""

from __future__ import annotations

import copy
import csv
import logging

import pytest
import torch
from data_folders import shells, write_tiff_folder
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from training_toys import ToyData, ToyLoss, ToyNetwork, make_trainer, same_weights, weights

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main
from volumen.engines.amp import AmpPolicy
from volumen.engines.batch import prepare_batch
from volumen.engines.trainer import TrainStep, accumulation_group
from volumen.networks.placement import prepare_network, unwrap
from volumen.utils.errors import VolumenError
from volumen.utils.precision import choose_dtype, cpu_computes_bfloat16


class NoDropout(ToyNetwork):
    """A network with which the outputs of two batches differ by their samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Identity()


def batches(count: int, size: int = 2):
    """Return collated toy batches."""
    data = ToyData(count * size)
    collate = torch.utils.data.default_collate
    return [collate([data[(0, i * size + j)] for j in range(size)]) for i in range(count)]


def run_steps(data, *, network=None, accumulation=1, clip=None, lr=0.1, amp="off", **step_options):
    """Run SGD over these batches once; return the trainer."""
    torch.manual_seed(0)
    network = NoDropout() if network is None else network
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr),
        loss_function=ToyLoss(),
        prepare_batch=prepare_batch,
        iteration_update=TrainStep(AmpPolicy(amp), gradient_clip=clip, **step_options),
        accumulation_steps=accumulation,
        decollate=False,
    )
    trainer.run()
    return trainer


def joined(parts):
    """Combine several batches into one."""
    return {
        key: torch.cat([part[key] for part in parts])
        if torch.is_tensor(value)
        else [item for part in parts for item in part[key]]
        for key, value in parts[0].items()
    }


def test_one_step_is_that_of_plain_torch():
    data = batches(1)
    trainer = run_steps(data)
    torch.manual_seed(0)
    network = NoDropout()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = ToyLoss()(network(data[0]["image"]), data[0])
    loss.backward()
    optimizer.step()
    assert same_weights(weights(trainer), network.state_dict())
    assert trainer.state.output["losses"]["loss"] == loss.item()
    assert set(trainer.state.output["losses"]) == {"loss", "ink", "ink/BCE", "depth", "depth/MSE"}
    assert trainer.state.output["stepped"]


@pytest.mark.parametrize(("count", "steps"), [(4, 4), (4, 2), (5, 3)])
def test_accumulated_gradients_equal_the_big_batch(count, steps):
    data = batches(count)
    small = run_steps(data, accumulation=steps)
    groups = [data[i : i + steps] for i in range(0, count, steps)]
    big = run_steps([joined(group) for group in groups])
    for name, value in weights(big).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("iteration", "length", "steps", "expected"),
    [
        (1, 5, 1, (True, True, 1)),
        (1, 5, 3, (True, False, 3)),
        (3, 5, 3, (False, True, 3)),
        (4, 5, 3, (True, False, 2)),  # the partial group at the epoch's end
        (5, 5, 3, (False, True, 2)),
        (6, 5, 3, (True, False, 3)),  # the next epoch begins a new group
        (7, None, 3, (True, False, 3)),
        (1, 1, 4, (True, True, 1)),
    ],
)
def test_accumulation_group(iteration, length, steps, expected):
    assert accumulation_group(iteration, length, steps) == expected


def test_clipping_bounds_the_whole_accumulated_gradient():
    data = batches(3)
    network = NoDropout()
    before = copy.deepcopy(network.state_dict())
    trainer = run_steps(data, network=network, accumulation=3, clip=0.01, lr=1.0)
    moved = torch.cat([(value - before[name]).flatten() for name, value in network.state_dict().items()])
    assert moved.norm() == pytest.approx(0.01, rel=1e-3)
    assert trainer.state.output["gradient_norm"] > 0.01


def test_only_accumulating_steps_have_no_norm():
    seen = []
    trainer = make_trainer_for_norms(seen)
    trainer.run()
    assert [norm is not None for norm in seen] == [False, False, True, True]


def make_trainer_for_norms(seen):
    data = batches(4)
    network = NoDropout()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=ToyLoss(),
        prepare_batch=prepare_batch,
        iteration_update=TrainStep(),
        accumulation_steps=3,
        decollate=False,
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output["gradient_norm"])
    )
    return trainer


def test_nan_is_reported_and_skipped_and_does_no_harm(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, epochs=2, poison=(1, 3))
        trainer.run()
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("epoch 2, iteration 6: ")
    assert "BCE of target 'ink' is nan" in messages[0]
    # Of the batch's samples 2 and 3 only the one that caused it is named.
    assert "volume 'scroll1' at (1, 3)" in messages[0]
    assert "scroll0" not in messages[0]
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())
    assert trainer.state.metrics["loss"] < 10


def test_too_many_nan_stop_training(tmp_path):
    class Poisoned(ToyData):
        def __getitem__(self, key):
            sample = super().__getitem__(key)
            sample["depth"] = sample["depth"] / 0
            return sample

    with pytest.raises(
        VolumenError, match=r"epoch 1, iteration 3: MSE of target 'depth' is inf .*after 2 skipped"
    ):
        make_trainer(tmp_path, data=Poisoned(), max_skipped=2).run()


def test_a_bad_batch_drops_its_whole_group():
    data = batches(4)
    bad = copy.deepcopy(data)
    bad[1]["image"][0] = float("nan")
    trainer = run_steps(bad, accumulation=2)
    assert same_weights(weights(trainer), weights(run_steps(data[2:], accumulation=2)))


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(caplog):
    class Steep(ToyLoss):
        def forward(self, outputs, batch):
            # The root's slope at 0 is infinite.
            return super().forward(outputs, batch) + (outputs["ink"] * 0).abs().sqrt().sum()

    network = NoDropout()
    before = copy.deepcopy(network.state_dict())
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches(1),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=Steep(),
        prepare_batch=prepare_batch,
        iteration_update=TrainStep(),
        decollate=False,
    )
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "the gradient is not finite" in caplog.text
    assert same_weights(before, network.state_dict())


def test_bfloat16_trains_close_to_float32():
    data = batches(6)
    half = weights(run_steps(data, amp="bfloat16"))
    full = weights(run_steps(data))
    for name, value in full.items():
        assert value.dtype == half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], value, rtol=0.1, atol=0.02)
    assert not same_weights(half, full)


def test_float16_scales_and_its_scaler_is_checkpointed():
    trainer = run_steps(batches(3), amp="float16")
    step = trainer._process_function
    state = step.state_dict()
    assert state["scaler"]["scale"] > 1
    state["scaler"]["scale"] = 1234.0
    fresh = TrainStep(AmpPolicy("float16"))
    fresh.load_state_dict(state)
    assert fresh.amp.scaler.get_scale() == 1234.0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("off", None), (False, None), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_amp_settings(setting, expected):
    assert AmpPolicy(setting).dtype is expected


def test_auto_amp_on_the_cpu_follows_its_instructions(monkeypatch):
    for flags, expected in (
        ({"avx2"}, None),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
    ):
        monkeypatch.setattr("volumen.utils.precision._cpu_flags", lambda flags=flags: flags)
        cpu_computes_bfloat16.cache_clear()
        assert choose_dtype("auto", torch.device("cpu")) is expected
    cpu_computes_bfloat16.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_amp_on_cuda_follows_the_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_dtype("auto", torch.device("cuda", 0)) is expected


def test_unknown_amp_setting_is_refused():
    with pytest.raises(VolumenError, match=r"tr_config\.amp: expected one of auto, off, .*found 'fp8'"):
        AmpPolicy("fp8")


def test_prepare_batch_gives_plain_tensors():
    from monai.data import MetaTensor

    batch = batches(1)[0]
    batch["image"] = MetaTensor(batch["image"])
    image, targets = prepare_batch(batch, "cpu", channels_last=True)
    assert type(image) is torch.Tensor
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert set(targets) == {"ink", "ink_mask", "depth", "start"}


def test_validation_does_not_change_training(tmp_path):
    """The evaluator uses the same network, loss and random numbers as the trainer."""
    often = make_trainer(tmp_path / "often")
    never = make_trainer(tmp_path / "never")
    never._event_handlers[Events.EPOCH_COMPLETED] = [
        entry
        for entry in never._event_handlers[Events.EPOCH_COMPLETED]
        if type(entry[0]).__name__ != "Validate"
    ]
    often.run()
    never.run()
    assert "val/loss" in often.state.metrics
    assert "val/loss" not in never.state.metrics
    assert same_weights(weights(often), weights(never))


def test_channels_last_and_compile_train_the_same_and_save_the_same_names():
    data = batches(2)
    plain = run_steps(data)
    torch.manual_seed(0)
    network = NoDropout()
    wrapped = prepare_network(network, channels_last=True, compile=True, compile_kwargs={"backend": "eager"})
    assert unwrap(wrapped) is network
    run_steps(data, network=wrapped)
    assert network.body.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in weights(plain).items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_in_channels_last_trains_validates_and_saves_as_a_plain_one(tmp_path):
    data = write_tiff_folder(tmp_path / "data", {"scroll": {"surface": shells((24, 24, 64))}})

    def train(out, *more):
        words = "--patch-size 16,16,16 --steps-per-epoch 2 --val-steps 1 --workers 0 --amp off --device cpu"
        command = ["train", "-i", str(data), "-o", str(tmp_path / out), *words.split()]
        assert main([*command, "--set", "model_config.features_per_stage=[4, 8]", *more]) == 0
        return load_checkpoint(tmp_path / out / "model" / "model_1.pth")

    compiled = ["--set", "tr_config.compile=true", "--set", "tr_config.channels_last=true"]
    plain = train("plain", "--max-epochs", "1")
    fast = train("fast", "--max-epochs", "1", *compiled)
    assert plain["model"].keys() == fast["model"].keys()
    # Losses and scores of training and validation are compared. Weights may differ where the gradient is only rounding
    # noise (such as for a bias before a normalisation), from which the optimizer makes steps of full size.
    rows = [
        next(csv.DictReader((tmp_path / out / "model" / "metrics.csv").open())) for out in ("plain", "fast")
    ]
    numbers = [{name: float(value) for name, value in row.items()} for row in rows]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    # Both runs have the same network: a run can continue without compiling.
    train("fast", "--max-epochs", "2", "--resume")
    assert (tmp_path / "fast" / "model" / "model_2.pth").is_file()
