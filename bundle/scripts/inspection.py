"""`volumen inspect`: what a data folder holds, and what would be trained on it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.config import ConfigManager
from scripts.data.layout import OpenCase
from scripts.errors import VolumenError
from scripts.networks.planning import by
from scripts.train import experiment_sections

logger = logging.getLogger(__name__)

# Volumes listed one by one; a larger folder is summed up in a last line.
_MOST_ROWS = 40


def run_inspect(options: argparse.Namespace) -> int:
    """Print the tables, and write the contact sheet if one is asked for.

    Returns:
        0.

    Raises:
        VolumenError: for anything wrong in the data or the settings.
    """
    from rich.console import Console

    sections, origin = experiment_sections(options)
    settings: dict[str, Any] = dict(sections)
    config = ConfigManager(
        **settings, dataset_dir=options.input, device=options.device or "auto", origin=origin
    )
    console = Console()
    profiles = _labelled(config)
    console.print(_volume_table(config, profiles))
    console.print(_target_table(config, profiles))
    console.print(_patch_summary(config))
    console.print(config.plan.table(), highlight=False)
    console.print(_memory_summary(config))
    if options.sheet:
        console.print(f"contact sheet: {write_sheet(config, Path(options.sheet))}")
    return 0


def _labelled(config: ConfigManager) -> dict[str, dict[str, list[np.ndarray]]]:
    from scripts.data.split import labelled_profiles

    return labelled_profiles(config.cases, list(config.primary_targets), ignore_labels=config.ignore_labels)


def _volume_table(config: ConfigManager, profiles: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{config.layout.root} ({config.layout.format})", title_justify="left")
    for column in ("volume", "shape", "channels", "dtype", "spacing", "targets (labelled share)"):
        table.add_column(column)
    for case in config.cases[:_MOST_ROWS]:
        table.add_row(
            case.name,
            by(case.image.shape),
            str(case.image.channels),
            str(np.dtype(case.image.dtype)),
            " ".join(f"{value:g}" for value in case.spacing),
            ", ".join(
                f"{target} {_share(axes, case.image.shape):.1%}"
                for target, axes in profiles[case.name].items()
            )
            or "none",
        )
    if len(config.cases) > _MOST_ROWS:
        table.add_row(f"... and {len(config.cases) - _MOST_ROWS} more", "", "", "", "", "")
    return table


def _target_table(config: ConfigManager, profiles: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="targets", title_justify="left")
    for column in ("target", "kind", "channels", "volumes", "masked", "labelled share"):
        table.add_column(column)
    for name, target in config.primary_targets.items():
        with_label = [case for case in config.cases if name in case.labels]
        labelled = sum(float(profiles[case.name][name][0].sum()) for case in with_label)
        voxels = sum(float(np.prod(case.image.shape)) for case in with_label)
        table.add_row(
            name,
            target.kind,
            str(target.out_channels),
            f"{len(with_label)} of {len(config.cases)}",
            str(sum(name in case.masks for case in config.cases)),
            f"{labelled / voxels:.2%}" if voxels else "none",
        )
    return table


def _patch_summary(config: ConfigManager) -> str:
    from scripts.data.patches import find_valid_patches

    settings = config.dataset_config
    index = find_valid_patches(
        config.cases,
        config.split.train,
        config.patch_size,
        targets=list(config.primary_targets),
        min_labeled_ratio=settings.min_labeled_ratio,
        min_bbox_percent=settings.min_bbox_percent,
        stride=settings.patch_stride,
        ignore_labels=config.ignore_labels,
        skip_patch_validation=settings.skip_patch_validation,
        search_cases=config.search_cases,
        cache_dir=config.cache_dir,
        relax=config.relaxes_labeled_ratio,
        allow_empty=True,
    )
    return (
        f"patches of {by(config.patch_size)}: {len(index)} valid ones for training"
        f" (at least {settings.min_labeled_ratio:.0%} labelled)"
    )


def _memory_summary(config: ConfigManager) -> str:
    """Estimate what training needs, from a forward pass's feature maps: no allocation, a rough guide."""
    import torch

    from scripts.networks.multihead import MultiHeadDynUNet

    with torch.device("meta"):
        network = MultiHeadDynUNet.from_config(config.network_config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    activations = _activation_bytes(
        network, (config.tr_config.batch_size, config.in_channels, *config.patch_size)
    )
    # Weights, gradients and AdamW's two moments in float32, plus the feature maps kept for the backward pass.
    total = parameters * 16 + activations
    return (
        f"network: {parameters / 1e6:.1f} M parameters; training at batch {config.tr_config.batch_size} in float32"
        f" needs about {total / 2**30:.1f} GiB"
    )


def _activation_bytes(network: Any, shape: tuple[int, ...]) -> int:
    import torch

    kept = 0

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal kept
        if isinstance(output, torch.Tensor):
            kept += output.numel() * 4

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    network(torch.empty(shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return kept


def write_sheet(config: ConfigManager, path: Path, *, most: int = 24, tile: int = 240) -> Path:
    """Write a contact sheet: a slice of each volume with the labels' outlines over the image.

    Args:
        config: the experiment.
        path: a PNG to write.
        most: volumes shown.
        tile: size of a picture in pixels.

    Returns:
        The path.

    Raises:
        VolumenError: the file exists and is not a PNG, or cannot be written.
    """
    from PIL import Image, ImageDraw

    if path.exists() and path.suffix.lower() != ".png":
        raise VolumenError("--sheet", expected="a .png file", found=str(path))
    tiles = [(case, _tile(case, list(config.primary_targets), tile)) for case in config.cases[:most]]
    columns = min(6, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (tile + 8) + 8, rows * (tile + 28) + 8), (24, 24, 27))
    draw = ImageDraw.Draw(sheet)
    for number, (case, picture) in enumerate(tiles):
        x, y = 8 + number % columns * (tile + 8), 8 + number // columns * (tile + 28)
        sheet.paste(Image.fromarray(picture), (x, y + 18))
        draw.text((x, y + 2), case.name[: tile // 7], fill=(228, 228, 231))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise VolumenError(path, f"cannot be written ({error})", remedy="choose another --sheet") from None
    return path


# Outline colours per target, distinguishable in the common kinds of colour blindness (Okabe and Ito 2008).
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))


def _tile(case: OpenCase, targets: Iterable[str], size: int) -> np.ndarray:
    """Return (size, size, 3) uint8: the slice with most labels, the whole plane scaled to fit."""
    from PIL import Image

    plane = _richest_plane(case)
    steps = [max(1, -(-extent // size)) for extent in case.image.shape[-2:]]
    step = max(steps)
    image = case.image.read(plane).reshape(case.image.channels, *case.image.shape[-2:])[:, ::step, ::step]
    grey = (
        image[:3].astype(np.float32)
        if len(image) >= 3
        else np.repeat(image[:1].astype(np.float32), 3, axis=0)
    )
    low, high = np.percentile(grey, (0.5, 99.5))
    picture = np.clip((grey - low) / max(high - low, 1e-6), 0, 1).transpose(1, 2, 0) * 255
    for colour, target in zip(_COLOURS, [name for name in targets if name in case.labels]):
        labelled = np.asarray(case.labels[target].read(plane) != 0).max(axis=0)
        label = labelled.reshape(case.image.shape[-2:])[::step, ::step]
        inner = label.copy()
        inner[1:] &= label[:-1]
        inner[:-1] &= label[1:]
        inner[:, 1:] &= label[:, :-1]
        inner[:, :-1] &= label[:, 1:]
        picture[label & ~inner] = colour
        picture[inner] = 0.75 * picture[inner] + 0.25 * np.asarray(colour)
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    fitted = Image.fromarray(picture.astype(np.uint8)).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))),
        Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS,
    )
    canvas[: fitted.height, : fitted.width] = np.asarray(fitted)
    return canvas


def _richest_plane(case: OpenCase) -> tuple[slice, ...]:
    """Return the region of one plane: of the slices of a 3D volume, one of nine that has most labels."""
    shape = case.image.shape
    whole = tuple(slice(0, extent) for extent in shape)
    if len(shape) == 2:
        return whole
    candidates = sorted({int(z) for z in np.linspace(0, shape[0] - 1, 9)})
    labels = list(case.labels.values())

    def labelled(z: int) -> int:
        return sum(int(np.count_nonzero(label.read((slice(z, z + 1), *whole[1:])))) for label in labels)

    best = max(candidates, key=labelled) if labels else shape[0] // 2
    return (slice(best, best + 1), *whole[1:])


def _share(axes: list[np.ndarray], shape: tuple[int, ...]) -> float:
    return float(axes[0].sum()) / float(np.prod(shape))
