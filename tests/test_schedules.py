"""Learning-rate schedules and optimizers by name."""

from __future__ import annotations

import warnings

import pytest
import torch

from volumen.engines.optimizers import build_optimizer
from volumen.engines.schedules import build_scheduler
from volumen.utils.errors import VolumenError


def optimizer(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def curve(scheduler, steps: int) -> list[float]:
    """Return the learning rate before each step."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
        ("CosineAnnealingLR", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
        ("poly", lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 20, power=0.9)),
        ("constant", lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1)),
        (None, lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1)),
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-12, 20)),
    ],
)
def test_schedules_are_torchs(name, reference):
    ours, theirs = build_scheduler(name, optimizer(), 20), reference(optimizer())
    assert curve(ours, 20) == pytest.approx(curve(theirs, 20), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        (
            "cosine",
            {"eta_min": 0.3},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.03),
        ),
        ("poly", {"power": 2.5}, lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 20, power=2.5)),
        ("linear", {"end": 0.25}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, 20)),
    ],
)
def test_options_are_torchs(name, options, reference):
    ours, theirs = build_scheduler(name, optimizer(), 20, options=options), reference(optimizer())
    assert curve(ours, 20) == pytest.approx(curve(theirs, 20))


@pytest.mark.parametrize("options", [{}, {"pct_start": 0.6, "div_factor": 4.0, "final_div_factor": 20.0}])
def test_onecycle_is_torchs(options):
    ours = curve(build_scheduler("OneCycleLR", optimizer(), 20, options=options), 20)
    momentum = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    theirs = curve(torch.optim.lr_scheduler.OneCycleLR(momentum, 0.1, 4000, **options), 4000)
    # Compare the same curve at every 200th step; torch counts from 0 to total - 1.
    assert ours == pytest.approx(theirs[::200], rel=0.02, abs=1e-4)
    assert max(ours) == pytest.approx(0.1)
    last = build_scheduler("onecycle", optimizer(), 20, options=options).factor(20) * 0.1
    assert last == pytest.approx(theirs[-1])


def test_warmup_rises_and_hands_over():
    rates = curve(build_scheduler("cosine", optimizer(), 10, warmup=4), 10)
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert curve(build_scheduler("warmup_cosine", optimizer(), 40), 3) == pytest.approx(
        [0.1 / 3, 0.2 / 3, 0.1]
    )


@pytest.mark.parametrize("name", ["cosine", "poly", "onecycle"])
def test_a_resumed_schedule_is_on_the_new_curve_and_never_complex(name):
    old = build_scheduler(name, optimizer(), 5)
    curve(old, 5)
    new = build_scheduler(name, optimizer(), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(old.state_dict())
        resumed = curve(new, 7)
    assert resumed == pytest.approx(curve(build_scheduler(name, optimizer(), 12), 12)[5:])
    shorter = build_scheduler(name, optimizer(), 3)
    shorter.load_state_dict(old.state_dict())
    assert all(isinstance(rate, float) and rate >= 0 for rate in curve(shorter, 3))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosin", {}, r"tr_config\.scheduler: .*found 'cosin'; did you mean cosine"),
        ("cosine", {"T_max": 3}, r"tr_config\.scheduler_kwargs: cosine takes no 'T_max', expected eta_min"),
        ("cosine", {"warmup": 20}, r"tr_config\.warmup_epochs: expected fewer than 20, the length"),
        ("poly", {"pwer": 2}, r"scheduler_kwargs: poly takes no 'pwer', expected power; did you mean power"),
        ("constant", {"power": 2}, r"scheduler_kwargs: constant takes no 'power', expected nothing"),
        ("poly", {"power": "steep"}, r"scheduler_kwargs\.power: expected a number, found 'steep'"),
    ],
)
def test_wrong_schedules_are_refused(name, kwargs, message):
    options = {key: value for key, value in kwargs.items() if key != "warmup"}
    with pytest.raises(VolumenError, match=message):
        build_scheduler(name, optimizer(), 20, warmup=kwargs.get("warmup", 0), options=options)


@pytest.mark.parametrize("name", ["AdamW", "adamw", "RAdam", "NAdam", "RMSprop", "Adagrad"])
def test_optimizers_by_name(name):
    network = torch.nn.Linear(2, 2)
    made = build_optimizer(name, network, lr=0.01, weight_decay=0.1)
    assert type(made).__name__.lower() == name.lower()
    assert made.param_groups[0]["weight_decay"] == 0.1
    before = network.weight.clone()
    network(torch.ones(1, 2)).sum().backward()
    made.step()
    assert not torch.equal(before, network.weight)


def test_norm_and_bias_may_go_without_decay():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.InstanceNorm2d(2, affine=True))
    made = build_optimizer("AdamW", network, lr=0.01, weight_decay=0.1, decay_norm_and_bias=False)
    assert [(len(group["params"]), group["weight_decay"]) for group in made.param_groups] == [
        (1, 0.1),
        (3, 0.0),
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LBFGS", {}, r"tr_config\.optimizer: expected an optimizer of torch.optim .*found 'LBFGS'"),
        ("AdamV", {}, r"tr_config\.optimizer: .*found 'AdamV'; did you mean Adam"),
        (
            "SGD",
            {"nestrov": True},
            r"tr_config\.optimizer_kwargs: SGD takes no 'nestrov', expected momentum.*nesterov",
        ),
        ("SGD", {"lr": 0.1}, r"tr_config\.optimizer_kwargs\.lr: is not set here; set tr_config\.initial_lr"),
        ("SGD", {"nesterov": True}, r"SGD refuses its arguments: Nesterov momentum requires"),
    ],
)
def test_wrong_optimizers_are_refused(name, options, message):
    with pytest.raises(VolumenError, match=message):
        build_optimizer(name, torch.nn.Linear(1, 1), lr=0.1, options=options)
