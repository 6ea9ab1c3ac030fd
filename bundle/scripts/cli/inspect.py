"""`volumen inspect`: shows the content of a data folder, and the training that would run on it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.cli.teaching import teaching_shares
from volumen.cli.train import experiment_sections
from volumen.config.manager import ConfigManager
from volumen.data.resampled import stored_volume
from volumen.time_budget.memory_fit import within_memory
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.console import make_console, make_table
from volumen.utils.terminal.text import by

if TYPE_CHECKING:
    from rich.console import Console

    from volumen.config.targets import Target
    from volumen.data.index.patch_index import PatchIndex
    from volumen.data.layout import OpenCase

# Largest number of listed volumes; a last line summarises the others.
_MAX_ROWS = 40


def run_inspect(options: argparse.Namespace) -> int:
    """Print the tables, and write the contact sheet if requested.

    Returns:
        0.

    Raises:
        VolumenError: the data or the settings are wrong.
    """
    from volumen.cli.contact_sheet import write_sheet

    sections, origin = experiment_sections(options)
    settings: dict[str, Any] = dict(sections)
    # No run is resumed here: that would require an output folder, which is no argument of this command.
    nothing = {"resume": False, "checkpoint_path": None, "load_weights_only": False}
    settings["tr_setup"] = {**settings["tr_setup"], **nothing}
    config = ConfigManager(
        **settings, dataset_dir=options.input, device=options.device or "auto", origin=origin
    )
    console = make_console()
    if options.check:
        _check(config, console)
    config = within_memory(config)
    _try_losses(config)
    index = _index(config)
    for part in (
        _volume_table(config, index),
        _target_table(config),
        *_derived_tables(config, index),
        _patch_summary(config, index),
        config.plan.table(),
        _memory_summary(config),
    ):
        console.print(part)
        console.print()
    if config.patch_line:
        console.print(config.patch_line)
        console.print()
    if options.sheet:
        console.print(f"contact sheet: {write_sheet(config, Path(options.sheet))}")
    return 0


def _try_losses(config: ConfigManager) -> None:
    """Try every loss on a tiny batch.

    Raises:
        VolumenError: a loss cannot be trained; names its key.
    """
    from volumen.losses.multitask import MultiTaskLoss

    setup = config.tr_config
    MultiTaskLoss(
        config.loss_sections,
        balancing=setup.loss_balancing,
        balancing_kwargs=setup.loss_balancing_kwargs,
        spacing=config.voxel_spacing,
    )


def _check(config: ConfigManager, console: Console) -> None:
    """Read all images, labels and masks, and print the result.

    Raises:
        VolumenError: some parts cannot be read; they are printed first.
    """
    from volumen.data.damage import find_damage
    from volumen.data.index.label_counts import default_threads

    volumes = [
        volume
        for case in config.cases
        for volume in (case.image, *case.labels.values(), *case.masks.values())
    ]
    damaged = find_damage(volumes, num_threads=default_threads(), progress=True)
    for damage in damaged:
        console.print(str(damage), soft_wrap=True, markup=False, highlight=False)
    if damaged:
        raise VolumenError(
            config.layout.root,
            f"{len({damage.path for damage in damaged})} of {len(volumes)} volumes cannot be read whole"
            f" (damaged parts: {len(damaged)})",
            remedy="restore these files, or take these volumes out",
        )
    console.print(f"{config.layout.root}: all of its {len(volumes)} images, labels and masks can be read\n")


def _volume_table(config: ConfigManager, index: PatchIndex) -> Any:
    columns = (
        "volume",
        "shape",
        "channels",
        "dtype",
        "spacing",
        "targets (foreground)",
        "part",
        "patches",
    )
    table = make_table(f"{config.layout.root} ({config.layout.format})", columns)
    rows = np.array([case for case, _ in index.regions], int)[index.foreground.region]
    patches = np.bincount(rows, minlength=len(config.cases))
    for number, case in enumerate(config.cases[:_MAX_ROWS]):
        shares = [
            f"{target} {_share(axes, case):.1%}"
            + f" (mask {_share(config.labelled_profiles[case.name][target], case):.1%})"
            * (target in case.masks)
            for target, axes in config.object_profiles[case.name].items()
        ]
        table.add_row(
            case.name,
            by(case.image.shape),
            str(case.image.channels),
            str(np.dtype(stored_volume(case.image).dtype)),
            _spacing_text(case),
            ", ".join(shares) or "none",
            _part(config, case.name),
            str(patches[number]),
        )
    if len(config.cases) > _MAX_ROWS:
        rest = str(patches[_MAX_ROWS:].sum())
        table.add_row(f"... and {len(config.cases) - _MAX_ROWS} more", *[""] * (len(columns) - 2), rest)
    return table


def _spacing_text(case: OpenCase) -> str:
    sizes = " ".join(f"{value:g}" for value in case.spacing)
    if case.image.spacing is None and set(case.spacing) == {1.0}:
        return f"{sizes} (assumed)"
    return " ".join(part for part in (sizes, case.unit, case.image.geometry.orientation) if part)


def _part(config: ConfigManager, name: str) -> str:
    parts = [
        word for word, boxes in (("train", config.split.train), ("val", config.split.val)) if boxes.get(name)
    ]
    return " + ".join(parts) or "unused"


def _target_table(config: ConfigManager) -> Any:
    columns = ("target", "kind", "classes", "channels", "volumes", "masked", "labelled", "foreground")
    table = make_table("targets", columns)
    for name, target in config.primary_targets.items():
        with_label = [case for case in config.cases if name in case.labels]
        labelled = _labelled_share(config, name, with_label)
        foreground = _whole_share(config.object_profiles, name, with_label)
        table.add_row(
            name,
            target.kind,
            _classes_text(target),
            str(target.out_channels),
            f"{len(with_label)} of {len(config.cases)}",
            str(sum(name in case.masks for case in config.cases)),
            labelled,
            foreground,
        )
    return table


def _derived_tables(config: ConfigManager, index: PatchIndex) -> list[Any]:
    """Return a table of derived targets with the share of labelled voxels that teach each; none without targets."""
    if not config.derived_tasks:
        return []
    columns = ("derived target", "type", "from", "validity", "labelled voxels that teach", "exact")
    table = make_table("derived targets, in some patches", columns)
    shares = teaching_shares(config, index)
    for name, task in config.derived_tasks.items():
        found = [f"{share:.0%}" for share in shares.get(name, ())] or ["", ""]
        table.add_row(name, task["type"], task["source_target"], task["validity"], *found)
    return [table]


def _labelled_share(config: ConfigManager, target: str, cases: Sequence[OpenCase]) -> str:
    """Return the share of the voxels whose label is known: those inside masks; without a mask 0 is background."""
    ignored = config.ignore_labels.get(target)
    if ignored is not None and any(target not in case.masks for case in cases):
        return f"all but {ignored}"
    voxels = sum(float(np.prod(case.image.shape)) for case in cases)
    known = sum(
        float(config.valid_profiles[case.name][target][0].sum())
        if target in case.masks
        else float(np.prod(case.image.shape))
        for case in cases
    )
    return f"{known / voxels:.2%}" if voxels else "none"


def _whole_share(
    profiles: Mapping[str, Mapping[str, Sequence[np.ndarray]]], target: str, cases: Sequence[OpenCase]
) -> str:
    """Return a target's share of all voxels of some volumes, as text."""
    counted_voxels = sum(float(profiles[case.name][target][0].sum()) for case in cases)
    voxels = sum(float(np.prod(case.image.shape)) for case in cases)
    return f"{counted_voxels / voxels:.2%}" if voxels else "none"


def _classes_text(target: Target) -> str:
    if target.instances is not None:
        return f"instances, {target.instances}"
    if target.classes:
        return ", ".join(target.classes)
    if target.kind == "multiclass":
        return f"0 to {target.out_channels - 1}"
    return "not 0" if target.kind == "binary" else f"{target.out_channels}, overlapping"


def _index(config: ConfigManager) -> PatchIndex:
    """Build the index with the training's parameters, so that training finds it in the cache."""
    from volumen.data.index.patches import find_valid_patches

    settings = config.dataset_config
    return find_valid_patches(
        config.cases,
        config.split.train,
        config.patch_size,
        targets=list(config.primary_targets),
        min_labeled_ratio=settings.min_labeled_ratio,
        min_bbox_percent=settings.min_bbox_percent,
        stride=settings.patch_stride,
        ignore_labels=config.ignore_labels,
        classes=config.sampled_classes,
        background=settings.bg_sampling_enabled,
        jitter=True,
        objects_only=config.tr_setup.compute_loss_on_labeled_only,
        skip_patch_validation=settings.skip_patch_validation,
        search_cases=config.search_cases,
        cache_dir=config.cache_dir,
        relax=config.relaxes_labeled_ratio,
        allow_empty=True,
    )


def _patch_summary(config: ConfigManager, index: PatchIndex) -> str:
    settings = config.dataset_config
    found = f"patches of {by(config.patch_size)}: {len(index)} valid ones for training"
    if settings.skip_patch_validation:
        return f"{found} (the whole grid)"
    least = float(np.min(index.foreground.share)) if len(index) else 0.0
    what = "labelled" if all(case.masks for case in config.cases) else "foreground"
    if what == "foreground" and any(case.masks for case in config.cases):
        what = "labelled, or foreground where there is no mask"
    condition = f"at least {settings.min_labeled_ratio:.0%} {what}"
    if len(index) and least < settings.min_labeled_ratio - 1e-3:
        ratio = f"{settings.min_labeled_ratio:.0%}"
        condition = f"at least {ratio} {what}; at least {least:.1%} in images that reach {ratio} nowhere"
    background = f", {len(index.background)} of background" if settings.bg_sampling_enabled else ""
    return f"{found} ({condition}){background}"


def _memory_summary(config: ConfigManager) -> str:
    """Return the estimated peak memory of a training step."""
    from volumen.time_budget.memory_estimate import step_memory
    from volumen.utils.precision import choose_dtype

    needed = step_memory(config)
    precision = str(choose_dtype(config.tr_config.amp, config.device) or "float32").removeprefix("torch.")
    return (
        f"network: {needed.parameters / 1e6:.1f} M parameters; training at batch {config.tr_config.batch_size} in"
        f" {precision} needs about {needed.total / 2**30:.1f} GiB"
    )


def _share(axes: list[np.ndarray], case: OpenCase) -> float:
    return float(axes[0].sum()) / float(np.prod(case.image.shape))
