"""The learning rate of a training that starts from a pretrained encoder."""

from __future__ import annotations

import pytest
import torch
from test_schedules import curve

from volumen.engines.finetune_schedule import FinetuneSchedule, build_training_schedule
from volumen.engines.optimizers import build_optimizer
from volumen.engines.schedules import poly


class Net(torch.nn.Module):
    """An encoder and a decoder of one weight each, and a bias in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(3, 3)
        self.decoder = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.decoder(torch.relu(self.encoder(x)))


def optimizer_of(net, **options):
    return build_optimizer(
        "AdamW", net, lr=0.1, weight_decay=0.1, encoder=net.encoder.parameters(), **options
    )


def both(schedule, steps) -> list[tuple[float, float]]:
    """Return the rates of decoder and encoder before each step."""
    rates = []
    for _ in range(steps):
        rates.append(tuple(group["lr"] for group in schedule.optimizer.param_groups[:2]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def nnssl(epoch: int, total: int, each: int, rate: float) -> tuple[float, float]:
    """Return what nnssl's sawtooth gives decoder and encoder: 50 and 50 epochs of 1000, 15 and 15 of 150."""
    rise = each // 2
    if epoch < rise:
        return rate / rise * (epoch + 1), 0.0
    if epoch < each:
        return rate * (1 - (epoch - rise) / (each - rise)) ** 0.9, 0.0
    if epoch < 2 * each:
        up = rate / (each + 1) * (epoch - each + 1)
        return up, up
    down = rate * (1 - (epoch - 2 * each) / (total - 2 * each)) ** 0.9
    return down, down


@pytest.mark.parametrize(("total", "share"), [(100, 0.1), (60, 0.2), (40, 0.05)])
def test_sawtooth_is_nnssls(total, share):
    schedule = FinetuneSchedule(optimizer_of(Net()), poly(), total, share=share)
    found = both(schedule, total)
    expected = [nnssl(epoch, total, round(share * total), 0.1) for epoch in range(total)]
    assert found == [pytest.approx(pair) for pair in expected]


def test_the_encoder_stays_as_it_is_while_the_decoders_train_alone():
    net = Net()
    schedule = FinetuneSchedule(optimizer_of(net), poly(), 20, share=0.2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for epoch in range(5):
        changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
        if epoch:
            assert changed == {"decoder.weight", "decoder.bias"}
        net(torch.ones(4, 3)).square().mean().backward()
        schedule.optimizer.step()
        schedule.step()
    assert not torch.equal(net.encoder.weight, before["encoder.weight"])


def test_warmup_alone_rises_and_then_follows_the_schedule():
    schedule = FinetuneSchedule(optimizer_of(Net()), poly(power=1), 12, share=0.25, alone=False)
    rates = [rate for rate, encoder in both(schedule, 12) if rate == encoder]
    assert rates == pytest.approx([0.025, 0.05, 0.075, *(0.1 * (1 - n / 9) for n in range(9))])


@pytest.mark.parametrize("total", [1, 4])
def test_short_runs_have_no_warmup(total):
    schedule = FinetuneSchedule(optimizer_of(Net()), poly(power=1), total, share=0.1)
    assert both(schedule, total) == [pytest.approx((0.1 * (1 - n / total),) * 2) for n in range(total)]
    assert "no warm-up" in schedule.words()


def test_without_finetuning_the_schedule_is_the_plain_one():
    plain, tuned = (
        build_training_schedule("cosine", optimizer_of(Net()), 9, warmup=2, finetune=setting)
        for setting in ("none", "auto")
    )
    assert curve(plain, 9) == curve(tuned, 9)
    assert not isinstance(plain, FinetuneSchedule)


def test_a_resumed_schedule_continues_where_it_was():
    whole = FinetuneSchedule(optimizer_of(Net()), poly(), 20, share=0.2)
    rates = both(whole, 20)
    for done in (2, 5, 11):
        first = FinetuneSchedule(optimizer_of(Net()), poly(), 20, share=0.2)
        both(first, done)
        second = FinetuneSchedule(optimizer_of(Net()), poly(), 20, share=0.2)
        second.load_state_dict(first.state_dict())
        assert both(second, 20 - done) == rates[done:]


@pytest.mark.parametrize("decay", [True, False])
def test_every_parameter_is_in_one_group(decay):
    net = Net()
    optimizer = optimizer_of(net, decay_norm_and_bias=decay)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, net.parameters()))
    encoder = {id(p) for g in optimizer.param_groups if g.get("part") == "encoder" for p in g["params"]}
    assert encoder == set(map(id, net.encoder.parameters()))
    if not decay:
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
