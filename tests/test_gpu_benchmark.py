"""The benchmark that proves everything on a GPU: it runs whole on a CPU, keeps its limits, compares like with like."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_parts.common
    import gpu_parts.steps

    return gpu_parts


def run(folder, *options, timeout=3000):
    command = [sys.executable, str(SCRIPT), "-o", str(folder), "--device", "cpu", "--tiny", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    results = folder / "results.jsonl"
    return done, [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.slow
def test_it_runs_whole_on_a_cpu(tmp_path):
    done, rows = run(tmp_path, "--limit", "3000")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {row["part"] for row in rows} == set("abcde")
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    found = {row["name"]: row for row in rows}
    assert found["20 steps resume exactly"]["equal"]
    assert found["losses"]["losses"] > 50
    assert found["derived tasks"]["largest_share"] < 1e-3
    assert found["augmentation"]["image_error"] < 1e-4
    assert found["two processes"]["error"] < 1e-4
    assert found["16^3, fp32, ours"]["M_weights"] == found["16^3, fp32, nnU-Net"]["M_weights"]
    assert found["training on the phantom"]["steps"] == 2
    for row in rows:
        assert f"| {row['part']} | {row['name']} |" in done.stdout


def test_a_part_without_time_says_so(parts, tmp_path, monkeypatch):
    import gpu

    options = ["-o", str(tmp_path), "--part", "e", "--device", "cpu", "--tiny", "--limit", "0.01"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    assert gpu.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[0]["name"] == "machine"
    assert rows[1] == {"part": "e", "name": "training on the phantom", "skipped": "no time left"}


def test_a_part_is_stopped_at_its_limit(parts, tmp_path, monkeypatch):
    import gpu

    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", hangs)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "-o", str(tmp_path), "--parts", "bd", "--limit", "210"])
    assert gpu.main() == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    # A part gets its share of the time that the parts before it have left: here all of them were stopped at once.
    assert [row["failed"] for row in rows] == ["stopped after 150 s", "stopped after 210 s"]


def test_a_failure_does_not_stop_the_next_case(parts, tmp_path, capsys):
    from gpu_parts.common import Run

    one = Run("a", torch.device("cpu"), True, tmp_path, None, float("inf"))

    def fails():
        raise ValueError("no\nsecond line")

    one.attempt("first", fails)
    one.attempt("second", lambda: {"ms": 1.5})
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[0]["failed"] == "ValueError: no"
    assert rows[1]["ms"] == 1.5
    assert "a second: ms 1.5" in capsys.readouterr().out


@pytest.mark.parametrize("features", [(4, 8), (4, 8, 16, 16)])
def test_both_networks_are_of_equal_size(parts, features):
    from gpu_parts.steps import build

    ours, theirs = build("ours", features), build("nnU-Net", features)
    counts = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1]
    image = torch.rand(1, 1, 16, 16, 16)
    output = theirs(image)
    assert output.shape == image.shape
    output.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in theirs.parameters())


def test_the_wheels_are_versions_of_what_the_program_needs():
    lines = (SCRIPT.parent / "gpu_wheels.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-zA-Z0-9.-]+==[0-9.]+(post\d+)?", name) for name in names)
    assert {"monai", "pytorch-ignite", "zarr", "numcodecs"} <= {name.split("==")[0] for name in names}
