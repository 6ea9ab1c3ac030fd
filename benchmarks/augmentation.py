# ruff: noqa: E402
"""Time the augmentation of a patch against batchgeneratorsv2 with nnU-Net's published pipeline.

Both start from the same initial patch in memory (float32 image, one channel; three labels), draw with the
same probabilities and ranges (`nnUNetTrainer.get_training_transforms`) and end with tensors of the final
patch. The reference holds the three labels in one segmentation (values 0, 1, 2); ours reads three label
volumes, which is more work. One thread; CPU seconds per patch, median of rounds that alternate between the two.

    pip install batchgeneratorsv2
    python benchmarks/augmentation.py [--sizes 64 128] [--rounds 5] [--uint8]
"""

from __future__ import annotations

import os

# Set before NumPy and torch are imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.data.formats.volumes import ArrayVolume
from volumen.transforms.finalize import CropHalod, FinalizePatchd
from volumen.transforms.intensity import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
)
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.transforms.training import TrainingTransforms

INITIAL = {64: 102, 128: 205}  # nnU-Net's initial patch: room for 30 degrees and a scaling by 1.4
PATCHES = {64: 60, 128: 16}
LABELS = ("first", "second", "third")


def reference_pipeline(size: int) -> Callable:
    """Return nnU-Net's training transforms for a cubic patch, from batchgeneratorsv2."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    angle = 30 / 360 * 2 * np.pi
    each = {"synchronize_channels": False, "p_per_channel": 1}
    gamma = {"gamma": BGContrast((0.7, 1.5)), "p_retain_stats": 1, **each}
    low_resolution = SimulateLowResolutionTransform(
        scale=(0.5, 1),
        synchronize_channels=False,
        synchronize_axes=True,
        ignore_axes=(),
        allowed_channels=None,
        p_per_channel=0.5,
    )
    blur = GaussianBlurTransform(
        blur_sigma=(0.5, 1.0),
        synchronize_channels=False,
        synchronize_axes=False,
        p_per_channel=0.5,
        benchmark=True,
    )
    noise = GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True)
    brightness = MultiplicativeBrightnessTransform(multiplier_range=BGContrast((0.75, 1.25)), **each)
    contrast = ContrastTransform(contrast_range=BGContrast((0.75, 1.25)), preserve_range=True, **each)
    spatial = SpatialTransform(
        (size,) * 3,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.2,
        rotation=(-angle, angle),
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
    )
    return ComposeTransforms(
        [
            spatial,
            RandomTransform(noise, 0.1),
            RandomTransform(blur, 0.2),
            RandomTransform(brightness, 0.15),
            RandomTransform(contrast, 0.15),
            RandomTransform(low_resolution, 0.25),
            RandomTransform(GammaTransform(p_invert_image=1, **gamma), 0.1),
            RandomTransform(GammaTransform(p_invert_image=0, **gamma), 0.3),
            MirrorTransform(allowed_axes=(0, 1, 2)),
        ]
    )


def our_pipeline(scheme: str, on_device: bool = False) -> TrainingTransforms:
    """Return this program's transforms with the same draws, which read from a case.

    Args:
        scheme: of the normalisation.
        on_device: the worker only draws and reads, as for `tr_config.augment_on_device`.
    """
    return TrainingTransforms(
        [
            RandSpatialTransformd(rotate90=False),
            ReadPatchd(LABELS, normalization_scheme=scheme),
            RandNoised(),
            RandBlurd(),
            RandBrightnessd(),
            RandContrastd(),
            RandLowResolutiond(),
            RandGammad(prob=0.1, invert=True),
            RandGammad(prob=0.3),
            CropHalod(LABELS),
            FinalizePatchd(LABELS),
        ],
        on_device=on_device,
    )


def initial_patch(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth image (z, y, x) float32 in [0, 1] and blobs of three values, uint8."""
    noise = np.random.default_rng(0).standard_normal((size,) * 3).astype(np.float32)
    image = gaussian_filter(noise, 2)
    image = (image - image.min()) / (image.max() - image.min())
    labels = np.digitize(gaussian_filter(noise, 4), [-0.01, 0.01]).astype(np.uint8)
    return image, labels


def seconds_per_patch(run: Callable[[int], object], count: int, first: int) -> float:
    """Return the CPU seconds for one of `count` patches with seeds from `first` on."""
    start = time.process_time()
    for seed in range(first, first + count):
        run(seed)
    return (time.process_time() - start) / count


def compare(size: int, rounds: int, uint8: bool) -> None:
    """Print patches per CPU second of both, and their ratio."""
    image, labels = initial_patch(INITIAL[size])
    image_tensor, labels_tensor = (
        torch.from_numpy(image)[None],
        torch.from_numpy(labels.astype(np.int16))[None],
    )
    stored = (image * 255).astype(np.uint8) if uint8 else image
    case = SimpleNamespace(
        name="patch",
        image=ArrayVolume(stored, ndim=3),
        labels={name: ArrayVolume((labels == i).astype(np.uint8), ndim=3) for i, name in enumerate(LABELS)},
        masks={},
        spacing=(1.0, 1.0, 1.0),
    )
    start = ((INITIAL[size] - size) // 2,) * 3
    location = SimpleNamespace(case=0, start=start, size=(size,) * 3, bounds=((0, INITIAL[size]),) * 3)
    scheme = "unit" if uint8 else "none"
    reference, ours, reader = reference_pipeline(size), our_pipeline(scheme), our_pipeline(scheme, True)

    def run_reference(seed: int) -> object:
        np.random.seed(seed)
        torch.manual_seed(seed)
        return reference(image=image_tensor.clone(), segmentation=labels_tensor.clone())

    def run_ours(seed: int) -> object:
        ours.set_random_state(seed=seed)
        return ours({"case": case, "location": location})

    def run_reader(seed: int) -> object:
        reader.set_random_state(seed=seed)
        return reader({"case": case, "location": location})

    runs = {"reference": run_reference, "ours": run_ours, "reading": run_reader}
    for run in runs.values():
        seconds_per_patch(run, PATCHES[size], 10**6)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_per_patch(run, PATCHES[size], number * PATCHES[size]))
    theirs, own, read = (statistics.median(times[name]) for name in runs)
    print(
        f"{size}^3: batchgeneratorsv2 {1 / theirs:7.1f} patches per CPU second, "
        f"ours {1 / own:7.1f}, ratio {theirs / own:.2f}; "
        f"a worker that reads for the device {1 / read:7.1f}, {own / read:.1f} times ours"
    )


def main() -> None:
    """Run the comparison for the requested sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(INITIAL), default=sorted(INITIAL))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uint8", action="store_true", help="ours reads bytes and normalises them as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        compare(size, arguments.rounds, arguments.uint8)


if __name__ == "__main__":
    main()
