"""Balancing on toy problems with a known solution."""

from __future__ import annotations

import math

import pytest
import torch

from volumen.losses.balancing import GradNormBalancing, UncertaintyBalancing, build_balancing
from volumen.losses.multitask import MultiTaskLoss
from volumen.utils.errors import VolumenError

KINDS = {"label": "binary", "field": "field"}
WEIGHTS = {"label": 1.0, "field": 1.0}


def test_uncertainty_finds_the_variance_of_each_loss():
    balancing = UncertaintyBalancing(KINDS, WEIGHTS)
    optimizer = torch.optim.Adam(balancing.parameters(), lr=0.05)
    values = {"label": torch.tensor(0.01), "field": torch.tensor(40.0)}
    for _ in range(800):
        optimizer.zero_grad()
        balancing(values, {})[0].backward()
        optimizer.step()
    found = [s.exp().item() for s in balancing.log_variances]
    assert found == pytest.approx([2 * 0.01, 40.0], rel=0.02)
    factors = balancing(values, {})[1]
    assert (factors["label"] * 0.01).item() == pytest.approx(0.5, rel=0.02)
    assert (factors["field"] * 40.0).item() == pytest.approx(0.5, rel=0.02)


def test_uncertainty_of_gaussian_noise_is_its_variance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, generator=generator)
    truth = {"a": 2 * x + 0.1 * torch.randn(x.shape, generator=generator)}
    truth["b"] = -x + 3.0 * torch.randn(x.shape, generator=generator)
    slopes = {name: torch.nn.Parameter(torch.zeros(())) for name in truth}
    loss = MultiTaskLoss(
        {n: {"kind": "field", "losses": [{"name": "MSELoss"}]} for n in truth}, balancing="uncertainty"
    )
    optimizer = torch.optim.Adam([*slopes.values(), *loss.parameters()], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss({n: s * x for n, s in slopes.items()}, truth).backward()
        optimizer.step()
    sigma = [math.exp(0.5 * s.item()) for s in loss.balancing.log_variances]
    assert sigma == pytest.approx([0.1, 3.0], rel=0.05)
    assert [s.item() for s in slopes.values()] == pytest.approx([2.0, -1.0], abs=0.1)


def _toy(scales: dict[str, float], **kwargs) -> tuple[MultiTaskLoss, torch.nn.Linear, dict, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.nn.Linear(4, 2)
    x = torch.randn(64, 4)
    loss = MultiTaskLoss(
        {n: {"kind": "field", "losses": [{"name": "MSELoss", "weight": s}]} for n, s in scales.items()},
        balancing="gradnorm",
        balancing_kwargs=kwargs,
        shared_parameters=shared.parameters(),
    )
    truth = {n: torch.randn(64, 1, 1, 1) for n in scales}
    return loss, shared, truth, x


def _outputs(shared: torch.nn.Linear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = shared(x)
    return {"a": y[:, 0].view(-1, 1, 1, 1), "b": y[:, 1].view(-1, 1, 1, 1)}


def test_gradnorm_equalises_gradients_of_losses_at_unequal_scales():
    loss, shared, truth, x = _toy({"a": 1000.0, "b": 0.01}, alpha=0.0, momentum=0.0)
    total = loss(_outputs(shared, x), truth)
    norms = []
    for row in torch.autograd.grad(total, shared.weight)[0]:
        norms.append(row.norm().item())
    bias_free = norms[0] / norms[1]
    factors = [loss.components[f"{n}/weight"].item() for n in ("a", "b")]
    assert sum(factors) == pytest.approx(2.0, rel=1e-5)
    # Each target drives one row: the weighted gradients are equal except for the part of the bias.
    assert 0.5 < bias_free < 2
    values = {"a": 1000.0, "b": 0.01}
    raw = {}
    for name, out in _outputs(shared, x).items():
        value = values[name] * ((out - truth[name]) ** 2).mean()
        raw[name] = torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, list(shared.parameters()), retain_graph=True)]
        ).norm()
    assert factors[0] * raw["a"].item() == pytest.approx(factors[1] * raw["b"].item(), rel=1e-3)


def test_gradnorm_favours_the_slower_target():
    balancing = GradNormBalancing({"a": "field", "b": "field"}, {"a": 1.0, "b": 1.0}, alpha=1.0, momentum=0.0)
    parameter = torch.nn.Parameter(torch.ones(()))
    balancing.set_shared_parameters([parameter])
    balancing({"a": parameter * 1.0, "b": parameter * 1.0}, {})
    # "a" has halved since the start and "b" has not changed; both gradients are still equal.
    _, factors = balancing({"a": parameter - 0.5, "b": parameter * 1.0}, {})
    assert factors["b"].item() / factors["a"].item() == pytest.approx(2.0, rel=1e-4)


def test_gradnorm_meets_in_the_middle_where_fixed_weights_serve_the_louder_target():
    goals = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0, 0.0])}
    scales, final = {"a": 1.0, "b": 0.01}, {}
    for name, kwargs in (("fixed", {}), ("gradnorm", {"alpha": 0.0})):
        point = torch.nn.Parameter(torch.tensor([0.0, 2.0]))
        balancing = build_balancing(name, {"a": "field", "b": "field"}, {"a": 1.0, "b": 1.0}, kwargs)
        if name == "gradnorm":
            balancing.set_shared_parameters([point])
        optimizer = torch.optim.Adam([point], lr=0.01)
        for _ in range(600):
            optimizer.zero_grad()
            values = {n: s * ((point - goals[n]) ** 2).sum() for n, s in scales.items()}
            balancing(values, {})[0].backward()
            optimizer.step()
        final[name] = point[0].item()
    # Quadratic losses of weights 1 and 0.01 have their minimum at (1 - 0.01) / (1 + 0.01); with equal gradients, at 0.
    assert final["fixed"] == pytest.approx(0.98, abs=0.01)
    assert final["gradnorm"] == pytest.approx(0.0, abs=0.05)


def test_gradnorm_state_is_in_the_checkpoint_and_evaluation_leaves_it_alone():
    loss, shared, truth, x = _toy({"a": 5.0, "b": 1.0})
    loss(_outputs(shared, x), truth)
    other = _toy({"a": 5.0, "b": 1.0})[0]
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.balancing.log_factors, loss.balancing.log_factors)
    before = loss.balancing.log_factors.clone()
    loss.eval()
    loss(_outputs(shared, x), truth)
    with torch.no_grad():
        loss.train()(_outputs(shared, x), truth)
    assert torch.equal(loss.balancing.log_factors, before)


def test_gradnorm_ignores_a_target_that_is_absent():
    loss, shared, truth, x = _toy({"a": 5.0, "b": 1.0}, momentum=0.5)
    loss(_outputs(shared, x), truth)
    before = loss.balancing.log_factors.clone()
    total = loss(_outputs(shared, x), {**truth, "b_mask": torch.zeros(64, 1, 1, 1, dtype=torch.bool)})
    assert torch.isfinite(total)
    torch.testing.assert_close(loss.balancing.log_factors, before)


@pytest.mark.parametrize(("name", "total"), [("fixed", 13.0), ("uncertainty", 7.0), ("gradnorm", 13.0)])
def test_before_anything_is_learned_the_user_s_weights_alone_count(name, total):
    balancing = build_balancing(name, KINDS, {"label": 2.0, "field": 3.0}, {}).eval()
    values = {"label": torch.tensor(0.5), "field": torch.tensor(4.0)}
    assert balancing(values, {})[0].item() == pytest.approx(total)


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty"])
def test_what_is_logged_holds_no_graph(balancing):
    entry = {"kind": "field", "losses": ["MSELoss"]}
    loss = MultiTaskLoss({"a": entry, "b": entry}, balancing=balancing)
    pred = torch.ones(1, 1, 2, 2, requires_grad=True)
    assert loss(
        {"a": pred, "b": pred}, {"a": torch.zeros(1, 1, 2, 2), "b": torch.zeros(1, 1, 2, 2)}
    ).requires_grad
    assert {"a", "b"} < set(loss.components)
    assert not any(value.requires_grad for value in loss.components.values())


def test_gradnorm_without_shared_parameters_is_refused():
    loss = MultiTaskLoss({"a": {"kind": "field", "losses": [{"name": "MSELoss"}]}}, balancing="gradnorm")
    with pytest.raises(VolumenError, match="shared parameters"):
        loss({"a": torch.ones(1, 1, 2, 2, requires_grad=True)}, {"a": torch.zeros(1, 1, 2, 2)})


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("magic", {}, "expected one of fixed, aligned, uncertainty, gradnorm, found magic"),
        ("fixed", {"alpha": 1}, "expected no arguments for fixed, found alpha"),
        ("gradnorm", {"momentum": 2.0}, "momentum"),
    ],
)
def test_wrong_balancing_is_refused(name, kwargs, message):
    with pytest.raises(VolumenError, match=message):
        build_balancing(name, KINDS, WEIGHTS, kwargs)
