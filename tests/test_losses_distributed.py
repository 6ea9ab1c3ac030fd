"""Two processes, each with its part of the batch, train like one process with the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import make_target

from volumen.losses.multitask import MultiTaskLoss
from volumen.networks.gradient_gate import GradientGate

KINDS = {
    "ink": "binary",
    "cells": "multiclass",
    "sdt": "distance",
    "normals": "vector",
    "fibre": "axis",
    "st": "tensor",
}
LOSSES = {
    "ink": [
        "DiceCELoss",
        "SoftClDiceLoss",
        "BoundaryLoss",
        "monai.losses.DiceLoss",
        "monai.losses.FocalLoss",
    ],
    "cells": [
        {"name": "SoftDiceLoss", "kwargs": {"batch": True}},
        {"name": "CrossEntropyLoss", "kwargs": {"weight": [1.0, 2.0, 3.0]}},
    ],
    "sdt": [{"name": "SignedDistanceLoss", "kwargs": {"eikonal": True}}, "torch.nn.L1Loss"],
    "normals": ["CosineSimilarityLoss", "NormalSmoothnessLoss", "NormalGatedRepulsionLoss"],
    "fibre": ["MaskedMSELoss"],
    "st": ["EigenvalueLoss", "PlanarityLoss"],
}
CHANNELS = {"ink": 1, "cells": 3, "sdt": 1, "normals": 2, "fibre": 2, "st": 3}
SHAPE = (4, 8, 8)


class _Net(torch.nn.Module):
    """A convolution and its halved output per target: enough to have shared weights and deep supervision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.heads = torch.nn.ModuleDict({n: torch.nn.Conv2d(4, c, 1) for n, c in CHANNELS.items()})
        self.gate: GradientGate | None = None

    def limit_gradients(self, auxiliary: list[str], method: str) -> GradientGate:
        self.gate = GradientGate(auxiliary, method)
        return self.gate

    def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        features = torch.tanh(self.stem(x))
        branches = [features] * len(self.heads)
        if self.gate is not None:
            branches = [b[0] for b in self.gate.fork([features], [[n] for n in self.heads], 0)]
        full = {n: head(branch) for (n, head), branch in zip(self.heads.items(), branches)}
        return {n: [y, y[..., ::2, ::2]] for n, y in full.items()}


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(SHAPE[0], 1, *SHAPE[1:], generator=generator, dtype=torch.float64)}
    for name, kind in KINDS.items():
        batch[name] = make_target(kind, SHAPE, generator, torch.float64)
        batch[f"{name}_mask"] = torch.rand(SHAPE[0], 1, *SHAPE[1:], generator=generator) > 0.1
    # Unequal parts: the second process has fewer valid voxels, and for one target none at all.
    batch["ink_mask"][3] = False
    batch["sdt_mask"][2:] = False
    batch["cells_mask"][2, :, :4] = False
    return batch


def _loss(balancing: str) -> MultiTaskLoss:
    source = {"sdt": "ink", "normals": "ink", "st": "ink"}
    entries = {n: [e if isinstance(e, dict) else {"name": e} for e in losses] for n, losses in LOSSES.items()}
    targets = {n: {"kind": k, "losses": entries[n], "source_target": source.get(n)} for n, k in KINDS.items()}
    return MultiTaskLoss(targets, balancing=balancing).double()


def _gradients(
    net: torch.nn.Module, balancing: str, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    loss = _loss(balancing)
    bare = net.module if hasattr(net, "module") else net
    if balancing == "gradnorm":
        loss.balancing.set_shared_parameters(list(bare.stem.parameters()))
    if balancing == "aligned":
        loss.balancing.set_network(bare, ["sdt", "normals", "st"])
    net.zero_grad()
    total = loss(net(batch["image"]), batch)
    total.backward()
    found = {n: p.grad.clone() for n, p in bare.named_parameters()}
    found |= {f"loss/{n}": p.grad.clone() for n, p in loss.named_parameters()}
    return found | {"total": total.detach(), **{f"component/{n}": v for n, v in loss.components.items()}}


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        net = torch.nn.parallel.DistributedDataParallel(_Net().double())
        share = {k: v[2 * rank : 2 * rank + 2] for k, v in _batch().items()}
        found = {b: _gradients(net, b, share) for b in ("fixed", "uncertainty", "gradnorm", "aligned")}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The processes are forked, since importing torch again in each process costs more than all the rest.
    mp.start_processes(_process, args=(port, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "gradnorm", "aligned"])
def test_averaged_gradient_is_that_of_the_joined_batch(two_processes, balancing):
    expected = _gradients(_Net().double(), balancing, _batch())
    for found in two_processes:
        assert found[balancing].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[balancing][name], value, rtol=1e-6, atol=1e-9, msg=name)
