"""Lists of images and labels in MONAI's form: one dictionary per case, instead of a folder with `images/`, `labels/`.

A case with one target is `{"image": path, "label": path}`; a list of paths in place of the image's are its channels.
Several targets have the keys `label_<target>`. The key of a mask is `mask` (for all targets) or `mask_<target>`. MONAI
Label, federated learning and Auto3DSeg use the keys `image` and `label`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from volumen.data.case_names import case_of
from volumen.data.formats.channel_files import channel_paths, joined_path, name_without_channels
from volumen.data.formats.detection import detect_format, split_suffix
from volumen.data.formats.urls import is_url
from volumen.data.layout import Layout
from volumen.data.pairing import Case
from volumen.utils.errors import VolumenError

IMAGE, LABEL, MASK = "image", "label", "mask"


class CaseItems(Sequence[dict[str, str]]):
    """The cases of one part of an experiment's split as such dictionaries, computed at first use.

    Args:
        find: returns the cases and the names of the targets.
    """

    def __init__(self, find: Callable[[], tuple[Sequence[Case], Sequence[str]]]) -> None:
        self._find = find
        self._items: list[dict[str, str]] | None = None

    @property
    def items(self) -> list[dict[str, str]]:
        """The dictionaries."""
        if self._items is None:
            cases, targets = self._find()
            self._items = [case_item(case, targets) for case in cases]
        return self._items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, str]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | list[dict[str, str]]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.items)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, here or in another process, is a plain list.
        return list, (self.items,)


def case_item(case: Case, targets: Sequence[str]) -> dict[str, str]:
    """Return a case as a dictionary; `label` is the label of the first target that has one."""
    labelled = [target for target in targets if target in case.labels]
    item = {IMAGE: case.image}
    if labelled:
        item[LABEL] = case.labels[labelled[0]]
    if len(targets) > 1:
        item.update({f"{LABEL}_{target}": case.labels[target] for target in labelled})
    item.update({f"{MASK}_{target}": path for target, path in case.masks.items()})
    return item


def layout_of(
    items: Sequence[Mapping[str, Any]],
    *,
    root: str | None = None,
    target: str = LABEL,
    where: str = "datalist",
) -> Layout:
    """Return the layout that a list of dictionaries describes.

    Args:
        items: dictionaries as described in the module; other keys are ignored.
        root: folder of relative paths; None for the working directory.
        target: name of the target of the key `label`.
        where: name of the list in errors.

    Raises:
        VolumenError: the list is empty, an entry lacks an image or a label, or two entries have the same image.
    """
    if not items:
        raise VolumenError(where, expected="a list of {image: path, label: path}", found="an empty list")
    cases: dict[str, Case] = {}
    images: set[str] = set()
    for number, item in enumerate(items):
        case = _case(item, f"{where}[{number}]", root, target, cases)
        if case.image in images:
            raise VolumenError(where, "lists an image twice", found=case.image, remedy="take one of them out")
        cases[case.name] = case
        images.add(case.image)
    targets = tuple(sorted({name for case in cases.values() for name in case.labels}))
    first = next(iter(cases.values())).image
    return Layout(root or where, detect_format(channel_paths(first)[0]), tuple(cases.values()), targets)


def _case(item: Any, where: str, root: str | None, target: str, taken: Container[str]) -> Case:
    if not isinstance(item, Mapping) or not item.get(IMAGE):
        raise VolumenError(where, expected="{image: path, label: path}", found=_shown(item))
    paths = {key: _path(value, f"{where}.{key}", root) for key, value in item.items() if _is_path_key(key)}
    several = {
        key.removeprefix(f"{LABEL}_"): path for key, path in paths.items() if key.startswith(f"{LABEL}_")
    }
    labels = several or ({target: paths[LABEL]} if LABEL in paths else {})
    if not labels:
        raise VolumenError(where, expected="a label", found=_shown(item), remedy="add label: path")
    own = {key.removeprefix(f"{MASK}_"): path for key, path in paths.items() if key.startswith(f"{MASK}_")}
    masks = {name: own.get(name, paths.get(MASK)) for name in labels}
    return Case(
        _free_name(paths[IMAGE], next(iter(labels.values())), taken),
        paths[IMAGE],
        labels,
        {name: path for name, path in masks.items() if path is not None},
    )


def _is_path_key(key: object) -> bool:
    text = str(key)
    return text in (IMAGE, LABEL, MASK) or text.startswith((f"{LABEL}_", f"{MASK}_"))


def _path(value: Any, where: str, root: str | None) -> str:
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return joined_path([_path(one, where, root) for one in value])
    if not isinstance(value, str | os.PathLike):
        raise VolumenError(where, expected="a path", found=_shown(value))
    path = os.fspath(value)
    return path if root is None or is_url(path) else str(Path(root, path))


def _free_name(image: str, label: str, taken: Container[str]) -> str:
    """Return an image's name, followed by a number if an image of another folder has the same name."""
    base = case_of(_stem(image), _stem(label))
    name, number = base, 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _stem(path: str) -> str:
    """Return the name of a file without folder, channels and format."""
    return split_suffix(name_without_channels(path.rstrip("/").rsplit("/", 1)[-1]))[0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
