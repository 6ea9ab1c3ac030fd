"""Prove on a GPU, in one call of at most nine minutes, that results are right and nothing is left on the table.

    python benchmarks/gpu.py -o RESULTS [--data FIB25]            # all parts, 9 minutes
    python benchmarks/gpu.py -o RESULTS --data FIB25 --parts e --limit 540
    python benchmarks/gpu.py -o RESULTS --device cpu --tiny       # runs whole on a CPU, in a few minutes

Parts: a, results on CUDA against the CPU; b, milliseconds and memory of a step, ours and nnU-Net's network; c, the
share of time in which the GPU works in a training; d, voxels per second of a prediction; e, a training on fib25 for the
time left. Each part is a process with its own time limit, after which it is stopped; every result is written to
RESULTS/results.jsonl when it is there, so that nothing is lost. `gpu_wheels.txt` lists what a machine needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"a": "correctness", "b": "steps", "c": "training", "d": "prediction", "e": "fib25"}
SHARES = {"a": 90, "b": 150, "c": 120, "d": 60, "e": 115}
"""Seconds of each part of all 9 minutes; what a part does not need goes to the next ones."""


def main() -> int:
    """Run the parts one after another and print their results; return 0 if none of them failed."""
    arguments = parsed()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        run_one(arguments)
        return 0
    results = arguments.output / "results.jsonl"
    results.unlink(missing_ok=True)
    ends = time.monotonic() + arguments.limit
    parts = list(arguments.parts)
    for number, part in enumerate(parts):
        rest = sum(SHARES[one] for one in parts[number:])
        seconds = (ends - time.monotonic()) * SHARES[part] / rest
        run_process(arguments, part, seconds)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    print(table(rows))
    return int(any("failed" in row for row in rows))


def parsed() -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest inputs: does everything run?")
    parser.add_argument("--data", type=Path, help="folder of the fib25 data set, for part e")
    parser.add_argument("--parts", default="abcde", help="parts to run (default: abcde)")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all parts (default: 530)")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not set(arguments.parts) <= set(PARTS):
        parser.error(f"--parts: expected letters among {''.join(PARTS)}, found {arguments.parts!r}")
    return arguments


def run_process(arguments: argparse.Namespace, part: str, seconds: float) -> None:
    """Run a part in a process of its own, which is stopped at its time limit."""
    command = [sys.executable, str(Path(__file__).resolve()), "-o", str(arguments.output), "--part", part]
    command += ["--device", arguments.device, "--limit", str(seconds)]
    command += ["--tiny"] if arguments.tiny else []
    command += ["--data", str(arguments.data)] if arguments.data else []
    paths = [str(ROOT / "bundle"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    print(f"part {part}: {seconds:.0f} s", flush=True)
    problem = None
    try:
        code = subprocess.run(command, env=environment, timeout=seconds + 5, check=False).returncode
        problem = f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:.0f} s"
    if problem:
        with (arguments.output / "results.jsonl").open("a") as file:
            file.write(json.dumps({"part": part, "name": "the part", "failed": problem}) + "\n")


def run_one(arguments: argparse.Namespace) -> None:
    """Run one part in this process."""
    ends = time.monotonic() + arguments.limit
    import torch
    from gpu_parts.common import Run

    device = torch.device(arguments.device)
    run = Run(arguments.part, device, arguments.tiny, arguments.output.resolve(), arguments.data, ends)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    run.write("machine", device=where, torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    import_module(f"gpu_parts.{PARTS[arguments.part]}").run_part(run)


def table(rows: list[dict]) -> str:
    """Return the results as a table in Markdown."""
    lines = ["| part | what | result |", "| --- | --- | --- |"]
    for row in rows:
        values = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        lines.append(f"| {row['part']} | {row['name']} | {', '.join(values[2:])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
