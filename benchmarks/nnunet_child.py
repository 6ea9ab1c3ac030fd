"""nnU-Net's side of `versus_nnunet.py`; runs with the interpreter of `nnunet_environment.py`.

    python nnunet_child.py WORK BUDGET_SECONDS SEED MEMORY_GIB IMAGES PREDICTIONS

nnU-Net plans and preprocesses the data set of WORK (its raw, preprocessed and results folders), trains its default
trainer on all of it for BUDGET_SECONDS of CPU time, and predicts the cases of IMAGES as `nnUNetv2_predict` does, with
mirroring. Its learning rate follows its own polynomial, over time instead of epochs, so that it ends as it would after
its 1000 epochs. The last line printed is a JSON object: steps, seconds, and the plan.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

DATASET = 1


def main() -> None:
    """Plan, train, predict."""
    work, budget, seed, memory = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    images, predictions = Path(sys.argv[5]), Path(sys.argv[6])
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
        (work / name).mkdir(parents=True, exist_ok=True)
    os.environ.update(nnUNet_n_proc_DA="1", nnUNet_compile="false", nnUNet_def_n_proc="1")
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    plans, description = prepare(work, memory)
    configuration = "2d" if "3d_fullres" not in plans["configurations"] else "3d_fullres"
    report = train(plans, description, configuration, budget)
    predict(Path(report.pop("folder")), images, predictions, description["file_ending"])
    print(json.dumps(report))


def prepare(work: Path, memory: float) -> tuple[dict, dict]:
    """Return the plans and the description of the data set after nnU-Net has planned and preprocessed it."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )

    (raw,) = (work / "raw").iterdir()
    target = work / "preprocessed" / raw.name
    plans_file = target / "nnUNetPlans.json"
    if not (target / "complete.txt").is_file():
        extract_fingerprint_dataset(DATASET, DatasetFingerprintExtractor, 1)
        plan_experiment_dataset(DATASET, gpu_memory_target_in_gb=memory)
        plans = json.loads(plans_file.read_text())
        chosen = "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"
        preprocess_dataset(DATASET, configurations=[chosen], num_processes=[1])
        (target / "complete.txt").write_text("")
    return json.loads(plans_file.read_text()), json.loads((raw / "dataset.json").read_text())


def train(plans: dict, description: dict, configuration: str, budget: float) -> dict:
    """Train for a time, and return what was done."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = nnUNetTrainer(
        {**plans, "continue_training": False}, configuration, "all", description, torch.device("cpu")
    )
    trainer.initialize()
    # Augmentation in this process, so that its clock counts it.
    os.environ.update(nnUNet_n_proc_DA="0")
    trainer.plot_network_architecture = lambda: None
    began = time.process_time()
    trainer.on_train_start()
    trainer.network.train()
    steps, losses = 0, []
    while (spent := time.process_time() - began) < budget:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - spent / budget) ** 0.9
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        steps += 1
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    plan = trainer.configuration_manager
    return {
        "steps": steps,
        "cpu_seconds": round(time.process_time() - began),
        "patch": list(plan.patch_size),
        "batch": trainer.batch_size,
        "features": plan.network_arch_init_kwargs["features_per_stage"],
        "configuration": configuration,
        "last_losses": float(np.mean(losses[-20:])),
        "folder": trainer.output_folder_base,
    }


def predict(model: Path, images: Path, predictions: Path, ending: str) -> None:
    """Predict the cases of a folder as `nnUNetv2_predict` does."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    cases = sorted({path.name[: -len(ending) - 5] for path in images.glob(f"*{ending}")})
    files = [[str(path) for path in sorted(images.glob(f"{case}_????{ending}"))] for case in cases]
    predictions.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(files, [str(predictions / case) for case in cases])


if __name__ == "__main__":
    main()
