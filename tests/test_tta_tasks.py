"""Test-time augmentation of every derived target: the result of a perfect network stays perfect."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import zarr
from prediction import make_predictor, save_checkpoint
from scipy import ndimage
from torch import nn

from volumen.derived import registry as task_registry
from volumen.derived.channel_layout import make_layout
from volumen.derived.derivation import derive_target
from volumen.derived.registry import (
    DerivedTask,
    register_task,
    task_kind,
    task_layout,
    task_out_channels,
    task_types,
)
from volumen.inference.predict import predict
from volumen.inference.predictor import WindowNetwork, load_predictor, read_heads
from volumen.inference.request import PredictRequest
from volumen.inference.windows.heads import Head
from volumen.inference.windows.tta import transforms
from volumen.sharing.metadata import channel_names
from volumen.utils.errors import VolumenError

PATCHES = {2: ((28, 28), (1.0, 1.0)), 3: ((16, 20, 20), (2.0, 1.0, 1.0))}
FAR = {
    2: [[-1, 0], [0, -1], [-3, 0], [0, -3], [2, 2], [2, -2]],
    3: [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, -4, 0], [0, 0, -4], [-2, 1, 1], [-2, 1, -1]],
}


def cases():
    """Return every registered type with its defaults, and affinities with long and oblique offsets."""
    for ndim in (2, 3):
        yield from (pytest.param(name, {}, ndim, id=f"{name}-{ndim}D") for name in task_types())
        yield pytest.param("affinities", {"offsets": FAR[ndim]}, ndim, id=f"far affinities-{ndim}D")


def parameters(name, params):
    short = {"reach": 4.0} if "reach" in task_registry.get_task(name).defaults else {}
    if name == "local_shape_descriptors":
        short = {"sigma": 1.5}
    return {**short, **params}


def instance_labels(shape, seed=3):
    """Return touching instances of many shapes, with some background between them."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.6)
    parts, _ = ndimage.label(noise > 0.02)
    halves = np.indices(shape)[-1] > shape[-1] // 2
    return np.where(parts > 0, 2 * parts + halves, 0)


class Oracle(nn.Module):
    """A network that takes labels as its image and returns the target that is derived from them."""

    def __init__(self, name, params, spacing):
        super().__init__()
        self.name, self.params, self.spacing = name, params, spacing

    def forward(self, x, targets=None):
        return {self.name: torch.stack([torch.from_numpy(self.derive(one.numpy())[0]) for one in x])}

    def derive(self, labels):
        return derive_target(self.name, labels.astype(np.int32), spacing=self.spacing, **self.params)


def one_nearest(labels, spacing):
    """Return where one foreground voxel's body is nearer than all others, by brute force: a tie has no direction."""
    places, inner = np.stack(np.nonzero(labels > 0), 1), (np.array(spacing) - min(spacing)) / 2
    found = np.zeros(labels.shape, bool)
    for place in np.ndindex(labels.shape):
        apart = np.maximum(np.abs(places - np.array(place)) * spacing - inner, 0)
        squared = np.partition((apart**2).sum(1), 1)[:2]
        found[place] = abs(squared[1] - squared[0]) > 1e-6
    return found


def blended(name, params, ndim, tta, layout):
    """Return the blended output of the oracle's windows, the target, and where it is certain: valid and no tie."""
    patch, spacing = PATCHES[ndim]
    labels = instance_labels(patch)
    channels = task_out_channels(name, ndim, params)
    predictor = make_predictor(ndim, patch, {name: (channels, "none", task_kind(name), layout)})
    object.__setattr__(predictor, "network", Oracle(name, params, spacing))
    object.__setattr__(predictor, "spacing", spacing)
    network = WindowNetwork(predictor, predictor.heads(), patch, tta=tta)
    found = network(labels[None, None].astype(np.float32))[0] / network._weights.numpy()
    values, valid = predictor.network.derive(labels[None])
    sure = valid[0].copy()
    if name == "nearest_component":
        sure &= one_nearest(labels, spacing)
    if name == "affinities":
        # Near the border the oracle has no partner, so values whose partner lies there are not known either.
        reach = 2 * np.abs(params.get("offsets", [[1] * ndim])).max(axis=0)
        inner = np.zeros(patch, bool)
        inner[tuple(slice(r, n - r) for r, n in zip(reach, patch))] = True
        sure &= inner
    target = predictor.heads()[0].encode(torch.from_numpy(values)[None])[0].numpy()
    return found, target, sure


@pytest.mark.parametrize("tta", ["mirror", "rotate"])
@pytest.mark.parametrize(("name", "params", "ndim"), cases())
def test_a_perfect_network_stays_perfect(name, params, ndim, tta):
    params = parameters(name, params)
    found, target, sure = blended(name, params, ndim, tta, task_layout(name, ndim, params))
    assert sure.sum() > 100
    np.testing.assert_allclose(found[:, sure], target[:, sure], atol=2e-4)


@pytest.mark.parametrize("name", ["nearest_component", "local_shape_descriptors", "affinities"])
def test_the_check_sees_channels_that_are_not_turned(name):
    params = parameters(name, {"offsets": FAR[3]} if name == "affinities" else {})
    channels = task_out_channels(name, 3, params)
    found, target, sure = blended(name, params, 3, "mirror", make_layout(["scalars"], 3, channels))
    assert (np.abs(found - target)[:, sure] > 0.1).mean() > 0.02


@pytest.mark.parametrize("tta", ["mirror", "rotate"])
def test_what_no_turned_window_knows_is_left_out_of_the_mean(tta):
    """The average of a network that always predicts 1 is 1, also at the border and for offsets without counterpart."""

    class One(nn.Module):
        def forward(self, x, targets=None):
            return {"near": torch.ones(len(x), 4, *x.shape[2:]), "class": torch.ones(len(x), 1, *x.shape[2:])}

    offsets = [[-1, 0], [0, -3], [2, 1], [9, 0]]
    heads = {
        "near": (4, "none", "multilabel", make_layout(["offsets"], 2, 4, offsets)),
        "class": (1, "none", "binary"),
    }
    predictor = make_predictor(2, (8, 8), heads)
    object.__setattr__(predictor, "network", One())
    network = WindowNetwork(predictor, predictor.heads(), (8, 8), tta=tta)
    found = network(np.zeros((1, 1, 8, 8), np.float32))[0] / network._weights.numpy()
    np.testing.assert_allclose(found, 1, atol=1e-5)


def test_a_mirrored_affinity_is_read_at_its_partner():
    """Computed by hand: after mirroring x, the pair (p, p - 3) is stored at its other end."""
    turn = next(t for t in transforms("mirror", (1, 8)) if t.flips == (False, True))
    layout = make_layout(["offsets"], 2, 1, [[0, -3]])
    pairs = torch.arange(8.0)  # the affinity of (p, p - 3) has the value p
    mirrored = torch.zeros(8)
    for x in range(3, 8):
        mirrored[7 - (x - 3)] = pairs[x]  # in the mirrored row the partner has the smaller index
    undone = turn.undo_components(mirrored.reshape(1, 1, 1, 8), layout)[0, 0, 0]
    known = turn.known(layout, (1, 8))[0, 0]
    assert known.tolist() == [False] * 3 + [True] * 5
    assert undone[known].tolist() == pairs[3:].tolist()


def test_heads_of_a_checkpoint_know_how_they_turn(tmp_path):
    predictor = load_predictor(save_checkpoint(tmp_path / "m.pth"))
    assert {name: [part.kind for part in head.layout] for name, head in predictor.targets.items()} == {
        "ink": ["scalars"],
        "tissue": ["scalars"],
        "normals": ["vector"],
    }


@pytest.fixture
def clean_registry(monkeypatch):
    task_types()
    monkeypatch.setattr(task_registry, "_TASKS", dict(task_registry._TASKS))


@pytest.mark.parametrize("kind", ["field", "distance", "binary", "multilabel"])
def test_a_type_that_does_not_say_it_is_refused_with_augmentation_only(clean_registry, kind):
    register_task(type("Rays", (DerivedTask,), {"type_name": "rays", "kind": kind}))
    config = {"auxiliary_tasks": {"far": {"type": "rays", "source_target": "a"}}}
    heads = read_heads({"far": {"out_channels": 1}}, config, 3)
    assert heads["far"].layout is None
    predictor = make_predictor(2, (8, 8), {"far": (1, "none", kind, None), "ink": (1, "sigmoid", "binary")})
    WindowNetwork(predictor, predictor.heads(), (8, 8))
    WindowNetwork(predictor, predictor.heads(["ink"]), (8, 8), tta="mirror")
    with pytest.raises(
        VolumenError, match=re.escape("target far: does not say how its channels turn")
    ) as error:
        WindowNetwork(predictor, predictor.heads(), (8, 8), tta="mirror")
    assert "\n" not in str(error.value)
    assert "--tta none" in str(error.value)


def test_a_prediction_is_refused_before_anything_is_written(clean_registry, tmp_path):
    register_task(
        type("Rays", (DerivedTask,), {"type_name": "rays", "kind": "field", "out_channels": lambda *_: 3})
    )
    path = save_checkpoint(tmp_path / "m.pth")
    state = torch.load(path, weights_only=True)
    state["config"]["auxiliary_tasks"]["normals"]["type"] = "rays"
    torch.save(state, path)
    zarr.save_array(str(tmp_path / "a.zarr"), np.random.default_rng(0).integers(0, 255, (9, 9, 9), np.uint8))
    request = PredictRequest(str(tmp_path / "a.zarr"), str(path), str(tmp_path / "out.zarr"), amp="off")
    with pytest.raises(
        VolumenError, match=r"target normals: does not say .* \(tta: mirror\); predict with --tta none"
    ):
        predict(replace(request, tta="mirror"))
    assert not (tmp_path / "out.zarr").exists()
    predict(replace(request, tta="mirror", targets=("ink", "tissue")))
    predict(replace(request, output=str(tmp_path / "plain.zarr")))


def test_a_type_says_it_in_one_line(clean_registry):
    @register_task
    class Pair(DerivedTask):
        type_name = "pair"
        turns = ("axis", "scalars")
        defaults: ClassVar = {"width": 2}

        def out_channels(self, ndim, params):
            return ndim + params["width"]

    layout = task_layout("pair", 3, {})
    assert [(part.kind, part.channels) for part in layout] == [("axis", 3), ("scalars", 2)]
    with pytest.raises(VolumenError, match=r"task type pair: turns: parts .* do not make 2 channels in 2D"):
        task_layout("pair", 2, {"width": 0})
    for wrong in ("vector", ("vectr",)):
        with pytest.raises(ValueError, match="turns must be a tuple of names among"):
            register_task(type("Wrong", (DerivedTask,), {"type_name": "wrong", "turns": wrong}))


@pytest.mark.parametrize("parts", [[], ["scalars", "scalars"], ["vector"], ["vector", "tensor"], ["vec"]])
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ValueError, match="parts"):
        make_layout(parts, 3, 4)


def test_a_vector_of_another_number_of_channels_says_nothing(clean_registry):
    register_task(type("Odd", (DerivedTask,), {"type_name": "odd", "kind": "vector"}))
    assert task_layout("odd", 3, {}) is None


def test_channels_are_named_by_their_layout():
    layout = make_layout(["vector", "tensor", "scalars"], 2, 6)
    head = Head("shape", 6, "none", "field", layout)
    assert channel_names(head, {}) == ["x component", "y component", "yy", "yx", "xx", "value"]
    near = Head("near", 2, "sigmoid", "multilabel", make_layout(["offsets"], 2, 2, [[-1, 0], [0, -9]]))
    assert channel_names(near, {})[1] == "logit of voxel and the one at (0, -9)"
