"""A sparsely labelled folder, a network trained on it, and suggestions of it, for tests."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import zarr
from data_folders import image_of, shells, write_tiff_folder

from volumen.cli.main import main
from volumen.suggestion.request import SuggestRequest

SHAPE = (16, 24, 32)
TRUTH = {"a": shells(SHAPE), "b": shells(SHAPE, 7.0), "c": shells(SHAPE, 9.0)}
TRAIN = [
    "--patch-size", "8,8,8", "--set", "model_config.features_per_stage=[4, 8]", "--steps-per-epoch", "8",
    "--set", "dataset_config.allow_unlabeled_data=true", "--val-steps", "2", "--workers", "0", "--batch-size", "2",
    "--device", "cpu", "--amp", "off", "--max-epochs", "1", "--quiet",
]  # fmt: skip


def train_sparsely(folder):
    """Write two volumes that are labelled in [:8, :12, :16] and one without a label; train on them; return `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOLUMEN_CACHE", str(folder / "cache"))
        mask = np.zeros(SHAPE, np.uint8)
        mask[:8, :12, :16] = 1
        labels = {name: {"ink": TRUTH[name] * mask} for name in "ab"}
        images = {name: image_of(TRUTH[name]) for name in "abc"}
        masks = {name: {"ink": mask} for name in "ab"}
        root = write_tiff_folder(folder / "data", labels, images=images, masks=masks)
        tifffile.imwrite(root / "images" / "c.tif", images["c"])
        assert main(["train", "-i", str(root), "-o", str(folder), *TRAIN]) == 0
    return folder


def request_of(trained, output, **settings):
    """Return a request of four small boxes of what `train_sparsely` left."""
    settings = {"number": 4, "size": (8, 8, 8), "device": "cpu", "overlap": 0.25, **settings}
    return SuggestRequest(str(trained / "model"), str(trained / "data"), str(output), **settings)


def paint(folder, box, label):
    """Overwrite the label to paint of a box."""
    zarr.open_array(folder / "boxes" / box.folder / "ink.zarr" / "0", mode="r+")[...] = label
