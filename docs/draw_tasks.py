"""Draw every derived target on a slice of the phantom: docs/images/tasks/<type>.png.

    python docs/draw_tasks.py [TYPE ...]

Left the labels (instances in colours where the task compares them), right the target, striped where it is invalid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

from volumen.derived.registry import get_task, task_types  # noqa: E402
from volumen.handlers.preview import colours  # noqa: E402
from volumen.phantom.geometry import Roll, sheet_geometry  # noqa: E402
from volumen.transforms.derive import DeriveTargetsd, derive_halo  # noqa: E402

SHAPE = (80, 112, 112)
ZOOM, GAP, SECTORS = 2, 8, 7
# What a picture shows better than the default does.
PARAMS: Mapping[str, dict[str, Any]] = {
    "distance_transform": {"reach": 8.0},
    "surface_normals": {"reach": 8.0},
    "nearest_component": {"reach": 8.0},
    "skeleton": {"reach": 8.0},
    "structure_tensor": {"reach": 8.0},
    "inplane_direction": {"reach": 8.0},
    "affinities": {"offsets": [[-1, 0, 0], [0, -3, 0], [0, 0, -3]]},
    "local_shape_descriptors": {"sigma": 3.0},
}
BY_INSTANCE = ("affinities", "boundary", "local_shape_descriptors")


def phantom_labels(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return a rolled sheet (1, Z, Y, X), and the same cut into numbered sectors that touch."""
    sheet = sheet_geometry(Roll.draw(SHAPE, seed), SHAPE).distance <= 0
    y, x = np.indices(SHAPE[1:]) - np.array(SHAPE[1:]).reshape(2, 1, 1) / 2
    sector = 1 + np.floor((np.arctan2(y, x) / (2 * np.pi) + 0.5) * SECTORS).clip(0, SECTORS - 1)
    numbers = sheet * sector[None].astype(np.uint8)
    return sheet[None].astype(np.uint8), numbers[None]


def draw(name: str, sheet: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the picture (H, W, 3) uint8 of one task."""
    task = {name: {"type": name, "source_target": "sheet", **PARAMS.get(name, {})}}
    halo = derive_halo(task, (1.0, 1.0, 1.0))
    middle = SHAPE[0] // 2
    # As thin as the halo allows: one slice is drawn.
    thin = (slice(None), slice(max(middle - halo[0], 0), middle + halo[0] + 1))
    labels = (numbers if name in BY_INSTANCE else sheet)[thin]
    depth = min(middle, halo[0])
    sample = DeriveTargetsd(task, halo=(depth, 0, 0))({"sheet": labels})
    left = label_colours(labels[0, depth])
    right = target_colours(name, sample[name][:, 0], labels[0, depth])
    right = colours.dim_unknown(right, sample[f"{name}_mask"][0, 0])
    gap = np.full((len(left), GAP // ZOOM, 3), 255.0)
    picture = np.concatenate([left, gap, right], axis=1).clip(0, 255).astype(np.uint8)
    return picture.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


def label_colours(labels: np.ndarray) -> np.ndarray:
    """Grey for one class, a colour for each of several instances."""
    if labels.max() < 2:
        return colours.grey(0.2 + 0.6 * labels[None].astype(np.float32))
    palette = np.concatenate([[(51, 51, 51)], colours.PALETTE])
    return palette[labels.astype(int)].astype(np.float32)


def target_colours(name: str, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Colours of a target (C, H, W) by what it is, as those of the training's preview."""
    kind = get_task(name).kind
    base = colours.grey(0.2 + 0.25 * (labels[None] > 0).astype(np.float32))
    if kind == "distance":
        return colours.diverging(values[0], 3.0, 8.0)
    if kind == "tensor":
        return colours.tensor_diagonal(values, 1.0)
    if kind in ("vector", "axis"):
        return colours.directions(values, signed=kind == "vector")
    if name == "nearest_component":
        return colours.directions(values[:-1], signed=True)
    if kind == "field":
        return 255 * np.moveaxis(0.5 + 0.4 * values[:3], 0, -1)
    if kind == "multilabel":
        return 255 * np.moveaxis(0.15 + 0.85 * values[:3], 0, -1)
    return colours.overlay(base, values)


def main() -> None:
    """Draw the tasks that are named, by default all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", default=task_types(), metavar="TYPE", help="default: all")
    folder = ROOT / "docs" / "images" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    sheet, numbers = phantom_labels()
    for name in parser.parse_args().types:
        image = Image.fromarray(draw(name, sheet, numbers))
        image.quantize(128, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
