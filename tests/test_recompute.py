"""Feature maps that are computed again in the backward pass: the same gradients from less memory."""

from __future__ import annotations

import pytest
import torch
from data_folders import shells, write_tiff_folder
from test_derive_on_device_run import SECTIONS

from volumen.config.experiment_file import merge
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.networks.placement import prepare_network
from volumen.networks.recompute import recompute_activations
from volumen.run import train_on_folder
from volumen.utils.errors import VolumenError


def make(dims=3, separate=True, **options):
    torch.manual_seed(0)
    heads = {name: {"out_channels": n, "separate_decoder": separate} for name, n in (("a", 1), ("b", 3))}
    strides = [1, 2, 2]
    return MultiHeadDynUNet(dims, 1, heads, [8, 16, 32], strides, deep_supervision=True, **options)


def gradients(network, image):
    """Return gradients by name, and the bytes that the graph stores."""
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(image)
        loss = sum(level.square().mean() for levels in outputs.values() for level in levels)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held = sum(size for place, size in stored.items() if place not in weights)
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}, held


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("options", [{}, {"stochastic_depth_p": 0.3, "dropout_op": 0.2}])
def test_gradients_are_equal_bit_by_bit_and_memory_is_less(dims, separate, options):
    image = torch.rand(2, 1, *[16] * dims)
    plain, all_stored = gradients(make(dims, separate, **options), image)
    network = make(dims, separate, **options)
    names = list(network.state_dict())
    recompute_activations(network)
    assert list(network.state_dict()) == names
    ours, stored = gradients(network, image)
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name
    assert stored < 0.45 * all_stored


def test_prediction_and_evaluation_are_not_touched():
    network, plain = make().eval(), make().eval()
    recompute_activations(network)
    image = torch.rand(1, 1, 16, 16, 16)
    for name, value in plain(image).items():
        assert torch.equal(network(image)[name], value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (torch.nn.Conv3d(1, 1, 1), "a network of residual blocks"),
        (make(norm_op="batch"), "found batch normalisation"),
    ],
)
def test_networks_that_cannot_do_it_are_refused(network, message):
    with pytest.raises(VolumenError, match=message):
        prepare_network(network, activation_checkpointing=True)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_can_be_compiled(backend):
    image = torch.rand(2, 1, 16, 16, 16)
    plain, _ = gradients(make(), image)
    network = make()
    compiled = prepare_network(
        network, compile=True, compile_kwargs={"backend": backend}, activation_checkpointing=True
    )
    ours, _ = gradients(compiled, image)
    for name, value in plain.items():
        torch.testing.assert_close(ours[f"_orig_mod.{name}"], value, rtol=1e-3, atol=1e-5)


def test_a_training_ends_with_the_same_weights(tmp_path):
    data = write_tiff_folder(tmp_path / "data", {"scroll": {"surface": shells((24, 24, 64))}})
    weights = []
    for name, setting in (("plain", False), ("less", True)):
        changes = {"tr_config": {"activation_checkpointing": setting, "max_epoch": 1}}
        run = train_on_folder(data, tmp_path / name, merge(SECTIONS, changes), device="cpu")
        weights.append(torch.load(run / "model_1.pth", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
