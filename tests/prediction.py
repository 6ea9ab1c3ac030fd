"""Small networks and an independent reference for the tests of prediction."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn

from volumen.derived.channel_layout import make_layout
from volumen.inference.predictor import Predictor
from volumen.inference.windows.heads import Head
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.transforms.normalize import Normalizer


class RandomHeads(nn.Module):
    """A seeded convolution per head: context of two voxels, so that every window border shows."""

    def __init__(self, ndim: int, in_channels: int, channels: dict[str, int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        conv = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.heads = nn.ModuleDict({n: conv(in_channels, c, 5, padding=2) for n, c in channels.items()})
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.calls = 0

    def forward(self, x, targets=None):
        self.calls += len(x)
        return {name: self.heads[name](x) for name in (targets or self.heads)}


def layout_of_kind(kind, ndim, channels):
    """Return how the channels of a kind turn; a "field" may be anything."""
    if kind == "field":
        return None
    return make_layout([kind if kind in ("vector", "axis", "tensor") else "scalars"], ndim, channels)


def make_predictor(ndim=3, patch=(8, 8, 8), heads=None, in_channels=1, seed=0) -> Predictor:
    """Return a predictor over random convolutions; heads are name -> (channels, activation, kind[, layout]).

    Without a layout, that of the kind; a "field" has none.
    """
    heads = heads or {"ink": (1, "sigmoid", "binary")}
    heads = {n: h if len(h) > 3 else (*h, layout_of_kind(h[2], ndim, h[0])) for n, h in heads.items()}
    network = RandomHeads(ndim, in_channels, {n: h[0] for n, h in heads.items()}, seed).eval()
    return Predictor(
        network=network,
        config={},
        targets={name: Head(name, *entry) for name, entry in heads.items()},
        normalizer=Normalizer("unit"),
        patch_size=patch,
        in_channels=in_channels,
        divisor=(1,) * ndim,
        path="random.pth",
        checksum="0" * 64,
    )


def save_checkpoint(path: Path, ndim=3, patch=(8, 8, 8), in_channels=1, tasks=True, seed=0) -> Path:
    """Write a checkpoint of a tiny network with a label target, a 3-class one and a normals task."""
    torch.manual_seed(seed)
    heads = {"ink": {"out_channels": 1}, "tissue": {"out_channels": 3}}
    if tasks:
        heads["normals"] = {"out_channels": ndim}
    network = MultiHeadDynUNet(ndim, in_channels, heads, [4, 8], [1, 2], n_blocks_per_stage=1)
    config = {
        "tr_config": {"patch_size": list(patch)},
        "dataset_config": {
            "normalization_scheme": "unit",
            "targets": {
                "ink": {"activation": "sigmoid", "kind": "binary"},
                "tissue": {"activation": "softmax", "kind": "multiclass"},
            },
        },
        "auxiliary_tasks": {"normals": {"type": "surface_normals", "source_target": "ink"}} if tasks else {},
    }
    state = {"model": network.state_dict(), "optimizer": {}, "scheduler": {}, "epoch": 3}
    torch.save({**state, "model_config": network.final_config, "config": config}, path)
    return path


def blend_in_memory(run, image, patch, overlap):
    """Blend windows in float64 the plain way; image (C, *space), run: window (C, *patch) -> (K, *patch).

    What a window holds beyond the image is reflected.
    """
    space = image.shape[1:]
    pads = [max(p - n, 0) for p, n in zip(patch, space)]
    padded = np.pad(image, [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads)], mode="reflect")
    starts = []
    for n, p in zip(padded.shape[1:], patch):
        stride = max(1, round(p * (1 - overlap)))
        starts.append(sorted({min(s, n - p) for s in range(0, n - p + stride, stride)}))
    grids = np.meshgrid(*[np.arange(p) - (p - 1) / 2 for p in patch], indexing="ij")
    weight = np.exp(-0.5 * sum((g / (p / 8)) ** 2 for g, p in zip(grids, patch)))
    total, weights, count = 0.0, np.zeros(padded.shape[1:]), 0
    for start in itertools.product(*starts):
        place = tuple(slice(s, s + p) for s, p in zip(start, patch))
        output = run(padded[(slice(None), *place)]).astype(np.float64)
        if count == 0:
            total = np.zeros((len(output), *padded.shape[1:]))
        total[(slice(None), *place)] += output * weight
        weights[place] += weight
        count += 1
    crop = tuple(slice(pad // 2, pad // 2 + n) for pad, n in zip(pads, space))
    return (total / weights)[(slice(None), *crop)], count
