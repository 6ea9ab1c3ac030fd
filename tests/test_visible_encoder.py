"""An encoder that sees a part of an image: the rest has no influence, at any level, for any architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.blocks import ChannelSELayer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from volumen.losses.reconstruction import hidden_voxels
from volumen.networks.masked_autoencoder import MaskedAutoencoder
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.networks.recompute import recompute_activations
from volumen.networks.visible_encoder import visible_features
from volumen.utils.errors import VolumenError

# Name -> settings of the network, size of the image, side of a block.
FLAT = {"spatial_dims": 2, "in_channels": 3, "features_per_stage": [4, 8, 8], "strides": [1, 2, 2]}
SOLID = {"spatial_dims": 3, "in_channels": 1, "features_per_stage": [4, 8, 8], "strides": [1, 2, 2]}
THIN = {
    "spatial_dims": 3,
    "in_channels": 2,
    "features_per_stage": [4, 6, 8],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3]],
}
CASES = {
    "2D, three channels": (FLAT, (24, 16), (4, 4)),
    "3D": (SOLID, (12, 8, 16), (4, 4, 4)),
    "anisotropic, two channels": (THIN, (6, 16, 8), (2, 4, 4)),
    "larger blocks": (SOLID, (16, 16, 8), (8, 8, 4)),
    "group norm": ({**FLAT, "norm_op": "group"}, (16, 16), (4, 4)),
    "layer norm": ({**FLAT, "norm_op": "layer"}, (16, 16), (4, 4)),
    "batch norm": ({**FLAT, "norm_op": "batch"}, (16, 16), (4, 4)),
    "no norm": ({**FLAT, "norm_op": None}, (16, 16), (4, 4)),
    "squeeze and excitation": ({**FLAT, "squeeze_excitation": True}, (16, 16), (4, 4)),
    "mean pooling": ({**FLAT, "pool_type": "avg"}, (16, 16), (4, 4)),
    "max pooling": ({**SOLID, "pool_type": "max"}, (8, 8, 8), (4, 4, 4)),
    "gated": ({**FLAT, "nonlin": "SwiGLU"}, (16, 16), (4, 4)),
    "no stem": ({**FLAT, "do_stem": False}, (16, 16), (4, 4)),
    "several blocks": ({**FLAT, "n_blocks_per_stage": [2, 1, 2]}, (16, 16), (4, 4)),
}
ARCHITECTURES = pytest.mark.parametrize(("settings", "size", "block"), CASES.values(), ids=CASES)


def network_of(settings) -> MaskedAutoencoder:
    """Return a network with random weights, also in the normalisations, whose second one in a block starts at 0."""
    torch.manual_seed(1)
    network = MaskedAutoencoder({"n_blocks_per_stage": [1, 1, 1], **settings})
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return network


def batch_of(settings, size, block, share=0.5, seed=2):
    """Return images and which voxels of them are visible; at least one block of each."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, settings["in_channels"], *size, generator=generator)
    grid = [length // side for length, side in zip(size, block)]
    hidden = torch.rand(2, 1, *grid, generator=generator) < share
    hidden.view(2, -1)[:, 0], hidden.view(2, -1)[:, -1] = False, True
    return image, ~hidden_voxels(hidden, block)


@ARCHITECTURES
def test_an_image_without_hidden_voxels_has_the_features_of_the_ordinary_encoder(settings, size, block):
    network = network_of(settings)
    image, _ = batch_of(settings, size, block)
    everything = torch.ones(2, 1, *size, dtype=torch.bool)
    for training in (True, False):
        network.train(training)
        for ours, plain in zip(visible_features(network.encoder, image, everything), network.encoder(image)):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@ARCHITECTURES
def test_hidden_voxels_change_neither_features_nor_prediction(settings, size, block):
    network = network_of(settings).eval()
    image, visible = batch_of(settings, size, block)
    reference = visible_features(network.encoder, image, visible)
    predicted = network(torch.cat((image, visible.float()), 1))["reconstruction"]
    assert predicted.shape == image.shape
    assert torch.isfinite(predicted).all()
    for other in (torch.full_like(image, torch.nan), torch.full_like(image, torch.inf), -7 * image):
        changed = torch.where(visible, image, other)
        assert not torch.equal(changed, image)
        features = visible_features(network.encoder, changed, visible)
        assert all(map(torch.equal, features, reference))
        assert torch.equal(network(torch.cat((changed, visible.float()), 1))["reconstruction"], predicted)


@ARCHITECTURES
def test_visible_voxels_do_change_the_prediction_of_hidden_ones(settings, size, block):
    network = network_of(settings).eval()
    image, visible = batch_of(settings, size, block)
    image.requires_grad_(True)
    predicted = network(torch.cat((image, visible.float()), 1))["reconstruction"]
    predicted.masked_fill(visible, 0.0).square().sum().backward()
    gradient = image.grad.expand_as(visible.expand_as(image))
    assert not gradient.masked_select(~visible).any()
    assert gradient.masked_select(visible).any()


class Reference:
    """The same features by hooks on the ordinary encoder: outputs are multiplied with the mask, statistics indexed."""

    def __init__(self, encoder: nn.Module, visible: torch.Tensor) -> None:
        self.visible = visible.numpy()
        self.handles = []
        for module in encoder.modules():
            if isinstance(module, nn.GroupNorm | _BatchNorm):
                self.handles.append(module.register_forward_hook(self._norm))
            elif isinstance(module, ChannelSELayer):
                self.handles.append(module.register_forward_hook(self._excite))
            elif (
                not list(module.children()) and not isinstance(module, nn.Linear | nn.Sigmoid | nn.ReLU)
            ) or type(module).__name__ == "GatedUnit":
                self.handles.append(module.register_forward_hook(self._mask))

    def mask(self, shape) -> np.ndarray:
        index = [np.arange(length) * (full // length) for length, full in zip(shape, self.visible.shape[2:])]
        return self.visible[:, 0][np.ix_(range(len(self.visible)), *index)]

    def _mask(self, module, inputs, output):
        if output.ndim < 4 or (output.shape[2] == 1 and inputs[0].shape[2] > 8):
            return output
        return output * torch.from_numpy(self.mask(output.shape[2:]))[:, None]

    def _norm(self, module, inputs, output):
        x, mask = inputs[0].double().numpy(), self.mask(inputs[0].shape[2:])
        result = np.zeros_like(x)
        channels = x.shape[1]
        samples = [[n] for n in range(len(x))]
        groups = [[c] for c in range(channels)]
        if isinstance(module, _BatchNorm):
            samples = [list(range(len(x)))]
        else:
            groups = np.array_split(np.arange(channels), module.num_groups)
        for rows in samples:
            for group in groups:
                values = np.concatenate([x[n, c][mask[n]] for n in rows for c in group])
                for n in rows:
                    for c in group:
                        normal = (x[n, c] - values.mean()) / np.sqrt(values.var() + module.eps)
                        scaled = normal * module.weight[c].item() + module.bias[c].item()
                        result[n, c] = np.where(mask[n], scaled, 0)
        return torch.from_numpy(result).to(inputs[0].dtype)

    def _excite(self, module, inputs, output):
        x, mask = inputs[0], self.mask(inputs[0].shape[2:])
        means = torch.stack(
            [torch.stack([c[torch.from_numpy(m)].mean() for c in sample]) for sample, m in zip(x, mask)]
        )
        return x * module.fc(means)[(..., *(None,) * (x.ndim - 2))]


@ARCHITECTURES
def test_features_equal_those_of_a_second_implementation(settings, size, block):
    network = network_of(settings).train()
    image, visible = batch_of(settings, size, block, share=0.6, seed=5)
    found = visible_features(network.encoder, image, visible)
    reference = Reference(network.encoder, visible)
    with torch.no_grad():
        expected = network.encoder(torch.where(visible, image, torch.zeros(())))
    for ours, theirs in zip(found, expected, strict=True):
        mask = torch.from_numpy(reference.mask(ours.shape[2:]))[:, None]
        assert not ours.masked_select(~mask).any()
        torch.testing.assert_close(ours.masked_select(mask), theirs.masked_select(mask), rtol=1e-3, atol=1e-4)


def test_batch_statistics_are_those_of_visible_voxels():
    settings, size, block = CASES["batch norm"]
    network = network_of(settings).train()
    image, visible = batch_of(settings, size, block)
    first = network.encoder.stem[0]
    convolved = first.conv(torch.where(visible, image, torch.zeros(())))
    values = convolved.transpose(0, 1)[:, visible[:, 0]]
    before = first.adn.N.running_mean.clone()
    visible_features(network.encoder, image, visible)
    norm = first.adn.N
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * values.mean(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.var(1), rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 1


def test_the_encoder_is_that_of_the_segmentation_network():
    network = network_of(SOLID)
    heads = {"a": {"out_channels": 2}}
    whole = MultiHeadDynUNet(**{"n_blocks_per_stage": [1, 1, 1], **SOLID}, heads=heads)
    shapes = [
        {name: value.shape for name, value in one.state_dict().items() if name.startswith("encoder.")}
        for one in (network, whole)
    ]
    assert shapes[0] == shapes[1]


def test_synchronised_batch_norm_is_refused():
    with pytest.raises(VolumenError, match="norm_op must be instance, group, layer or batch for pretraining"):
        MaskedAutoencoder.from_config({**SOLID, "norm_op": "syncbatch"})


@pytest.mark.parametrize("name", ["3D", "squeeze and excitation"])
def test_recomputed_features_have_the_same_gradients(name):
    settings, size, block = CASES[name]
    image, visible = batch_of(settings, size, block)
    gradients = []
    for recompute in (False, True):
        network = network_of(settings).train()
        if recompute:
            recompute_activations(network)
        network(torch.cat((image, visible.float()), 1))["reconstruction"].square().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert network.recomputes
    assert all(map(torch.equal, *gradients))
