"""Ensembles of several networks whose outputs are averaged, and the files and folders that list their members."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from volumen.checkpoints.nnunet_plan import fold_checkpoints, results_folder
from volumen.inference.nnunet_model import load_nnunet_predictor
from volumen.inference.placing import fits
from volumen.inference.predictor import Predictor, load_predictor
from volumen.inference.run_files import ENSEMBLE, SELECTION
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

PathName = str | PathLike[str]


def load_model(
    checkpoint: PathName | Sequence[PathName],
    device: str | torch.device = "cpu",
    *,
    strict: bool | None = None,
    fuse: bool | None = None,
) -> Predictor:
    """Load a network, or an ensemble of several; also those that nnU-Net v2 trained.

    Args:
        checkpoint: a checkpoint, or the folder of a run, or several of them; see `find_members`.
        device: device of the prediction. The weights of all members stay on a GPU if they fit into half of its free
            memory; otherwise they stay in main memory, and one member at a time is moved to the GPU.
        strict, fuse: as for `load_predictor`.

    Raises:
        VolumenError: there is nothing to load, or members differ in dimensions, channels or targets.
    """
    given = [checkpoint] if isinstance(checkpoint, str | PathLike) else list(checkpoint)
    found = [(path, settings) for item in given for path, settings in find_members(item)]
    device, settings = torch.device(device), found[0][1]
    fuse = settings.get("fuse") if fuse is None else fuse

    def load(path: Path, place: torch.device) -> Predictor:
        if results_folder(path) is not None:
            return load_nnunet_predictor(path, place, predicts_on=device)
        return load_predictor(path, place, strict=strict, fuse=fuse)

    if len(found) == 1:
        return _with_settings(load(found[0][0], device), settings)
    members = [load(path, torch.device("cpu")) for path, _ in found]
    held = fits(members, device)
    if not held:
        logger.info(
            "%d networks do not fit on %s together: each is moved there in turn", len(members), device
        )
    for member in members:
        member.network.to(device if held else "cpu")
    return _with_settings(join(members, device, " + ".join(fspath(item) for item in given)), settings)


def join(members: Sequence[Predictor], device: torch.device | None = None, path: str = "") -> Predictor:
    """Return several networks as an ensemble.

    Args:
        members: at least two networks.
        device: device of the prediction; None: that of the first network.
        path: name of the ensemble.

    Raises:
        VolumenError: members differ in dimensions, channels or targets, or one is given twice.
    """
    first = members[0]
    for member in members[1:]:
        _check_alike(first, member)
    sums = [member.checksum for member in members]
    twice = next((m.path for n, m in enumerate(members) if m.checksum and m.checksum in sums[:n]), None)
    if twice is not None:
        raise VolumenError("-m", f"the network {twice} is given twice", remedy="give each member once")
    home = torch.device(device) if device is not None else first.device
    return replace(
        first,
        members=tuple(replace(member, home=home) for member in members),
        home=home,
        path=path or " + ".join(member.path for member in members),
        checksum=hashlib.sha256(" ".join(sums).encode()).hexdigest(),
        strict=all(member.strict for member in members),
        fused={name: heads for member in reversed(members) for name, heads in member.fused.items()},
    )


def _check_alike(first: Predictor, other: Predictor) -> None:
    """Refuse a member whose outputs cannot be averaged with those of the first one.

    Raises:
        VolumenError: names the difference.
    """
    differing = None
    if len(other.patch_size) != len(first.patch_size):
        differing = (f"{len(first.patch_size)} dimensions", str(len(other.patch_size)))
    elif other.in_channels != first.in_channels:
        differing = (f"{first.in_channels} image channels", str(other.in_channels))
    elif set(other.targets) != set(first.targets):
        differing = (f"the targets {', '.join(first.targets)}", ", ".join(other.targets))
    else:
        for name, head in first.targets.items():
            if other.targets[name] != head:
                differing = (f"target {name}: {_described(head)}", _described(other.targets[name]))
                break
    if differing is not None:
        raise VolumenError(
            other.path,
            expected=f"{differing[0]}, as {first.path} has",
            found=differing[1],
            remedy="average networks that were trained on the same targets and channels",
        )


def _described(head: Any) -> str:
    return f"{head.kind}, {head.channels} channels, {head.activation}"


def find_members(path: PathName, *, selected: bool = True) -> list[tuple[Path, dict[str, Any]]]:
    """Return the checkpoints of a path, each with the settings that were selected for it.

    Args:
        path: a checkpoint; the folder of a run (its best checkpoint, else its newest); the folder of a run with folds
            (the checkpoints of all folds); the folder of a selection by `volumen select`; or the listing file in it; or
            a folder of nnU-Net v2's results with `plans.json` (its folds).
        selected: whether a selection in the folder takes precedence over its folds.

    Raises:
        VolumenError: no such path, a folder without checkpoints, or folds that are not trained yet.
    """
    path = Path(path)
    if path.is_dir() and results_folder(path) is not None:
        return [(file, {}) for file in fold_checkpoints(path)]
    if path.is_dir():
        names = (SELECTION, ENSEMBLE) if selected else (ENSEMBLE,)
        listing = next((path / name for name in names if (path / name).is_file()), None)
        return [(run_checkpoint(path), {})] if listing is None else _listed(listing)
    return _listed(path) if path.suffix == ".json" and path.is_file() else [(path, {})]


def _listed(listing: Path) -> list[tuple[Path, dict[str, Any]]]:
    content = read_listing(listing)
    settings = content.get("inference_config") or {}
    members = [listing.parent / str(member) for member in content["members"]]
    missing = [member for member in members if not member.exists() or (member.is_dir() and not _any(member))]
    if missing:
        raise VolumenError(
            listing,
            expected=f"{len(members)} trained networks",
            found=f"none at {missing[0]}",
            remedy="give the same volumen train command again: it goes on from here",
        )
    return [(run_checkpoint(member) if member.is_dir() else member, settings) for member in members]


def read_listing(path: Path) -> Mapping[str, Any]:
    """Return the content of an `ensemble.json` or `selection.json`.

    Raises:
        VolumenError: the file is unreadable or lists no members.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VolumenError(path, f"cannot be read ({error})") from None
    if not isinstance(content, Mapping) or not content.get("members"):
        raise VolumenError(path, expected="a list of members", found=str(content)[:60])
    return content


def run_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of a run to predict with: the best one, else the newest.

    Raises:
        VolumenError: the folder has no checkpoint, or those of several runs.
    """
    best = sorted(folder.glob("*_best.pth"))
    if len(best) == 1:
        return best[0]
    if len(best) > 1:
        raise VolumenError(
            folder, f"holds {len(best)} runs, such as {best[0].name}", remedy="give one of these files"
        )
    epochs = [
        (int(match[1]), path)
        for path in folder.glob("*.pth")
        if (match := re.search(r"_(\d+)\.pth$", path.name))
    ]
    if not epochs:
        raise VolumenError(
            folder, "holds no checkpoint", remedy="give a .pth file, or the folder of a run: OUT/<model name>"
        )
    return max(epochs)[1]


def _any(folder: Path) -> bool:
    return any(folder.glob("*.pth"))


def _with_settings(predictor: Predictor, settings: Mapping[str, Any]) -> Predictor:
    """Return a copy of a predictor with the selected settings in its snapshot."""
    if not settings:
        return predictor
    inference = {**(predictor.config.get("inference_config") or {}), **settings}
    return replace(predictor, config={**predictor.config, "inference_config": inference})
