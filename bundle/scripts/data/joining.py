"""Data of any layout, and several data folders as one: each has a name, which tells apart volumes of the same name."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from volumen.data.formats.urls import child, is_url
from volumen.data.layout import Layout, discover
from volumen.data.pairing import Case, check_complete, check_targets
from volumen.data.raw_dataset import find_raw
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def discover_any(
    root: str | PathLike,
    *,
    format: str | None = None,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
    partial: bool = False,
) -> Layout:
    """Find images, labels and masks of a folder in our layout or in that of nnU-Net or MSD, or of a list of images.

    Args:
        root: the folder, or a JSON file that lists images.
        format, targets, allow_unlabeled, partial: as for `discover`.

    Raises:
        VolumenError: as `discover` and `find_raw`.
    """
    raw = find_raw(fspath(root), targets, partial=partial)
    if raw is not None:
        return raw
    return discover(root, format=format, targets=targets, allow_unlabeled=allow_unlabeled, partial=partial)


def discover_all(
    roots: Sequence[str | PathLike],
    *,
    format: str | None = None,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
) -> Layout:
    """Find the images, labels and masks of several data folders.

    A volume whose name occurs in more than one folder is called `<folder>_<volume>`.

    Args:
        roots: the folders; `NAME=FOLDER` names one, else its name is the end of its path that no other one has.
        format: format of the images; by default that of each folder.
        targets: targets to use; by default all that have a label in any folder.
        allow_unlabeled: accept images that lack the label of some target.

    Raises:
        VolumenError: a folder occurs twice, two have the same name, or `discover` refuses one of them.
    """
    folders = folder_names(roots)
    layouts = {
        name: discover_any(
            root, format=format, targets=targets, allow_unlabeled=allow_unlabeled, partial=True
        )
        for name, root in folders.items()
    }
    renamed = _distinct_cases(layouts)
    cases = tuple(case for members in renamed.values() for case in members)
    found = sorted({target for layout in layouts.values() for target in layout.targets})
    where = ", ".join(child(layout.root, "labels") for layout in layouts.values())
    check_targets(where, found, targets)
    chosen = tuple(name for name in found if not targets or name in targets)
    if not allow_unlabeled:
        check_complete(cases, chosen)
    formats = dict.fromkeys(layout.format for layout in layouts.values())
    return Layout(
        root=", ".join(folders.values()),
        format=" and ".join(formats),
        cases=cases,
        targets=chosen,
        validates=_validating(layouts, renamed),
        folds=_folds(layouts, renamed),
        stated=_stated(layouts),
        members={folders[name]: tuple(case.name for case in members) for name, members in renamed.items()},
    )


def discover_images(roots: Sequence[str | PathLike], *, format: str | None = None) -> Layout:
    """Find the images of one or several data folders, whatever labels there are, for learning without labels.

    Args:
        roots, format: as for `discover_all`.

    Returns:
        A layout whose cases have no labels and no masks.

    Raises:
        VolumenError: as `discover_all`, but for labels.
    """
    folders = folder_names(roots)
    layouts = {name: discover_any(root, format=format, partial=True) for name, root in folders.items()}
    members = _distinct_cases(layouts)
    bare = {
        name: tuple(replace(case, labels={}, masks={}) for case in cases) for name, cases in members.items()
    }
    return Layout(
        root=", ".join(folders.values()),
        format=" and ".join(dict.fromkeys(layout.format for layout in layouts.values())),
        cases=tuple(case for cases in bare.values() for case in cases),
        targets=(),
        validates=_validating(layouts, members),
        members={folders[name]: tuple(case.name for case in cases) for name, cases in bare.items()},
    )


def _validating(
    layouts: Mapping[str, Layout], renamed: Mapping[str, Sequence[Case]]
) -> tuple[str, ...] | None:
    """Return the names of the cases that lists of images say to validate on; None where none does."""
    names = tuple(
        new.name
        for folder, layout in layouts.items()
        for old, new in zip(layout.cases, renamed[folder], strict=True)
        if old.name in (layout.validates or ())
    )
    return names or None


def _folds(layouts: Mapping[str, Layout], renamed: Mapping[str, Sequence[Case]]) -> dict[str, int]:
    """Return the folds that lists of images state; none unless they state that of every image."""
    folds = {
        new.name: layout.folds[old.name]
        for folder, layout in layouts.items()
        for old, new in zip(layout.cases, renamed[folder], strict=True)
        if old.name in layout.folds
    }
    return folds if len(folds) == sum(map(len, renamed.values())) else {}


def _stated(layouts: Mapping[str, Layout]) -> dict[str, Mapping[str, Any]]:
    """Return what the descriptions of the folders say of targets.

    Raises:
        VolumenError: two contradict each other.
    """
    stated: dict[str, Mapping[str, Any]] = {}
    for layout in layouts.values():
        for target, entry in layout.stated.items():
            if stated.setdefault(target, entry) != entry:
                raise VolumenError(
                    layout.root, f"describes the labels of {target!r} otherwise than another folder does",
                    remedy=f"say what they are in dataset_config.targets.{target}, and leave dataset.json out",
                )  # fmt: skip
    return stated


def folder_names(roots: Sequence[str | PathLike]) -> dict[str, str]:
    """Return the paths of data folders by their names.

    Args:
        roots: paths or `NAME=PATH`.

    Raises:
        VolumenError: a folder occurs twice, or two have the same name.
    """
    pairs = [named_folder(root) for root in roots]
    for path, times in Counter(_resolved(path) for _, path in pairs).items():
        if times > 1:
            raise VolumenError("-i/--input", f"the folder {path} is given twice", remedy="give it once")
    given = [name for name, _ in pairs if name]
    found = _short_names([path for name, path in pairs if not name])
    names = [name or found[path] for name, path in pairs]
    for name, times in Counter(names).items():
        if times > 1:
            raise VolumenError(
                "-i/--input",
                f"two folders are called {name!r}" + (" by NAME=FOLDER" if given.count(name) > 1 else ""),
                remedy="give each a name of its own, as in -i first=FOLDER -i second=FOLDER",
            )
    return {name: path for name, (_, path) in zip(names, pairs, strict=True)}


def named_folder(root: str | PathLike) -> tuple[str, str]:
    """Split `NAME=FOLDER`; the name is empty where none is given, or where a folder has this whole name."""
    text = fspath(root)
    name, separator, path = text.partition("=")
    if not separator or not path or not name.replace("-", "_").isidentifier() or Path(text).exists():
        return "", text
    return name, path


def _resolved(path: str) -> str:
    return path.rstrip("/") if is_url(path) else str(Path(path).resolve())


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path its last part, or as many of its last parts as tell it from the other paths."""
    parts = {path: [part for part in _resolved(path).replace("\\", "/").split("/") if part] for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        depth = next(
            (
                depth
                for depth in range(1, len(own) + 1)
                if all(other[-depth:] != own[-depth:] for other in others)
            ),
            len(own),
        )
        names[path] = "_".join(own[-depth:])
    return names


def _distinct_cases(layouts: Mapping[str, Layout]) -> dict[str, tuple[Case, ...]]:
    """Return the cases by folder; a name that occurs in several folders is preceded by that of its folder."""
    times = Counter(case.name for layout in layouts.values() for case in layout.cases)
    renamed = {
        folder: tuple(
            replace(case, name=f"{folder}_{case.name}") if times[case.name] > 1 else case
            for case in layout.cases
        )
        for folder, layout in layouts.items()
    }
    shared = [name for name, count in times.items() if count > 1]
    if shared:
        logger.info(
            "%d names of images occur in several folders, such as %s: they are called %s",
            len(shared),
            shared[0],
            " and ".join(f"{folder}_{shared[0]}" for folder in layouts if _holds(layouts[folder], shared[0])),
        )
    for name, count in Counter(case.name for cases in renamed.values() for case in cases).items():
        if count > 1:
            raise VolumenError(
                "-i/--input", f"two images are called {name!r}", remedy="give the folders other names: -i NAME=FOLDER"
            )  # fmt: skip
    return renamed


def _holds(layout: Layout, name: str) -> bool:
    return any(case.name == name for case in layout.cases)
