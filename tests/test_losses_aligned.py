"""Aligned balancing: what reaches the encoder, against gradients that are combined by hand, and two toys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from volumen.losses.multitask import MultiTaskLoss
from volumen.networks.gradient_gate import GradientGate
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.utils.errors import VolumenError

HEADS = ("label", "distance", "normals")
AUXILIARY = HEADS[1:]


def _network(separate: bool | dict[str, bool] = True, features=(4, 6), **options) -> MultiHeadDynUNet:
    torch.manual_seed(0)
    apart = separate if isinstance(separate, dict) else dict.fromkeys(HEADS, separate)
    heads = {name: {"out_channels": 1, "separate_decoder": apart[name]} for name in HEADS}
    network = MultiHeadDynUNet(2, 2, heads, list(features), [1, 2], n_blocks_per_stage=1, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def _losses(outputs: dict, scale: dict[str, float]) -> dict[str, torch.Tensor]:
    """Squares against fixed random truths; a large scale gives a large gradient."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name in HEADS:
        levels = outputs[name] if isinstance(outputs[name], list) else [outputs[name]]
        truths = [3 * torch.randn(level.shape, generator=generator) for level in levels]
        found[name] = scale[name] * sum((a - b).square().mean() for a, b in zip(levels, truths))
    return found


def _image(seed: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def _gradients(network: MultiHeadDynUNet, scale: dict[str, float], factor: float = 1.0) -> dict:
    network.zero_grad()
    (factor * sum(_losses(network(_image()), scale).values())).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def _combined(method: str, main: list, auxiliary: list[list], level: int) -> list[torch.Tensor]:
    """Combine lists of gradients by levels with explicit formulas, in float64."""
    total = [g.double().clone() for g in main]
    p = main[level].double().flatten()
    for gradients in auxiliary:
        a = gradients[level].double().flatten()
        dot, along, factor = float(p @ a), 0.0, 1.0
        if method == "cosine":
            factor = max(0.0, dot / float(p.norm() * a.norm()))
        else:
            along = max(0.0, -dot / float(p @ p))
            left = a + along * p
            factor = min(1.0, float(p.norm() / left.norm()))
        for i, g in enumerate(gradients):
            total[i] += factor * (g.double() + along * main[i].double())
    return total


SCALES = [
    {"label": 1.0, "distance": 50.0, "normals": 0.02},
    {"label": 1.0, "distance": -1.0, "normals": -30.0},
]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["projection", "cosine"])
def test_the_encoder_receives_the_combination_and_decoders_their_whole_gradient(method, scale, deep):
    network = _network(deep_supervision=deep)
    plain = _gradients(network, scale)
    skips = network.encoder(_image())
    leaves = [skip.detach().requires_grad_() for skip in skips]
    outputs = {}
    for name in HEADS:
        decoded, head = network.decoders[f"for_{name}"](leaves), network.heads[f"for_{name}"]
        outputs[name] = head.at_all_levels(decoded) if deep else head(decoded)
    losses = _losses(outputs, scale)
    parts = [list(torch.autograd.grad(losses[name], leaves, retain_graph=True)) for name in HEADS]
    expected = _combined(method, parts[0], parts[1:], level=-1)
    parameters = list(network.encoder.parameters())
    by_hand = torch.autograd.grad(skips, parameters, [g.float() for g in expected])

    network.limit_gradients(AUXILIARY, method)
    found = _gradients(network, scale)
    for (name, _), value in zip(network.encoder.named_parameters(), by_hand, strict=True):
        torch.testing.assert_close(found[f"encoder.{name}"], value, rtol=2e-4, atol=2e-6)
    for name in found:
        if not name.startswith("encoder."):
            torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["projection", "cosine"])
def test_heads_of_a_shared_decoder_meet_at_its_features(method):
    network, scale = _network(separate=False), SCALES[1]
    plain = _gradients(network, scale)
    decoded = network.decoders["shared"](network.encoder(_image()))
    leaf = decoded[0].detach().requires_grad_()
    losses = _losses({name: network.heads[f"for_{name}"]([leaf]) for name in HEADS}, scale)
    parts = [list(torch.autograd.grad(losses[name], [leaf])) for name in HEADS]
    expected = _combined(method, parts[0], parts[1:], level=0)
    body = [*network.encoder.parameters(), *network.decoders.parameters()]
    by_hand = torch.autograd.grad(decoded[0], body, expected[0].float())
    network.limit_gradients(AUXILIARY, method)
    found = _gradients(network, scale)
    names = [name for name in found if not name.startswith("heads.")]
    for name, value in zip(names, by_hand, strict=True):
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6)
    for name in found:
        if name.startswith("heads."):
            torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-7)


def test_a_decoder_that_serves_a_label_counts_as_the_label_s():
    network = _network({"label": False, "distance": False, "normals": True})
    network.limit_gradients(AUXILIARY, "projection")
    _gradients(network, SCALES[0])
    assert set(network._gate.cosines) == set(AUXILIARY)


@pytest.mark.parametrize("separate", [True, False])
def test_targets_that_agree_train_as_with_fixed_weights(separate):
    network = _network(separate)
    with torch.no_grad():
        for name in HEADS[1:]:  # the same decoder and head: the same gradient, of half the length
            network.heads[f"for_{name}"].load_state_dict(network.heads["for_label"].state_dict())
            if separate:
                network.decoders[f"for_{name}"].load_state_dict(network.decoders["for_label"].state_dict())

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        outputs = network(_image())
        sum(w * outputs[n].square().mean() for n, w in zip(HEADS, (1, 0.5, 0.5))).backward()
        return [p.grad.clone() for p in network.encoder.parameters()]

    plain = gradients()
    network.limit_gradients(AUXILIARY, "projection")
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for name in AUXILIARY:
        assert network._gate.cosines[name].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["projection", "cosine"])
def test_the_scale_of_a_gradient_scaler_changes_nothing(method):
    network = _network()
    network.limit_gradients(AUXILIARY, method)
    plain, scaled = (_gradients(network, SCALES[1], factor) for factor in (1.0, 2.0**16))
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name] / 2.0**16, value, rtol=1e-4, atol=1e-6)


def test_mixed_precision_compares_in_float32():
    gate = GradientGate(["b"])
    p, a = torch.full((4096,), 300.0, dtype=torch.float16), torch.full((4096,), -600.0, dtype=torch.float16)
    factors, cosines = gate.factors([False, True], [p, a])  # squares overflow float16
    assert cosines.tolist() == pytest.approx([1, -1])
    # All of a opposes p: what is left of it is nothing.
    assert torch.isfinite(factors).all()
    assert (factors[0] * p + factors[1] * a).float().tolist() == pytest.approx(p.tolist(), rel=1e-3)
    network = _network()
    network.limit_gradients(AUXILIARY, "projection")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = network(_image())
    sum(_losses({n: o.float() for n, o in outputs.items()}, SCALES[1]).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("method", ["projection", "cosine"])
def test_an_overflow_reaches_the_scaler(method):
    factors, cosines = GradientGate(["b"], method).factors(
        [False, True], [torch.ones(8), torch.tensor([torch.inf] * 8)]
    )
    assert factors.tolist() == [1, 1]
    assert cosines.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["projection", "cosine"])
def test_without_a_label_s_gradient_auxiliary_targets_do_not_move_the_encoder(method):
    network = _network()
    network.limit_gradients(AUXILIARY, method)
    network(_image())
    found = _gradients(network, {"label": 0.0, "distance": 1.0, "normals": 1.0})
    assert all(not value.any() for name, value in found.items() if name.startswith("encoder."))
    assert found["heads.for_distance.finest.weight"].any()


def test_accumulated_batches_add_what_each_of_them_gives_alone():
    network = _network()
    network.limit_gradients(AUXILIARY, "projection")

    def backward(seed: int) -> None:
        sum(_losses(network(_image(seed)), SCALES[1]).values()).backward()

    alone = []
    for seed in (3, 4):
        network.zero_grad()
        backward(seed)
        alone.append([p.grad.clone() for p in network.parameters()])
    network.zero_grad()
    backward(3)
    backward(4)
    for p, *parts in zip(network.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, sum(parts), rtol=1e-5, atol=1e-6)


def test_evaluation_and_the_forward_pass_do_not_change():
    network = _network()
    before = network(_image()), network.eval()(_image())
    network.limit_gradients(AUXILIARY, "projection")
    after = network.train()(_image()), network.eval()(_image())
    for a, b in zip(before, after, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in HEADS)


TARGETS = {
    "label": {"kind": "binary", "losses": ["BCEWithLogitsLoss"], "out_channels": 1},
    "value": {
        "kind": "field",
        "losses": ["MSELoss"],
        "out_channels": 1,
        "source_target": "label",
        "weight": 10.0,
    },
}


def _two_heads(seed: int, features: tuple[int, ...]) -> MultiHeadDynUNet:
    torch.manual_seed(seed)
    heads = {name: {"out_channels": 1, "separate_decoder": True} for name in TARGETS}
    return MultiHeadDynUNet(2, 2, heads, list(features), [1, 2], n_blocks_per_stage=1)


def _smooth(n: int, generator: torch.Generator) -> torch.Tensor:
    return 3 * F.avg_pool2d(torch.randn(n, 2, 16, 16, generator=generator), 3, 1, 1)


def _train(balancing: str, network: MultiHeadDynUNet, batches, steps: int, weight: float) -> None:
    """Train on batches (image, label, value, label's mask); "alone" leaves the value out."""
    targets = {"label": TARGETS["label"], "value": {**TARGETS["value"], "weight": weight}}
    alone = balancing == "alone"
    loss = MultiTaskLoss(
        {"label": targets["label"]} if alone else targets,
        balancing="fixed" if alone else balancing,
        network=network,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)
    for step in range(steps):
        image, label, value, mask = batches(step)
        total = loss(network(image), {"label": label, "value": value, "label_mask": mask})
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()


def _error(network: MultiHeadDynUNet, image: torch.Tensor, label: torch.Tensor) -> float:
    with torch.no_grad():
        return ((network.eval()(image)["label"] > 0) != label.bool()).float().mean().item()


def _errors(balancings: tuple[str, ...], features: tuple[int, ...], weight: float, make) -> dict[str, float]:
    """Return the mean error of the label over two seeds; `make()` gives batches, a test image and its label."""
    errors = {}
    for balancing in balancings:
        found = []
        for seed in (0, 1):
            batches, steps, image, label = make()
            network = _two_heads(seed, features)
            _train(balancing, network, batches, steps, weight)
            found.append(_error(network, image, label))
        errors[balancing] = sum(found) / len(found)
    return errors


def test_a_target_that_harms_does_not_harm_when_aligned():
    def make() -> tuple:
        generator = torch.Generator().manual_seed(1)

        def batch(_: int) -> tuple:
            # The label depends on one channel, the value on the other; two features do not hold both.
            x = _smooth(4, generator)
            return x, (x[:, :1] > 0).float(), 10 * torch.sin(3 * x[:, 1:]), torch.ones(4, 1, 16, 16).bool()

        test = _smooth(64, torch.Generator().manual_seed(2))
        return batch, 120, test, test[:, :1] > 0

    errors = _errors(("alone", "fixed", "aligned"), (2, 2), 10.0, make)
    assert errors["fixed"] > errors["alone"] + 0.1, errors
    assert abs(errors["aligned"] - errors["alone"]) < 0.025, errors


def test_a_target_that_helps_still_helps_when_aligned():
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None] / 1.5

    def value_of(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x.sum(dim=1, keepdim=True), (1, 1, 1, 1)), kernel)

    def make() -> tuple:
        generator = torch.Generator().manual_seed(1)
        train, test = (torch.randn(n, 2, 16, 16, generator=generator) for n in (4, 64))
        known = torch.rand(4, 1, 16, 16, generator=generator) < 0.02  # the label is known at few voxels
        value = value_of(train)
        return lambda _: (train, (value > 0).float(), value, known), 100, test, value_of(test) > 0

    errors = _errors(("alone", "aligned"), (8, 8), 1.0, make)
    assert errors["aligned"] < errors["alone"] - 0.01, errors


def test_the_cosines_are_logged_and_stored():
    network = _two_heads(0, (4, 4))
    loss = MultiTaskLoss(TARGETS, balancing="aligned", network=network)
    image = _image(batch=2)
    batch = {"label": (image[:, :1] > 0).float(), "value": image[:, 1:]}
    for _ in range(2):
        loss(network(image), batch).backward()
    cosine = loss.components["value/cosine"].item()
    assert -1 <= cosine <= 1
    assert cosine != 0
    assert "label/cosine" not in loss.components
    again = MultiTaskLoss(TARGETS, balancing="aligned", network=_two_heads(0, (4, 4)))
    again.load_state_dict(loss.state_dict())
    again(network(image), batch)
    assert again.components["value/cosine"].item() == cosine


def test_a_network_that_cannot_limit_gradients_is_refused():
    with pytest.raises(VolumenError, match=r"limit_gradients.*found Conv2d"):
        MultiTaskLoss(TARGETS, balancing="aligned", network=torch.nn.Conv2d(1, 1, 1))
    loss = MultiTaskLoss(TARGETS, balancing="aligned")
    outputs = {name: torch.zeros(1, 1, 4, 4, requires_grad=True) for name in TARGETS}
    with pytest.raises(VolumenError, match="aligned was given no network"):
        loss(outputs, {name: torch.zeros(1, 1, 4, 4) for name in TARGETS})


@pytest.mark.parametrize("kwargs", [{"method": "magic"}, {"alpha": 1}])
def test_wrong_arguments_are_refused(kwargs):
    with pytest.raises(VolumenError, match=r"balancing_kwargs"):
        MultiTaskLoss(TARGETS, balancing="aligned", balancing_kwargs=kwargs)
