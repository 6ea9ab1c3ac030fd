"""`volumen train`: converts flags and experiment file to overrides of the bundle's `train.yaml`, and runs it."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from volumen.config.experiment_file import (
    SECTION_NAMES,
    assign,
    merge,
    parse_assignment,
    read_experiment,
    shipped_sections,
)
from volumen.data.space.units import parse_length
from volumen.utils.bundle_root import configs_dir
from volumen.utils.errors import VolumenError
from volumen.version import __version__

logger = logging.getLogger(__name__)

# Flag -> section and key of its value.
_FLAGS: dict[str, tuple[str, str]] = {
    "format": ("dataset_config", "format"),
    "train_split": ("tr_setup", "tr_val_split"),
    "val_volumes": ("dataset_config", "val_volumes"),
    "val_input": ("dataset_config", "val_path"),
    "split": ("dataset_config", "split_path"),
    "fold": ("dataset_config", "fold"),
    "group_by": ("dataset_config", "group_by"),
    "loss_on_label_only": ("tr_setup", "compute_loss_on_labeled_only"),
    "model_name": ("tr_setup", "model_name"),
    "seed": ("tr_setup", "seed"),
    "batch_size": ("tr_config", "batch_size"),
    "max_epochs": ("tr_config", "max_epoch"),
    "preset": ("tr_config", "preset"),
    "time_budget": ("tr_config", "time_budget"),
    "steps_per_epoch": ("tr_config", "max_steps_per_epoch"),
    "val_steps": ("tr_config", "max_val_steps_per_epoch"),
    "amp": ("tr_config", "amp"),
    "workers": ("tr_config", "num_dataloader_workers"),
}


def run_train(options: argparse.Namespace) -> int:
    """Train with the given options.

    Args:
        options: the parsed options of `volumen train`.

    Returns:
        Exit code: 0 when training finished, 130 or 143 when a signal stopped it.

    Raises:
        VolumenError: the options, the experiment file or the data are wrong.
    """
    if options.nproc < 1:
        raise VolumenError("--nproc", expected="at least 1", found=options.nproc)
    if options.nproc > 1 and "RANK" not in os.environ and options.folds is None and options.rounds is None:
        return run_processes(options.nproc, options.words)
    sections, origin = experiment_sections(options)
    check_early(sections, origin)
    if options.rounds is not None:
        from volumen.cli.rounds import train_rounds

        return train_rounds(options, sections, origin)
    if options.folds is not None:
        from volumen.cli.folds import train_folds

        return train_folds(options, sections, origin)
    overrides = bundle_overrides(options, sections, origin, "training on %s")
    for overlay in options.config_file:
        check_overlay(overlay)
    if options.tracking:
        check_tracking(options.tracking)
    from volumen.run import run_bundle

    return run_bundle("train.yaml", options.config_file, overrides, tracking=options.tracking)


def bundle_overrides(
    options: argparse.Namespace, sections: Mapping[str, Any], origin: str, said: str
) -> dict[str, Any]:
    """Return what replaces values of the bundle's config, and log on what data the run works.

    Args:
        options: the parsed options.
        sections: the merged sections.
        origin: name of the file that they come from.
        said: what is logged, with a place for the data.
    """
    data = options.input or sections["dataset_config"].get("data_path")
    if data:
        shown = data if isinstance(data, str) else ", ".join(map(str, data))
        logger.info(f"volumen %s: {said}", __version__, shown)
    overrides: dict[str, Any] = {**sections, "experiment#origin": origin}
    for key, value in (
        ("dataset_dir", options.input),
        ("output_dir", options.output),
        ("device_name", options.device),
    ):
        if value is not None:
            overrides[key] = value
    # Otherwise the bundle would choose a default folder, which may be the installed package.
    overrides.setdefault("output_dir", sections["tr_setup"].get("ckpt_out_base"))
    return overrides


def check_early(sections: Mapping[str, Mapping[str, Any]], origin: str) -> None:
    """Check the settings before MONAI is imported, which takes seconds.

    Raises:
        VolumenError: a wrong key or value.
    """
    from volumen.config.validation import check_sections

    check_sections(sections, origin)


def check_tracking(tracking: str) -> None:
    """Refuse `--tracking` if the tracker is not installed or the file of its settings does not exist.

    Raises:
        VolumenError: the package or the file is missing; names what to install.
    """
    from importlib.util import find_spec

    if tracking != "mlflow":
        if not Path(tracking).is_file():
            raise VolumenError(
                "--tracking", expected="mlflow, or a file of MONAI's settings", found=repr(tracking)
            )
    elif find_spec("mlflow") is None:
        raise VolumenError("--tracking", "mlflow is not installed", remedy="pip install 'volumen[mlflow]'")


def check_overlay(overlay: str, names: Sequence[str] = ("train.yaml",)) -> None:
    """Refuse an overlay with experiment settings, which would be overridden silently, unknown objects, or changes
    inside of a copy.

    Args:
        overlay: the bundle config that the user gave.
        names: the bundle's own configs below it.

    Raises:
        VolumenError: names the file and its key.
    """
    from monai.bundle import ConfigParser

    if not Path(overlay).is_file():
        raise VolumenError(overlay, "no such file", remedy="check --config-file")
    content = ConfigParser.load_config_file(overlay)
    for target in _targets(content):
        _check_importable(target, overlay)
    shipped: dict[str, Any] = {}
    for name in names:
        shipped.update(ConfigParser.load_config_file(configs_dir() / name))
    for key in content:
        places = str(key).lstrip("+").replace("::", "#").split("#")
        _refuse_inside_copy(shipped, places, f"{overlay}: {key}")
        if places[0] in SECTION_NAMES:
            raise VolumenError(
                f"{overlay}: {key}",
                "settings of the experiment have no effect in a bundle config",
                remedy="put them into an experiment file given with --config-path, or use --set",
            )


def _refuse_inside_copy(config: Any, places: Sequence[str], where: str) -> None:
    """Refuse a change of one value of an object that the config copies from elsewhere (%): MONAI copies it later.

    Args:
        config: the config that is changed.
        places: the parts of the key.
        where: file and key, for the error.
    """
    for depth, place in enumerate(places):
        if isinstance(config, str) and config.startswith("%"):
            rest = "#".join([config[1:], *places[depth:]])
            raise VolumenError(
                where,
                f"{'#'.join(places[:depth])} is a copy of {config[1:]}",
                remedy=f"change {rest}, for training and validation, or give {'#'.join(places[:depth])} as a whole",
            )
        if isinstance(config, list):
            config = config[int(place)] if place.isdigit() and int(place) < len(config) else None
        else:
            config = config.get(place) if isinstance(config, Mapping) else None


def _targets(nest: Any) -> Iterator[str]:
    """Yield the dotted name of every object that a config declares; names without a dot are those of MONAI."""
    if isinstance(nest, Mapping):
        target = nest.get("_target_")
        if isinstance(target, str) and "." in target and target[0] not in "$@%":
            yield target
    if isinstance(nest, Mapping | list):
        for value in nest.values() if isinstance(nest, Mapping) else nest:
            yield from _targets(value)


def _check_importable(target: str, overlay: str) -> None:
    """Report the object of an overlay that cannot be found in one line, before MONAI reports it in forty."""
    import pydoc

    remedy = "correct the name, install its package, or put its folder on PYTHONPATH"
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise VolumenError(
            f"{overlay}: {target}", f"cannot be imported ({error.value})", remedy=remedy
        ) from None
    if found is None:
        raise VolumenError(f"{overlay}: {target}", "there is no such object", remedy=remedy)


def run_processes(count: int, words: Sequence[str]) -> int:
    """Run the same command in several processes of this machine.

    Args:
        count: number of processes.
        words: the command line after `volumen`.

    Returns:
        The exit code that the command would have in one process.
    """
    from volumen.cli.running.launch import run_passing_signals

    return run_passing_signals([sys.executable, "-m", "volumen.cli.running.processes", str(count), *words])


def experiment_sections(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], str]:
    """Merge defaults, experiment file and flags, in this order of increasing precedence.

    Args:
        options: parsed options with any of the flags.

    Returns:
        All sections, and the name of the file for error messages.
    """
    sections = shipped_sections()
    origin = "settings"
    if options.config_path:
        sections = merge(sections, read_experiment(options.config_path))
        origin = str(options.config_path)
    for flag, (section, key) in _FLAGS.items():
        value = getattr(options, flag, None)
        if value is not None:
            sections[section][key] = value
    if getattr(options, "patch_size", None):
        sections["tr_config"]["patch_size"] = parse_patch_size(options.patch_size)
    if getattr(options, "resume", None) is not None:
        sections["tr_setup"]["resume"] = True
        if options.resume:
            sections["tr_setup"].update(checkpoint_path=options.resume, load_weights_only=False)
    if getattr(options, "finetune", None):
        sections["tr_setup"].update(checkpoint_path=options.finetune, load_weights_only=True)
    for text in options.set:
        keys, value = parse_assignment(text)
        assign(sections, keys, value)
    if getattr(options, "loss", None):
        _set_losses(sections, options.loss)
    return sections, origin


def parse_patch_size(text: str) -> list[int | str] | str:
    """Read `192,192,192` (also with x or spaces), or lengths: `20um,5um,5um`, or `20um` for every axis.

    Raises:
        VolumenError: the text is not two or three positive whole numbers or lengths, or one length.
    """
    words = re.sub(r"(\d\.?)\s+([^\W\d_])", r"\1\2", text.replace("x", ",").strip("[]()"))
    parts = [part for part in re.split(r"[,\s]+", words) if part]
    size = [int(part) if part.isdecimal() else part for part in parts]
    lengths = [part for part in size if isinstance(part, str)]
    known = all(parse_length(part) is not None for part in lengths)
    counted = len(size) in (2, 3) or (len(size) == 1 and bool(lengths))
    if not known or not counted or any(isinstance(part, int) and part < 1 for part in size):
        raise VolumenError(
            "--patch-size",
            expected="two or three positive numbers such as 64,64,64, or lengths such as 20um,5um,5um or 20um",
            found=repr(text),
        )
    return lengths[0] if len(size) == 1 else size


def _set_losses(sections: dict[str, dict[str, Any]], words: Sequence[str]) -> None:
    """Set the losses of `--loss` for every labelled target, including targets that are found later in the data."""
    names = [name.strip(" []'\"") for word in words for name in word.split(",")]
    losses = [{"name": name} for name in names if name]
    sections["tr_config"]["losses"] = losses
    for section in (sections["dataset_config"], sections["model_config"]):
        targets = section.get("targets") or {}
        if isinstance(targets, Mapping):  # any other type is refused with the section
            section["targets"] = {name: _with_losses(entry, losses) for name, entry in targets.items()}


def _with_losses(entry: Any, losses: list[dict[str, str]]) -> Any:
    return {**(entry or {}), "losses": losses} if isinstance(entry or {}, Mapping) else entry
