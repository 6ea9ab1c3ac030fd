"""Draw the pictures of the gallery page that are missing, from the phantom and the shipped model; write the page.

With --check only the page is compared: every task and loss is on it, and its pictures are there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

PAGE = ROOT / "docs" / "gallery.md"
FOLDER = ROOT / "docs" / "images" / "gallery"
CHARTS = ROOT / "docs" / "images" / "losses"

INSTANCE_TASKS = {"affinities", "boundary", "local_shape_descriptors"}
SIDE, GAP = 192, 6

HEAD = """# Gallery

`docs/make_gallery.py` draws these pictures from the phantom, a scan of rolled sheets that the program computes, and
from the model in the bundle.

[Derived targets](targets.md#distance_transform) shows the derived targets with their definitions.

"""
MODEL = """## A trained model

The model of the bundle on a roll that is not in its training data: truth above, prediction below.

![Truth and prediction of every target](images/gallery/model.png)

`make demo` makes this film through the volume; `make picture` makes one from a longer training:

![Truth and prediction, slice by slice](images/demo.gif)

## Losses

Each curve is the value of a [loss](losses.md) for a series of predictions.

"""


def main() -> None:
    """Draw and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page or a picture is missing")
    parser.add_argument("--all", action="store_true", help="draw every picture anew")
    options = parser.parse_args()
    text = page()
    if options.check:
        missing = [path.name for path in pictures() if not path.is_file()]
        if missing or not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"out of date: gallery.md {' '.join(missing)}")
        return
    for folder in (FOLDER, CHARTS):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = [path for path in pictures() if options.all or not path.is_file()]
    draw_tasks([name for name in task_names() if FOLDER / f"{name}.png" in wanted])
    draw_losses([name for name in loss_names() if CHARTS / f"{name}.png" in wanted])
    if FOLDER / "model.png" in wanted:
        draw_model()
    PAGE.write_text(text, encoding="utf-8")


def task_names() -> tuple[str, ...]:
    """Return the types of derived targets."""
    from volumen.derived.registry import task_types

    return tuple(sorted(task_types()))


def pictures() -> list[Path]:
    """Return the paths of all pictures."""
    tasks = [FOLDER / f"{name}.png" for name in task_names()]
    return [*tasks, FOLDER / "model.png", *(CHARTS / f"{name}.png" for name in loss_names())]


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    parts.append(MODEL)
    for group in GROUPS:
        parts.append(f"### {group.title}\n\n{group.text}\n\n")
        parts += [f"![{name} against {group.axis}](images/losses/{name}.png)\n" for name in group.losses]
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def loss_names() -> list[str]:
    """Return the names of all losses."""
    from volumen.losses.registry import loss_names as names

    return names()


# -- derived targets ---------------------------------------------------------------------------------------------


def sheet() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, labels and known voxels of a roll (Z, Y, X): half of its slices are labelled."""
    from volumen.phantom.geometry import Roll, sheet_geometry
    from volumen.phantom.volume import scan

    shape = (48, 96, 96)
    geometry = sheet_geometry(Roll.draw(shape, 3), shape)
    known = np.ones(shape, bool)
    known[:, :, 78:] = False
    return scan(geometry.distance, geometry.along, 3), (geometry.distance <= 0).astype(np.uint8), known


def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, instance numbers and known pixels of touching cells (1, Y, X)."""
    generator = np.random.default_rng(4)
    centres = generator.uniform(4, 92, (22, 2))
    grid = np.stack(np.meshgrid(np.arange(96), np.arange(96), indexing="ij"), -1)
    distances = np.linalg.norm(grid[:, :, None] - centres, axis=-1)
    numbers = (distances.argmin(-1) + 1).astype(np.uint8)
    numbers[distances.min(-1) > 13] = 0
    border = np.zeros(numbers.shape, bool)
    for axis in (0, 1):
        border |= numbers != np.roll(numbers, 1, axis)
    image = 70 + 80 * (numbers > 0) - 50 * (border & (numbers > 0)) + generator.normal(0, 10, numbers.shape)
    return np.clip(image, 0, 255).astype(np.uint8), numbers, np.ones(numbers.shape, bool)


def draw_tasks(names: Sequence[str]) -> None:
    """Draw image, label and result of tasks."""
    from volumen.transforms.derive import DeriveTargetsd

    image, label, known = sheet()
    picture, numbers, _ = cells()
    for name in names:
        instances = name in INSTANCE_TASKS
        values, shown = (numbers, picture) if instances else (label, image)
        sample: dict[Any, Any] = {"source": values[None]}
        if not instances:
            sample["source_mask"] = known[None]
        derived = DeriveTargetsd({"t": {"type": name, "source_target": "source"}}, unit="voxel")(sample)
        result, valid = np.asarray(derived["t"]), np.asarray(derived["t_mask"])[0]
        if not instances:
            middle = len(image) // 2
            result, valid, shown, values = result[:, middle], valid[middle], shown[middle], values[middle]
        save(
            [grey_of(shown), label_of(shown, values), result_of(name, result, valid)], FOLDER / f"{name}.png"
        )


def grey_of(image: np.ndarray) -> np.ndarray:
    """Return the colours of an image (Y, X) uint8."""
    from volumen.handlers.preview.colours import grey

    return grey(image[None] / 255.0)


def label_of(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the image overlaid with its label or its instances."""
    from volumen.handlers.preview.colours import overlay

    if label.max() <= 1:
        return overlay(grey_of(image), label[None].astype(np.float32))
    weights = np.stack([(label > 0) & (label % 8 == number) for number in range(8)])
    return overlay(grey_of(image), weights.astype(np.float32))


def result_of(name: str, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the colours of a derived target (C, Y, X)."""
    from volumen.derived.registry import task_kind
    from volumen.handlers.preview import colours

    kind = task_kind(name)
    if kind == "distance":
        drawn = colours.diverging(values[0], max(-values[0].min(), 1), max(values[0].max(), 1))
    elif kind in ("vector", "axis"):
        drawn = colours.directions(values, signed=kind == "vector")
    elif name == "nearest_component":
        drawn = colours.directions(values[:-1], signed=True)
    elif kind == "tensor":
        drawn = colours.tensor_diagonal(values, float(np.percentile(values[:, valid], 99)) or 1.0)
    elif name == "local_shape_descriptors":
        drawn = colours.directions(values[:2], signed=True)
    elif len(values) > 1:
        drawn = 255 * np.moveaxis(np.concatenate([values, values[:1]])[:3], 0, -1)
    else:
        drawn = colours.grey(values[:1])
    return colours.dim_invalid(drawn, valid)


def save(panels: Sequence[np.ndarray], path: Path) -> None:
    """Write panels (Y, X, 3) side by side."""
    from PIL import Image

    canvas = Image.new("RGB", (len(panels) * (SIDE + GAP) - GAP, SIDE), (255, 255, 255))
    for number, panel in enumerate(panels):
        tile = Image.fromarray(np.clip(panel, 0, 255).astype(np.uint8))
        canvas.paste(tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), (number * (SIDE + GAP), 0))
    canvas.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


# -- losses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Losses that are drawn against the same quantity.

    Args:
        title: heading on the page.
        text: what is varied.
        axis: its name on the chart.
        xs: its values.
        value: gives a loss, by name, at a value.
        losses: their names.
    """

    title: str
    text: str
    axis: str
    xs: np.ndarray
    value: Callable[[str, float], float]
    losses: tuple[str, ...]


def draw_losses(names: Sequence[str]) -> None:
    """Draw the curves of losses."""
    for group in GROUPS:
        for name in group.losses:
            if name in names:
                draw_curve(group, name)


def label_loss(name: str, x: float) -> float:
    """Return the loss where every voxel's true class has probability x."""
    import torch

    from volumen.losses.registry import build_loss

    grid = torch.stack(torch.meshgrid(*[torch.arange(16.0) - 7.5] * 2, indexing="ij"))
    truth = (grid.norm(dim=0) < 5).float()[None, None]
    logit = float(np.log(x) - np.log1p(-x))
    kind = "multiclass" if name == "CrossEntropyLoss" else "binary"
    if kind == "multiclass":
        one = torch.where(truth > 0, logit, -logit)
        return float(build_loss(name, {}, kind=kind)(torch.cat([-one / 2, one / 2], 1), truth.long()))
    return float(build_loss(name, {}, kind=kind)(torch.where(truth > 0, logit, -logit), truth))


def value_loss(name: str, x: float) -> float:
    """Return the loss of a prediction that is x too large everywhere."""
    import torch

    from volumen.losses.registry import build_loss

    if name == "EigenvalueLoss":
        truth = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
        return float(build_loss(name, {}, kind="tensor")(truth + x * truth, truth))
    truth = torch.ones(1, 1, 8, 8)
    kind = "distance" if name == "SignedDistanceLoss" else "field"
    return float(build_loss(name, {}, kind=kind)(truth + x, truth))


def direction_loss(name: str, x: float) -> float:
    """Return the loss of a direction turned by x degrees."""
    import torch

    from volumen.losses.registry import build_loss

    angle = np.deg2rad(x)
    truth = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    turned = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32).view(1, 2, 1, 1)
    return float(build_loss(name, {}, kind="vector")(turned.expand(1, 2, 4, 4), truth))


def smoothness_loss(name: str, x: float) -> float:
    """Return the loss of parallel directions, each turned by a random angle of standard deviation x degrees."""
    import torch

    from volumen.losses.registry import build_loss

    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    angle = torch.deg2rad(x * noise)
    return float(build_loss(name, {}, kind="vector")(torch.cat([angle.cos(), angle.sin()], 1)))


def planarity_loss(name: str, x: float) -> float:
    """Return the loss of tensors whose second eigenvalue is x times the first, the third 0."""
    import torch

    from volumen.losses.registry import build_loss

    tensor = torch.tensor([1.0, 0.0, 0.0, x, 0.0, 0.0]).view(1, 6, 1, 1, 1).expand(1, 6, 4, 4, 4)
    return float(build_loss(name, {}, kind="tensor")(tensor))


def repulsion_loss(name: str, x: float) -> float:
    """Return the loss of two certain sheets, three voxels thick, with probability x in the two voxels between them."""
    import torch

    from volumen.losses.registry import build_loss

    probability = torch.full((1, 1, 24, 8), 0.001)
    probability[:, :, 8:11] = probability[:, :, 13:16] = 0.999
    probability[:, :, 11:13] = x
    outward = torch.zeros(1, 2, 24, 8)
    outward[:, 1, :10], outward[:, 1, 10:12], outward[:, 1, 12:14], outward[:, 1, 14:] = -1, 1, -1, 1
    return float(build_loss(name, {}, kind="vector")(outward, outward, source_pred=torch.logit(probability)))


GROUPS = (
    Group(
        "Labels",
        "A prediction gives the true class of every pixel of a disc's image the same probability. The last one sees a"
        " skeleton\nonly where the probability is above that of what is around it, so it is 0 from one half on.",
        "probability of the truth",
        np.linspace(0.02, 0.98, 49),
        label_loss,
        (
            "BCEWithLogitsLoss", "CrossEntropyLoss", "FocalLoss", "SoftDiceLoss", "TverskyLoss", "DiceCELoss",
            "BoundaryLoss", "FieldWeightedLoss", "SkeletonRecallLoss", "SoftClDiceLoss",
        ),
    ),
    Group(
        "Values",
        "The truth plus an error everywhere, in the target's unit.",
        "error",
        np.linspace(-4, 4, 81),
        value_loss,
        (
            "MSELoss", "MaskedMSELoss", "L1Loss", "SmoothL1Loss", "WeightedSmoothL1Loss", "SignedDistanceLoss",
            "EigenvalueLoss",
        ),
    ),
    Group(
        "Directions",
        "The truth turned by an angle.",
        "angle in degrees",
        np.linspace(0, 180, 61),
        direction_loss,
        ("CosineSimilarityLoss", "SignInvariantCosineLoss"),
    ),
    Group(
        "Neighbours: smoothness",
        "Parallel directions, each turned by a random angle.",
        "spread in degrees",
        np.linspace(0, 90, 31),
        smoothness_loss,
        ("NormalSmoothnessLoss",),
    ),
    Group(
        "Neighbours: repulsion",
        "Two certain sheets that face each other two voxels apart, and what is predicted between them.",
        "probability between them",
        np.linspace(0.01, 0.99, 50),
        repulsion_loss,
        ("NormalGatedRepulsionLoss",),
    ),
    Group(
        "Shape",
        "Structure tensors from a sheet's (one eigenvalue above 0) to a tube's (two that are equal).",
        "second eigenvalue / first",
        np.linspace(0, 1, 21),
        planarity_loss,
        ("PlanarityLoss",),
    ),
)  # fmt: skip


def draw_curve(group: Group, name: str) -> None:
    """Draw the chart of a loss."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, scale = 230, 170, 2
    xs = group.xs
    canvas = Image.new("RGB", (width * scale, height * scale), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(11 * scale)
    ys = np.array([group.value(name, float(x)) for x in xs])
    low, high = min(0.0, float(ys.min())), float(ys.max())
    box = (40 * scale, 26 * scale, (width - 12) * scale, (height - 34) * scale)
    draw.rectangle(box, outline=(170, 175, 180), width=scale)
    points = [
        (
            box[0] + (x - xs[0]) / (xs[-1] - xs[0]) * (box[2] - box[0]),
            box[3] - (y - low) / (high - low) * (box[3] - box[1]),
        )
        for x, y in zip(xs, ys)
    ]
    draw.line(points, fill=(0, 114, 178), width=2 * scale, joint="curve")
    draw.text((box[0], 6 * scale), name, font=font, fill=(20, 24, 28))
    for text, x, y, anchor in (
        (f"{high:.3g}", box[0] - 4 * scale, box[1], "rm"),
        (f"{low:.3g}", box[0] - 4 * scale, box[3], "rm"),
        (f"{round(xs[0], 1):g}", box[0], box[3] + 4 * scale, "lt"),
        (f"{round(xs[-1], 1):g}", box[2], box[3] + 4 * scale, "rt"),
        (group.axis, (box[0] + box[2]) / 2, box[3] + 4 * scale, "mt"),
    ):
        draw.text((x, y), text, font=font, fill=(90, 96, 104), anchor=anchor)
    # Two fit into a page's column.
    small = canvas.resize((330, 330 * height // width), Image.Resampling.LANCZOS)
    small.quantize(32, dither=Image.Dither.NONE).save(CHARTS / f"{name}.png", optimize=True)


# -- the model ---------------------------------------------------------------------------------------------------


def draw_model() -> None:
    """Draw truth and prediction of the shipped model in the middle of a held-out roll."""
    from PIL import Image

    from volumen.cli.demo import draw_heldout
    from volumen.phantom.volume import write_phantom

    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder) / "data", (96, 96, 96), seed=5, heldout_shape=(64, 64, 64))
        film = Path(folder) / "film.gif"
        draw_heldout(
            Path(folder) / "data" / "heldout", ROOT / "bundle" / "models" / "model.pt", film, size=64
        )
        with Image.open(film) as frames:
            frames.seek(frames.n_frames // 2)
            picture = frames.convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(FOLDER / "model.png", optimize=True)


if __name__ == "__main__":
    main()
