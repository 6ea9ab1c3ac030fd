"""A training step reads nothing back from the device: the host would wait for the GPU, then the GPU for the host."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from monai.engines import SupervisedTrainer
from test_derive_on_device_run import configured, data  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from volumen.engines.amp import AmpPolicy
from volumen.engines.guard import NonFiniteGuard
from volumen.engines.loss_values import LossValues, loss_values
from volumen.engines.optimizers import build_optimizer
from volumen.engines.trainer import TrainStep
from volumen.handlers.losses import LossAverages
from volumen.handlers.running_dice import RunningDice, label_counts
from volumen.time_budget.measure import training_objects
from volumen.transforms.decide import decide
from volumen.utils.errors import VolumenError

READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "bincount", "equal"}
NAN = float("nan")


class Reads(TorchDispatchMode):
    """Collects the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        masks = [
            index
            for part in args[1:2]
            if isinstance(part, (list, tuple))
            for index in part
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        ]
        if name in READS or (name.startswith(("index", "_index_put")) and masks):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_reads_are_seen():
    values = torch.arange(4.0)
    for act in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: float(values[0]),
        lambda: bool((values > 0).any()),
        lambda: values.__setitem__(values > 1, torch.zeros(2)),
    ):
        with Reads() as reads:
            act()
        assert reads.found
    with Reads() as reads:
        torch.where(values > 1, values, 0.0).index_select(0, torch.tensor([0, 1])).sum()
    assert not reads.found


def make_step(config, device):
    """Return a function that runs one step as the training does, and the objects of the training."""
    parser = training_objects(config)
    found = {
        name: parser.get_parsed_content(name)
        for name in ("network", "loss", "prepare_batch", "train#dataset", "train#dataloader")
    }
    network = found["network"]
    optimizer = build_optimizer("AdamW", network, 1e-3, fused=True)
    engine = SimpleNamespace(
        network=network,
        optimizer=optimizer,
        loss_function=found["loss"],
        inferer=lambda image, net: net(image),
        prepare_batch=found["prepare_batch"],
        accumulation_steps=1,
        non_blocking=True,
        to_kwargs={},
        fire_event=lambda event: None,
        state=SimpleNamespace(iteration=1, epoch=1, epoch_length=100, device=device, output={}, batch=None),
    )
    engine.add_event_handler = lambda *_: None
    step = TrainStep(AmpPolicy("off"), gradient_clip=12.0, read_every=20)
    averages, dice = LossAverages(), RunningDice(config.labelled_kinds, classes=config.label_classes)
    batch = next(iter(found["train#dataloader"]))

    def run():
        engine.state.batch = batch
        output = step(engine, batch)
        output["decisions"] = {
            name: decide(output["pred"][name][0], "binary") for name in config.labelled_kinds
        }
        averages._add(engine)
        dice.iteration_completed(engine)
        engine.state.iteration += 1

    return run, SimpleNamespace(step=step, averages=averages, dice=dice, engine=engine)


@pytest.mark.parametrize("augment", [True, False])
def test_a_step_reads_nothing(data, tmp_path, monkeypatch, augment):  # noqa: F811
    # A check of the labels runs on CPUs only.
    monkeypatch.setattr("volumen.losses.multitask._check_labels", lambda *_: None)
    settings = {"augment_on_device": augment, "derive_on_device": True, "patch_size": [16] * 3}
    run, made = make_step(configured(data, tmp_path, tr_config=settings), torch.device("cpu"))
    run()
    with Reads() as reads:
        run()
    host_facts = 0 if augment else 2  # of a batch that still lies on the host
    assert len(reads.found) <= host_facts, reads.found
    assert made.averages.state_dict()["counts"]["loss"] == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_does_not_synchronise(data, tmp_path, monkeypatch):  # noqa: F811
    from volumen.config.manager import ConfigManager

    config = configured(data, tmp_path, tr_config={"patch_size": [16] * 3})
    monkeypatch.setattr(ConfigManager, "device", torch.device("cuda"), raising=False)
    run, _ = make_step(config, torch.device("cuda"))
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counting_classes_reads_nothing():
    truth = torch.randint(0, 4, (2, 1, 8, 8, 8), dtype=torch.int16)
    logits, valid = torch.randn(2, 4, 8, 8, 8), torch.rand(2, 1, 8, 8, 8) > 0.3
    with Reads() as reads:
        counts = label_counts(decide(logits, "multiclass"), truth, valid, "multiclass", 4)
    assert not reads.found
    assert torch.equal(counts, label_counts(decide(logits, "multiclass"), truth, valid, "multiclass"))


class Toy(torch.nn.Module):
    """Sums its input times a weight; a loss of NaN where the input holds NaN."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, image):
        return {"t": image * self.weight.reshape(1, -1, 1, 1)}


def toy_loss(outputs, targets):
    return ((outputs["t"] - targets["t"]) ** 2).mean()


def run_toy(batches, read_every, optimizer="AdamW", accumulation=1, guard=None, epoch_length=None):
    network = Toy()
    step = TrainStep(gradient_clip=1.0, guard=guard or NonFiniteGuard(10), read_every=read_every)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        epoch_length=epoch_length or len(batches),
        network=network,
        optimizer=build_optimizer(optimizer, network, 0.1, fused=None),
        loss_function=toy_loss,
        prepare_batch=lambda batch, *_, **__: (batch["image"], {"t": batch["t"]}),
        iteration_update=step,
        accumulation_steps=accumulation,
        decollate=False,
        train_handlers=[LossAverages()],
    )
    trainer.logger.setLevel("CRITICAL")
    trainer.run()
    return trainer, step


def toy_batches(bad=()):
    torch.manual_seed(0)
    batches = []
    for number in range(12):
        image = torch.randn(2, 2, 4, 4)
        if number in bad:
            image[1, 0, 0, 0] = NAN
        batches.append({"image": image, "t": torch.randn(2, 2, 4, 4), "volume_name": [f"a{number}", "b"]})
    return batches


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RAdam"])
def test_reading_later_trains_the_same_weights_and_skips_the_same_steps(optimizer, accumulation, caplog):
    one, one_step = run_toy(toy_batches(bad=(2, 5)), 1, optimizer, accumulation)
    other, other_step = run_toy(toy_batches(bad=(2, 5)), 5, optimizer, accumulation)
    assert torch.equal(one.network.weight, other.network.weight)
    assert torch.isfinite(other.network.weight).all()
    assert one_step.guard.skipped == other_step.guard.skipped == 2
    assert caplog.text.count("iteration 3: the loss is nan (volume 'b')") == 2
    for name in ("loss", "gradient_norm"):
        assert one.state.metrics[name] == pytest.approx(other.state.metrics[name], rel=1e-6)
    states = [t.optimizer.state[t.network.weight].get("step", torch.zeros(())) for t in (one, other)]
    assert torch.equal(*states)


def test_a_gradient_that_is_not_finite_skips_the_step(caplog):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    batches, calls = toy_batches(), []

    def loss(outputs, targets):
        calls.append(None)
        value = toy_loss(outputs, targets)
        return Steep.apply(value) if len(calls) == 4 else value

    results = []
    for read_every in (1, 20):
        calls.clear()
        network = Toy()
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=batches,
            epoch_length=12,
            network=network,
            optimizer=build_optimizer("AdamW", network, 0.1, fused=True),
            loss_function=loss,
            prepare_batch=lambda batch, *_, **__: (batch["image"], {"t": batch["t"]}),
            iteration_update=TrainStep(read_every=read_every),
            decollate=False,
        )
        trainer.run()
        results.append(network.weight)
    assert torch.equal(*results)
    assert caplog.text.count("iteration 4: the gradient is not finite") == 2


def test_where_the_optimizer_is_fused():
    def fused(name, setting, **options):
        (group,) = build_optimizer(name, Toy(), 0.1, fused=setting, options=options).param_groups
        return bool(group.get("fused"))

    assert fused("AdamW", None)
    assert fused("SGD", True, momentum=0.9)
    assert not fused("AdamW", False)
    assert not fused("AdamW", None, foreach=True)
    assert not fused("RAdam", None)
    with pytest.raises(VolumenError, match="fused_optimizer: expected an optimizer with a fused kernel"):
        fused("RAdam", True)


def test_too_many_skipped_steps_stop_the_training_at_the_next_read():
    with pytest.raises(VolumenError, match="after 1 skipped steps"):
        run_toy(toy_batches(bad=(1, 3, 4)), 6, guard=NonFiniteGuard(1))


def test_losses_are_fetched_when_they_are_read():
    function = SimpleNamespace(
        components={"a": torch.tensor(1.0), "a/X": torch.tensor(2.0), "b": torch.tensor(0.0)},
        present={"a": torch.tensor(True), "b": torch.tensor(False)},
    )
    with Reads() as reads:
        values = loss_values(torch.tensor(3.0), function)
    assert not reads.found
    assert isinstance(values, LossValues)
    assert values == {"loss": 3.0, "a": 1.0, "a/X": 2.0}
    assert copy.copy(values)["a/X"] == 2.0


@pytest.mark.parametrize("names", [("loss", "a"), ("loss",)])
def test_averages_go_on_when_a_component_joins(names):
    averages = LossAverages("losses")

    def add(names, values):
        losses = LossValues(names, torch.tensor(values), torch.ones(len(names), dtype=torch.bool))
        output = {"losses": losses, "gradient_norm": None, "image": torch.zeros(2, 1)}
        averages._add(SimpleNamespace(state=SimpleNamespace(output=output, batch=None)))

    add(names, [1.0] * len(names))
    add(("loss", "a"), [3.0, 5.0])
    restored = LossAverages("losses")
    restored.load_state_dict(averages.state_dict())
    state = restored.state_dict()
    assert state["sums"]["loss"] == 8.0
    assert state["counts"]["loss"] == 4
    assert state["sums"]["loss/a"] == (12.0 if len(names) == 2 else 10.0)
    add(names, [NAN] * len(names))
    assert averages.state_dict() == state
