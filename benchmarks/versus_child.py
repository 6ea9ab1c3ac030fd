# ruff: noqa: E402
"""volumen's side of `versus_nnunet.py`: train by a time budget on one thread, and predict.

    python versus_child.py DATA OUTPUT BUDGET_SECONDS SEED IMAGES

The clock of the budget is the CPU time of this process. The last line printed is a JSON object: steps, seconds, and
the network.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

# The budget is planned and measured by this clock, which stands still while other programs have the core.
time.perf_counter = time.process_time

import torch
import yaml

import volumen


def main() -> None:
    """Train and predict."""
    data, output, budget, seed, images = sys.argv[1:]
    torch.set_num_threads(1)
    settings = {
        "tr_setup": {"seed": int(seed)},
        "tr_config": {"time_budget": f"{budget}s", "num_dataloader_workers": 0},
    }
    began = time.process_time()
    run = volumen.train(data, Path(output), settings, device="cpu")
    spent = time.process_time() - began
    best = run / "model_best.pth"
    checkpoint = best if best.is_file() else max(run.glob("model_[0-9]*.pth"))
    volumen.predict(images, checkpoint, Path(output) / "predictions", dtype="labels", format="tif", workers=1)
    snapshot = yaml.safe_load((run / "model_config.yaml").read_text())
    training, network = snapshot["tr_config"], snapshot["model_config"]
    report = {
        "steps": training["max_epoch"] * training["max_steps_per_epoch"],
        "cpu_seconds": round(spent),
        "patch": training["patch_size"],
        "batch": training["batch_size"],
        "features": network["features_per_stage"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
