"""Measure the cost of one training step, compared with nnU-Net's residual U-Net of the same stages and features.

The reference is `ResidualEncoderUNet` of the package dynamic-network-architectures (an extra: `pip install
dynamic-network-architectures`). Each case runs in a separate process: forward, loss, backward and AdamW
step, one thread on a CPU (CPU seconds) or a GPU (milliseconds of wall time); medians without the first steps.
Each round runs all cases, so that a busy machine slows all of them. Ours retain freed memory, as training does
(`volumen.utils.memory`); nnU-Net has one row without and one with this, to separate the two gains.

    python benchmarks/train_step.py                     # features 16 to 128, about two minutes
    python benchmarks/train_step.py --full              # features 32 to 320, about ten minutes
    python benchmarks/train_step.py --device cuda --full --size 128
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL, FULL = (16, 32, 64, 128), (32, 64, 128, 256, 320)
DERIVED = {"distance": 1, "normals": 3, "tensor": 6, "direction": 3}
REFERENCE = "nnU-Net fp32"

# name: network, precision, heads of derived targets, memory format, compiled
CASES = {
    REFERENCE: ("peer", "float32", None, False, False),
    "nnU-Net fp32, memory kept": ("peer, kept", "float32", None, False, False),
    "nnU-Net bf16": ("peer", "bfloat16", None, False, False),
    "nnU-Net fp32, 4 more decoders": ("peer", "float32", "separate", False, False),
    "fp32": ("ours", "float32", None, False, False),
    "fp32, memory not kept": ("ours, not kept", "float32", None, False, False),
    "bf16": ("ours", "bfloat16", None, False, False),
    "fp32, 4 more targets, a decoder each": ("ours", "float32", "separate", False, False),
    "fp32, 4 more targets, shared decoder": ("ours", "float32", "shared", False, False),
    "fp32, 4 more targets, a decoder each, aligned": ("ours, aligned", "float32", "separate", False, False),
    "fp32, 4 more targets, shared decoder, aligned": ("ours, aligned", "float32", "shared", False, False),
    "bf16, channels last": ("ours", "bfloat16", None, True, False),
}
CUDA_CASES = {
    "nnU-Net bf16, channels last": ("peer", "bfloat16", None, True, False),
    "bf16, 4 more targets, a decoder each": ("ours", "bfloat16", "separate", False, False),
    "bf16, 4 more targets, shared decoder": ("ours", "bfloat16", "shared", False, False),
    "nnU-Net bf16, compiled": ("peer", "bfloat16", None, False, True),
    "bf16, compiled": ("ours", "bfloat16", None, False, True),
    "bf16, channels last, compiled": ("ours", "bfloat16", None, True, True),
}


def build(kind: str, features: list[int], heads: str | None):
    """Return the network, built in the way of each of the two systems."""
    from volumen.networks.multihead import MultiHeadDynUNet
    from volumen.networks.planning import plan_blocks

    stages = len(features)
    strides, blocks = [1] + [2] * (stages - 1), list(plan_blocks(stages))
    if kind.startswith("ours"):
        channels = {"surface": 1, **(DERIVED if heads else {})}
        separate = heads != "shared"
        targets = {
            name: {"out_channels": count, "separate_decoder": separate} for name, count in channels.items()
        }
        network = MultiHeadDynUNet(3, 1, targets, features, strides, n_blocks_per_stage=blocks)
        if kind.endswith("aligned"):
            network.limit_gradients(list(DERIVED), "projection")
        return network
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He
    from torch import nn

    network = ResidualEncoderUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=strides,
        n_blocks_per_stage=blocks,
        num_classes=1,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )
    if heads:
        network = several_decoders(network, [1, *DERIVED.values()])
    return network.apply(InitWeights_He(1e-2))


def several_decoders(network, channels: list[int]):
    """Return nnU-Net's network with a separate decoder of its own kind for each number of channels."""
    from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
    from torch import nn

    class SeveralDecoders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = network.encoder
            self.decoders = nn.ModuleList(
                UNetDecoder(network.encoder, count, 1, deep_supervision=False) for count in channels
            )

        def forward(self, x):
            skips = self.encoder(x)
            return {str(index): decoder(skips) for index, decoder in enumerate(self.decoders)}

    return SeveralDecoders()


def measure(arguments: argparse.Namespace) -> None:
    """Run one case in this process and print its figures as JSON."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    kind, precision, heads, channels_last, compiled = {**CASES, **CUDA_CASES}[arguments.case]
    cuda = arguments.device == "cuda"
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind in ("ours", "ours, aligned", "peer, kept"):
        from volumen.utils.memory import keep_freed_memory

        keep_freed_memory(torch.device(arguments.device))
    network = build(kind, arguments.features, heads).to(arguments.device)
    parameters = sum(weight.numel() for weight in network.parameters())
    image = torch.rand(arguments.batch, 1, *[arguments.size] * 3, device=arguments.device)
    truth = (image > 0.5).float()
    if channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
        image = image.to(memory_format=torch.channels_last_3d)
    if compiled:
        network = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    clock = time.perf_counter if cuda else time.process_time
    seconds = []
    for _ in range(arguments.steps + (3 if cuda else 1)):
        start = clock()
        train_step(network, optimizer, image, truth, getattr(torch, precision))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    used = torch.cuda.max_memory_allocated() / 2**10 if cuda else peak_kib() - baseline
    print(
        json.dumps(
            {
                "parameters": parameters,
                "seconds": seconds[-arguments.steps :],
                "peak": used / 2**10,
                "operations": operations(kind, heads, arguments),
            }
        )
    )


def operations(kind: str, heads: str | None, arguments: argparse.Namespace) -> float:
    """Return 1e9 floating-point operations of the convolutions in a forward and backward pass, without running it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build(kind, arguments.features, heads)
        outputs = network(torch.rand(arguments.batch, 1, *[arguments.size] * 3))
        outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
        sum(out.sum() for out in outputs).backward()
    return counter.get_total_flops() / 1e9


def train_step(network, optimizer, image, truth, dtype) -> None:
    """Do one step on the sum of all outputs' cross-entropies."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    optimizer.zero_grad()
    with torch.autocast(image.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        outputs = network(image)
    outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
    losses = [binary_cross_entropy_with_logits(out.float(), truth.expand_as(out)) for out in outputs]
    torch.stack(losses).sum().backward()
    optimizer.step()


def peak_kib() -> int:
    """Return the largest memory that this process has held, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=SMALL, help="channels of each stage")
    parser.add_argument("--full", action="store_true", help=f"features {FULL}")
    parser.add_argument("--size", type=int, default=64, help="voxels along each axis of a patch")
    parser.add_argument("--batch", type=int, default=2, help="patches of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps timed in each round")
    parser.add_argument("--rounds", type=int, default=2, help="times that all cases are run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="run only the cases whose name has this in it, and the reference")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.features = FULL
    if arguments.case:
        measure(arguments)
        return
    cases = {**CASES, **CUDA_CASES} if arguments.device == "cuda" else CASES
    names = [name for name in cases if name == REFERENCE or (arguments.only or "") in name]
    report(run_all(names, arguments), arguments)


def run_all(names: list[str], arguments: argparse.Namespace) -> dict[str, dict]:
    """Run every case in a separate process, round by round; return the combined figures."""
    figures: dict[str, dict] = {}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, "--case", name, "--features", *map(str, arguments.features)]
            for option in ("size", "batch", "steps", "device"):
                command += [f"--{option}", str(getattr(arguments, option))]
            paths = os.pathsep.join(filter(None, (str(ROOT / "bundle"), os.environ.get("PYTHONPATH", ""))))
            environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(answer.stdout.splitlines()[-1])
            earlier = figures.get(name, {"seconds": [], "peak": 0})
            found["seconds"] += earlier["seconds"]
            found["peak"] = max(found["peak"], earlier["peak"])
            figures[name] = found
    return figures


def report(figures: dict[str, dict], arguments: argparse.Namespace) -> None:
    """Print a table and the ratios that the documentation states."""
    unit, scale = ("ms", 1e3) if arguments.device == "cuda" else ("CPU s", 1)
    time_of = {name: statistics.median(found["seconds"]) for name, found in figures.items()}
    print(
        f"one step, {arguments.device}, patch {arguments.size}^3, batch {arguments.batch},"
        f" features {'-'.join(map(str, arguments.features))}"
    )
    print(f"{'':46}{unit:>9}{'ratio':>8}{'M weights':>11}{'peak MiB':>10}{'GFLOP':>8}")
    for name, found in figures.items():
        ratio = time_of[name] / time_of[REFERENCE]
        weights = found["parameters"] / 1e6
        print(
            f"{name:46}{time_of[name] * scale:9.2f}{ratio:8.2f}{weights:11.2f}{found['peak']:10.0f}"
            f"{found['operations']:8.0f}"
        )
    for above, below in (
        ("fp32", REFERENCE),
        ("fp32", "nnU-Net fp32, memory kept"),
        ("fp32", "fp32, memory not kept"),
        ("fp32", "bf16"),
        ("fp32, 4 more targets, a decoder each", "fp32"),
        ("fp32, 4 more targets, a decoder each", "nnU-Net fp32, 4 more decoders"),
        ("fp32, 4 more targets, shared decoder", "fp32"),
        ("fp32, 4 more targets, a decoder each, aligned", "fp32, 4 more targets, a decoder each"),
        ("fp32, 4 more targets, shared decoder, aligned", "fp32, 4 more targets, shared decoder"),
    ):
        if above in time_of and below in time_of:
            arithmetic = figures[above]["operations"] / figures[below]["operations"]
            print(
                f"{above} / {below}: {time_of[above] / time_of[below]:.2f}, of the operations {arithmetic:.2f}"
            )


if __name__ == "__main__":
    main()
