"""A mean teacher: what it says, what the student learns from it, and what happens when it collapses."""

from __future__ import annotations

import copy
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn
from two_processes import in_two_processes

from volumen.engines.batch import PrepareBatch
from volumen.engines.mean_teacher import MeanTeacher
from volumen.engines.trainer import TrainStep
from volumen.handlers.weight_average import WeightAverage
from volumen.losses.consistency import consistency, entropy, teaching
from volumen.losses.multitask import MultiTaskLoss
from volumen.networks.placement import prepare_network, unwrap
from volumen.utils.sample_keys import STRONG, WEAK

TARGETS = {
    "ink": {"kind": "binary", "out_channels": 1, "losses": [{"name": "BCEWithLogitsLoss"}]},
    "part": {"kind": "multiclass", "out_channels": 3, "losses": [{"name": "CrossEntropyLoss"}]},
}
KINDS = {name: target["kind"] for name, target in TARGETS.items()}
SIDE = 8


class Net(nn.Module):
    """Two heads over one convolution, and dropout that a teacher must not use; a list per head while it trains."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.ink, self.part = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 3, 1)

    def forward(self, image):
        features = self.dropout(torch.tanh(self.body(image)))
        outputs = {"ink": self.ink(features), "part": self.part(features)}
        return {name: [value] for name, value in outputs.items()} if self.training else outputs


def batch(seed: int = 0, unlabelled: int = 2) -> dict:
    draw = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 1, SIDE, SIDE, generator=draw)
    return {
        "image": image,
        "ink": (image > 0.5).to(torch.int16),
        "ink_mask": torch.ones(2, 1, SIDE, SIDE, dtype=torch.bool),
        "part": (image * 3).to(torch.int16).clamp_max(2),
        "part_mask": torch.ones(2, 1, SIDE, SIDE, dtype=torch.bool),
        WEAK: torch.rand(unlabelled, 1, SIDE, SIDE, generator=draw),
        STRONG: torch.rand(unlabelled, 1, SIDE, SIDE, generator=draw),
    }


def trainer(network, teacher, batches, *, epochs=1, lr=0.1, average=None, **step) -> SupervisedTrainer:
    engine = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=epochs, train_data_loader=batches, network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr), loss_function=MultiTaskLoss(TARGETS),
        prepare_batch=PrepareBatch(), iteration_update=TrainStep(teacher=teacher, **step), decollate=False,
    )  # fmt: skip
    if average is not None:
        average.attach(engine)
    return engine


def engine_at(iteration: int, network=None, length: int = 10, epochs: int = 10) -> SimpleNamespace:
    state = SimpleNamespace(iteration=iteration, epoch_length=length, max_epochs=epochs, epoch=1)
    return SimpleNamespace(state=state, network=network, inferer=lambda image, net: net(image))


def test_a_step_has_the_gradients_of_both_parts():
    network = Net()
    teaching_weights = {name: value + 0.1 for name, value in network.state_dict().items()}
    average = SimpleNamespace(average=teaching_weights)
    weights = {"part": 0.5}
    teacher = MeanTeacher(average, KINDS, target_weights=weights, weight=3.0, ramp_up=0.0, mix=0.0)
    data = batch()

    own, taught = copy.deepcopy(network), copy.deepcopy(network)
    taught.load_state_dict(teaching_weights)
    taught.eval()
    loss = MultiTaskLoss(TARGETS)(own(data["image"]), data)
    with torch.no_grad():
        said = taught(data[WEAK])
    student = own(data[STRONG])
    ink = (student["ink"][0].sigmoid() - said["ink"].sigmoid()).square().mean()
    part = 0.5 * (student["part"][0].softmax(1) - said["part"].softmax(1)).square().mean()
    (loss + 3.0 * (ink + part)).backward()

    engine = trainer(network, teacher, [data], lr=1.0)
    before = copy.deepcopy(network.state_dict())
    engine.run()
    for name, weight in own.named_parameters():
        moved = before[name] - network.state_dict()[name]
        assert torch.allclose(moved, weight.grad, atol=1e-6), name
    losses = engine.state.output["losses"]
    assert losses["unlabelled"] == pytest.approx(3.0 * float((ink + part).detach()), rel=1e-5)
    assert losses["loss"] == pytest.approx(float((loss + 3.0 * (ink + part)).detach()), rel=1e-5)


def test_the_teacher_is_the_average_without_dropout_and_changes_no_state():
    network = Net(dropout=0.9)
    average = WeightAverage(network, 0.9)
    average.average = {name: value * 0.5 for name, value in network.state_dict().items()}
    teacher = MeanTeacher(average, KINDS)
    before = copy.deepcopy(network.state_dict())
    image = torch.rand(2, 1, SIDE, SIDE)
    network.train()
    outputs = teacher._teach(network, image)
    reference = Net()
    reference.load_state_dict(average.average)
    expected = reference.eval()(image)
    assert all(torch.allclose(outputs[name], expected[name]) for name in expected)
    assert network.training
    assert network.dropout.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(output.requires_grad for output in outputs.values())


def test_a_mixed_box_has_the_next_sample_in_image_and_teaching():
    teacher = MeanTeacher(
        SimpleNamespace(average={"x": 0}), {"ink": "binary"}, mix=1.0, ramp_up=0.0, weight=1.0
    )
    seen = {}

    def network(image):
        seen["image"] = image
        return {"ink": image * 1.0}

    engine = engine_at(1, network)
    teacher._teach = lambda net, image: {"ink": image}
    views = torch.randn(3, 1, SIDE, 2 * SIDE, requires_grad=True)
    torch.manual_seed(0)
    # A network whose output is its image: image and teaching mixed alike leave no difference.
    assert float(teacher.loss(engine, (views, views)).detach()) == pytest.approx(0.0, abs=1e-12)
    mixed = seen["image"].detach()
    changed = (mixed != views).any(dim=1)
    assert 0.35 < changed.float().mean() < 0.65
    assert torch.equal(mixed[changed[:, None]], views.detach().roll(-1, 0)[changed[:, None]])
    rows, columns = changed[0].any(1).nonzero(), changed[0].any(0).nonzero()
    assert changed[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_one_unlabelled_patch_cannot_be_mixed():
    teacher = MeanTeacher(SimpleNamespace(average={}), KINDS, mix=1.0)
    assert teacher._box(torch.zeros(1, 1, SIDE, SIDE)) is None


def test_the_weight_rises_like_the_publication():
    teacher = MeanTeacher(SimpleNamespace(average={}), KINDS, ramp_up=0.5)
    assert teacher.rise(engine_at(1)) == pytest.approx(math.exp(-5))
    assert teacher.rise(engine_at(26)) == pytest.approx(math.exp(-5 * 0.25))
    assert teacher.rise(engine_at(51)) == teacher.rise(engine_at(100)) == 1.0
    assert MeanTeacher(SimpleNamespace(average={}), KINDS, ramp_up=0.0).rise(engine_at(1)) == 1.0


def test_uncertain_voxels_do_not_count():
    logits = torch.tensor([0.0, 8.0, -8.0, 0.5]).view(1, 1, 4)
    taught = teaching(logits, "binary")
    limits = entropy(taught, "binary")
    p = taught.double()
    expected = -(p * p.log2() + (1 - p) * (1 - p).log2())
    assert torch.allclose(limits.double(), expected, atol=1e-6)
    teacher = MeanTeacher(SimpleNamespace(average={}), {"ink": "binary"}, uncertainty=True)
    assert teacher._certain({"ink": taught}, 0.0)["ink"].flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
    student = torch.zeros(1, 1, 4, requires_grad=True)
    consistency(student, taught, "binary", teacher._certain({"ink": taught}, 0.0)["ink"]).backward()
    assert (student.grad.flatten() != 0).tolist() == [False, True, True, False]
    none = consistency(student, taught, "binary", torch.zeros(1, 1, 4))
    assert float(none.detach()) == 0.0


def test_entropy_of_classes_is_1_where_all_are_equal():
    assert float(entropy(torch.full((1, 3, 1), 1 / 3), "multiclass").max()) == pytest.approx(1.0)
    assert float(entropy(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1), "multiclass").max()) == 0.0


@pytest.mark.parametrize(
    "kind", ["binary", "multilabel", "multiclass", "distance", "vector", "axis", "tensor", "field"]
)
def test_consistency_is_0_for_equal_outputs_and_above_it_else(kind):
    torch.manual_seed(0)
    channels = 1 if kind in ("binary", "distance") else 3
    one, other = torch.randn(2, 2, channels, 6, 5, 4)
    assert float(consistency(one, teaching(one, kind), kind)) == pytest.approx(0.0, abs=1e-6)
    assert float(consistency(other, teaching(one, kind), kind)) > 1e-3
    if kind == "axis":
        assert float(consistency(-one, teaching(one, kind), kind)) == pytest.approx(0.0, abs=1e-6)
    if kind == "vector":
        assert float(consistency(-one, teaching(one, kind), kind)) == pytest.approx(1.0, abs=1e-6)
    if kind in ("distance", "tensor", "field"):
        scaled = consistency(10 * other, teaching(10 * one, kind), kind)
        assert float(scaled) == pytest.approx(float(consistency(other, teaching(one, kind), kind)), rel=1e-4)
        expected = np.square((other - one).numpy()).mean() / (4 * one.numpy().var())
        assert float(consistency(other, teaching(one, kind), kind)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_a_collapsed_teacher_is_recognised_and_left_out(caplog, kind):
    channels = 1 if kind == "binary" else 3
    target = {"kind": kind, "out_channels": channels}
    kinds = {"ink": target["kind"]}

    def teacher_after(logits, labels):
        teacher = MeanTeacher(SimpleNamespace(average={}), kinds, ramp_up=0.1)
        for _ in range(3):
            teacher._count({"ink": teaching(logits, kind)})
            teacher.count_labels({"ink": labels, "ink_mask": torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool)})
        return teacher

    torch.manual_seed(0)
    flat = torch.full((1, channels, SIDE, SIDE), -4.0)
    flat[:, 0] = 4.0 if kind == "multiclass" else -4.0
    labels = (torch.rand(1, 1 if kind != "multilabel" else 3, SIDE, SIDE) > 0.5).to(torch.int16)

    early = teacher_after(flat, labels)
    early.end_epoch(engine_at(10))
    assert not early.collapsed, "before the ramp-up has ended a network may not know anything yet"
    healthy = teacher_after(torch.randn(1, channels, SIDE, SIDE), labels)
    healthy.end_epoch(engine_at(20))
    assert not healthy.collapsed
    empty = teacher_after(flat, torch.zeros_like(labels))
    empty.end_epoch(engine_at(20))
    assert not empty.collapsed, "labels of one class say nothing of a collapse"

    late = teacher_after(flat, labels)
    with caplog.at_level(logging.WARNING):
        late.end_epoch(engine_at(20))
    assert late.collapsed
    assert "the teacher of ink predicts one class everywhere" in caplog.text
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert late.take({WEAK: flat, STRONG: flat}) is None
    restored = MeanTeacher(SimpleNamespace(average={}), kinds)
    restored.load_state_dict(late.state_dict())
    assert restored.collapsed


def test_training_goes_on_after_a_collapse(caplog):
    network = Net()
    average = WeightAverage(network, 0.5)
    teacher = MeanTeacher(average, {"ink": "binary"}, weight=0.0, ramp_up=0.0, mix=0.0)
    with torch.no_grad():
        network.ink.bias.fill_(-50.0)  # the head says background everywhere, and one epoch does not change it
    engine = trainer(network, teacher, [batch(seed) for seed in range(2)], epochs=2, lr=1e-4, average=average)
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert teacher.collapsed
    assert caplog.text.count("one class everywhere") == 1
    assert "unlabelled" not in engine.state.output["losses"]
    assert engine.state.iteration == 4


def test_counts_of_an_unfinished_epoch_are_restored():
    teacher = MeanTeacher(SimpleNamespace(average={}), {"ink": "binary"})
    teacher._count({"ink": torch.rand(2, 1, SIDE, SIDE)})
    other = MeanTeacher(SimpleNamespace(average={}), {"ink": "binary"})
    other.load_state_dict(teacher.state_dict())
    assert other.state_dict() == teacher.state_dict()


def test_views_are_removed_from_the_targets():
    teacher = MeanTeacher(SimpleNamespace(average={}), KINDS)
    targets = {**batch()}
    weak, strong = targets[WEAK], targets[STRONG]
    taken = teacher.take(targets)
    assert taken is not None
    assert taken[0] is weak
    assert taken[1] is strong
    assert WEAK not in targets
    assert STRONG not in targets
    assert teacher.take(targets) is None


def test_a_loss_of_the_teacher_that_is_not_finite_skips_the_step():
    network = Net()
    average = WeightAverage(network, 0.9)
    teacher = MeanTeacher(average, KINDS, weight=1.0, ramp_up=0.0, mix=0.0)
    data = batch()
    data[STRONG] = data[STRONG] * float("nan")
    before = copy.deepcopy(network.state_dict())
    engine = trainer(network, teacher, [data], average=average)
    engine.run()
    assert not engine.state.output["stepped"]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def _step_of_a_process(rank: int, folder) -> None:
    torch.manual_seed(0)
    network = prepare_network(Net())
    average = SimpleNamespace(
        average={name: value + 0.1 for name, value in unwrap(network).state_dict().items()}
    )
    teacher = MeanTeacher(average, KINDS, weight=3.0, ramp_up=0.0, mix=0.0)
    engine = trainer(network, teacher, [batch(rank)], lr=1.0)
    engine.run()
    torch.save(unwrap(network).state_dict(), folder / f"{rank}.pth")


def test_two_processes_step_like_one_with_both_batches(tmp_path):
    assert in_two_processes(_step_of_a_process, tmp_path) == [0, 0]
    torch.manual_seed(0)
    network = Net()
    average = SimpleNamespace(average={name: value + 0.1 for name, value in network.state_dict().items()})
    teacher = MeanTeacher(average, KINDS, weight=3.0, ramp_up=0.0, mix=0.0)
    both = {key: torch.cat([batch(0)[key], batch(1)[key]]) for key in batch()}
    trainer(network, teacher, [both], lr=1.0).run()
    one, two = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    for name, weight in network.state_dict().items():
        assert torch.equal(one[name], two[name]), name
        assert torch.allclose(one[name], weight, atol=1e-5), name
