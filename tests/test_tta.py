"""Test-time augmentation: transforms undo themselves, vectors and tensors turn back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prediction import RandomHeads, make_predictor
from torch import nn

from volumen.derived.channel_layout import make_layout
from volumen.inference.predictor import WindowNetwork
from volumen.inference.windows.heads import Head, outer, principal_axis, unit
from volumen.inference.windows.tta import transforms


@pytest.mark.parametrize(
    ("ndim", "mode", "count"), [(2, "mirror", 4), (3, "mirror", 8), (2, "rotate", 8), (3, "rotate", 48)]
)
def test_transforms_are_different_and_undo_themselves(ndim, mode, count):
    patch = (4,) * ndim
    window = torch.randn(2, 3, *patch)
    turns = transforms(mode, patch)
    assert len(turns) == count
    assert len({turn.apply(window).numpy().tobytes() for turn in turns}) == count
    for turn in turns:
        torch.testing.assert_close(turn.undo(turn.apply(window)), window)
    torch.testing.assert_close(turns[0].apply(window), window)


def test_rotations_keep_to_planes_of_equal_size_and_spacing():
    assert len(transforms("rotate", (4, 8, 8))) == 16
    assert len(transforms("rotate", (8, 8, 8), (5.0, 1.0, 1.0))) == 16
    assert {turn.order[0] for turn in transforms("rotate", (8, 8, 8), (5.0, 1.0, 1.0))} == {0}
    with pytest.raises(ValueError, match="tta must be one of"):
        transforms("shear", (4, 4))


class Derivatives(nn.Module):
    """Equivariant heads: gradient (x, y[, z]), its outer product (zz, zy, ...), its axis, and the image."""

    def __init__(self, ndim):
        super().__init__()
        self.ndim = ndim

    def forward(self, x, targets=None):
        image = x[:, 0]
        parts = [
            (torch.roll(image, -1, axis) - torch.roll(image, 1, axis)) / 2 for axis in range(1, self.ndim + 1)
        ]
        gradient = torch.stack(parts[::-1], dim=1)
        by_axis = torch.stack(parts, dim=1)
        return {"value": x, "normals": gradient, "axis": gradient, "tensor": outer(by_axis)}


@pytest.mark.parametrize("ndim", [2, 3])
def test_outputs_of_an_equivariant_network_are_the_same_with_augmentation(ndim):
    patch = (6,) * ndim
    heads = {
        "value": (1, "none", "field", make_layout(["scalars"], ndim, 1)),
        "normals": (ndim, "none", "vector"),
        "axis": (ndim, "none", "axis"),
        "tensor": (ndim * (ndim + 1) // 2, "none", "tensor"),
    }
    predictor = make_predictor(ndim, patch, heads)
    object.__setattr__(predictor, "network", Derivatives(ndim))
    windows = np.random.default_rng(0).normal(size=(2, 1, *patch)).astype(np.float32)
    plain = WindowNetwork(predictor, predictor.heads(), patch)(windows)
    turned = WindowNetwork(predictor, predictor.heads(), patch, tta="rotate")(windows)
    np.testing.assert_allclose(turned, plain, atol=1e-5)


def test_augmentation_is_the_mean_over_the_turned_windows():
    predictor = make_predictor(2, (8, 8))
    window = torch.randn(1, 1, 8, 8)
    network: RandomHeads = predictor.network
    with torch.no_grad():
        outputs = [network(window.flip(dims))["ink"].flip(dims) for dims in ([], [2], [3], [2, 3])]
    expected = torch.stack(outputs).mean(0)
    weighted = WindowNetwork(predictor, predictor.heads(), (8, 8), tta="mirror")(window.numpy())
    plain = WindowNetwork(predictor, predictor.heads(), (8, 8))
    np.testing.assert_allclose(weighted, (expected * plain._weights).numpy(), atol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_the_principal_axis_of_equal_directions_is_the_direction(n):
    directions = unit(torch.randn(1, n, 500), dim=1)
    found = principal_axis(outer(directions)[0], n)
    np.testing.assert_allclose((found * directions[0]).sum(0).abs().numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(found.norm(dim=0).numpy(), 1, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_the_principal_axis_is_the_first_eigenvector(n):
    torch.manual_seed(0)
    vectors = unit(torch.randn(5, n, 400), dim=1)
    vectors[:, 0] += 1.0
    products = outer(unit(vectors, dim=1)).mean(0)
    rows, columns = np.triu_indices(n)
    full = np.zeros((400, n, n))
    full[:, rows, columns] = full[:, columns, rows] = products.numpy().T
    values, eigenvectors = np.linalg.eigh(full)
    clear = values[:, -2] < 0.99 * values[:, -1]
    found = principal_axis(products, n).numpy().T
    cosine = np.abs((found * eigenvectors[:, :, -1]).sum(1))
    assert clear.sum() > 300
    np.testing.assert_allclose(cosine[clear], 1, atol=1e-6)


def test_opposite_directions_do_not_cancel_and_nothing_stays_nothing():
    head = Head("axis", 2, "none", "axis")
    pair = torch.tensor([[1.0, -1.0], [0.0, 0.0]]).reshape(1, 2, 2)
    blended = head.encode(pair).mean(dim=-1)[0]
    np.testing.assert_allclose(head.decode(blended[:, None]).numpy()[:, 0], [1, 0], atol=1e-6)
    assert not head.decode(torch.zeros(3, 4)).any()
