"""Part b: milliseconds and memory of a training step, ours and nnU-Net's network of equal size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nnunet_network import PlainResidualUNet
from torch.nn.functional import binary_cross_entropy_with_logits

from gpu_parts.common import Run, gpu_memory, milliseconds

MODES = ("fp32", "bf16", "bf16, channels last", "bf16, compiled", "bf16, compiled with CUDA graphs")


def run_part(run: Run) -> None:
    """Time every case; the sizes that say most come first, in case that time runs out."""
    sizes = (16,) if run.tiny else (128, 64, 192)
    for size in sizes:
        for mode in MODES:
            if "compiled" in mode and size == 192:
                continue
            for name in ("ours", "nnU-Net"):
                seconds = 25 if "compiled" in mode and not run.tiny else 3
                run.attempt(
                    f"{size}^3, {mode}, {name}",
                    lambda name=name, mode=mode, size=size: step(run, name, mode, size),
                    seconds,
                )
    if run.device.type == "cuda":
        run.attempt("128^3, bf16, whole step as a CUDA graph, ours", lambda: whole_graph(run, 128), 10)


def build(name: str, features: tuple[int, ...]) -> torch.nn.Module:
    """Return a network with one output channel: ours or nnU-Net's, of the same stages, features and blocks."""
    from volumen.networks.multihead import MultiHeadDynUNet
    from volumen.networks.planning import plan_blocks

    torch.manual_seed(0)
    strides, blocks = [1] + [2] * (len(features) - 1), list(plan_blocks(len(features)))
    if name == "nnU-Net":
        return PlainResidualUNet(1, 1, features, strides, blocks)
    heads = {"surface": {"out_channels": 1, "separate_decoder": True}}
    return MultiHeadDynUNet(3, 1, heads, list(features), strides, n_blocks_per_stage=blocks)


def prepared(run: Run, name: str, mode: str, size: int) -> tuple[Callable[[], torch.Tensor], torch.nn.Module]:
    """Return a function that does one step, and its network."""
    network = build(name, run.features).to(run.device)
    image = torch.rand(2, 1, *[size] * 3, device=run.device)
    truth = (image > 0.5).float()
    if "channels last" in mode:
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        image = image.to(memory_format=torch.channels_last_3d)
    called = network
    if "compiled" in mode:
        how: dict[str, Any] = {"backend": "eager"} if run.tiny else {}
        if "graphs" in mode and not run.tiny:
            how["mode"] = "reduce-overhead"
        called = torch.compile(network, dynamic=False, **how)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def act() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled="bf16" in mode):
            output = called(image)
        output = output["surface"] if isinstance(output, dict) else output
        output = output[0] if isinstance(output, list) else output
        loss = binary_cross_entropy_with_logits(output.float(), truth)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return act, network


def step(run: Run, name: str, mode: str, size: int) -> dict[str, Any]:
    """Return milliseconds of a step, memory in GiB and millions of weights."""
    torch.backends.cudnn.benchmark = True
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    act, network = prepared(run, name, mode, size)
    time = milliseconds(act, run.device, 1 if run.tiny else 8, 1 if run.tiny else 4)
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    return {"ms": time, "GiB": gpu_memory(run.device), "M_weights": weights}


def whole_graph(run: Run, size: int) -> dict[str, Any]:
    """Return milliseconds of forward and backward pass replayed as one CUDA graph, with the optimizer beside it."""
    network = build("ours", run.features).to(run.device)
    image = torch.rand(2, 1, *[size] * 3, device=run.device)
    truth = (image > 0.5).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True, capturable=True)

    def act() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            output = network(image)["surface"]
        output = output[0] if isinstance(output, list) else output
        binary_cross_entropy_with_logits(output.float(), truth).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            act()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return {"ms": milliseconds(graph.replay, run.device, 8), "GiB": gpu_memory(run.device)}
