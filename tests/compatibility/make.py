"""Write the files of a run with this version, for tests that later versions read them.

    python tests/compatibility/make.py [FOLDER]

FOLDER (default: one named by the version, beside this script) receives the experiment, the resolved settings, the
split, a checkpoint, and every second voxel of its prediction of an image that this script makes. Files of a released
version are never changed: a release adds a folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

from volumen.cli.main import main
from volumen.version import __version__

EXPERIMENT = """\
dataset_config:
  targets:
    sheet:
      losses: [{name: BCEWithLogitsLoss, weight: 1.0}, {name: SoftDiceLoss, weight: 1.0}]
auxiliary_tasks:
  distance:
    type: distance_transform
    source_target: sheet
    loss_weight: 0.1
    losses: [{name: SignedDistanceLoss, kwargs: {rho: 4}}]
  normals:
    type: surface_normals
    source_target: sheet
    loss_weight: 0.1
    losses: [{name: CosineSimilarityLoss, kwargs: {dim: 1}}]
  tensor:
    type: structure_tensor
    source_target: sheet
    reach: 4
    loss_weight: 0.1
    losses: [{name: MaskedMSELoss}]
model_config:
  features_per_stage: [4, 6]
  n_blocks_per_stage: [1, 1]
tr_config:
  patch_size: [16, 16, 16]
  batch_size: 1
  max_epoch: 2
  max_steps_per_epoch: 2
  max_val_steps_per_epoch: 1
  num_dataloader_workers: 0
"""
FILES = ("model_2.pth", "model_config.yaml", "model_split.json")
STORED = (..., slice(None, None, 2), slice(None, None, 2), slice(None, None, 2))
"""The part of a prediction that is stored."""


def write_data(folder: Path) -> None:
    """Write two volumes of wavy sheets with labels, the same everywhere."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    z, y, x = np.mgrid[:24, :24, :24]
    for number in range(2):
        wave = (z + 2 * np.sin((x + 5 * number) / 4) + y / 5) % 10
        label = (wave < 3).astype(np.uint8)
        texture = np.random.default_rng(number).integers(0, 60, label.shape)
        tifffile.imwrite(folder / "images" / f"v{number}.tif", (80 + 90 * label + texture).astype(np.uint8))
        tifffile.imwrite(folder / "labels" / f"v{number}_sheet.tif", label)


def predict(image: Path, checkpoint: Path, folder: Path) -> dict[str, np.ndarray]:
    """Predict an image; return the volume of every target by name."""
    words = ["predict", "-i", image, "-m", checkpoint, "-o", folder, "--format", "tif", "--dtype", "float32"]
    if status := main([*map(str, words), "--device", "cpu", "--quiet"]):
        raise SystemExit(status)
    return {
        path.stem.removeprefix(f"{image.stem}_"): tifffile.imread(path)
        for path in sorted(folder.glob("*.tif"))
    }


def make(folder: Path) -> None:
    """Train for four steps and store the files."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_data(work / "data")
        (work / "experiment.yaml").write_text(EXPERIMENT)
        words = ["train", "-i", work / "data", "-o", work / "out", "--config-path", work / "experiment.yaml"]
        if status := main([*map(str, words), "--device", "cpu", "--quiet"]):
            raise SystemExit(status)
        run = work / "out" / "model"
        found = predict(work / "data" / "images" / "v0.tif", run / "model_2.pth", work / "found")
        folder.mkdir(parents=True)
        for name in FILES:
            shutil.copy(run / name, folder / name)
        (folder / "experiment.yaml").write_text(EXPERIMENT)
        stored = {name: volume[STORED] for name, volume in found.items()}
        np.savez_compressed(folder / "prediction.npz", **stored)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / __version__)
