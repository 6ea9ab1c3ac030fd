"""Data sets as other programs have them, read as they lie: nnU-Net's raw folders, MSD's, and MONAI's lists of images.

nnU-Net and MSD (Medical Segmentation Decathlon) have `imagesTr/`, `labelsTr/` and a `dataset.json`; a list is a JSON
file with `training`, and perhaps `validation`: [{"image": path, "label": path}, ...].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from volumen.data.datalist import IMAGE, LABEL, MASK, layout_of
from volumen.data.formats.detection import split_suffix
from volumen.data.formats.urls import is_url
from volumen.data.layout import Layout
from volumen.data.pairing import check_targets
from volumen.utils.errors import VolumenError

DESCRIPTION = "dataset.json"
FOLD = "fold"
"""Key of an entry: the fold in which its image validates."""
IGNORE = "ignore"
"""Name of the label that means unknown, in nnU-Net's `labels`."""


def find_raw(root: str, targets: Sequence[str] | None = None, *, partial: bool = False) -> Layout | None:
    """Return the layout of a data set of another program; None where a path is none.

    Args:
        root: a folder with `dataset.json` and `imagesTr/`, or a JSON file that lists images.
        targets: targets to use; with one, the labels are that one's; by default they are called "label".
        partial: other folders may hold the targets that are missing here.

    Raises:
        VolumenError: a description that cannot be read, or that lists files that do not exist.
    """
    path = _description(root)
    if path is None:
        return None
    content = _read(path)
    target = targets[0] if targets and len(targets) == 1 else LABEL
    listed = content if isinstance(content, list) else content.get("training")
    if isinstance(listed, list):
        training, validation = listed, content.get("validation") if isinstance(content, dict) else None
    else:
        training, validation = _nnunet_items(path, content), None
    items = [_with_channels(item, path.parent) for item in [*training, *(validation or ())]]
    _check_files(path, items)
    layout = layout_of(items, root=str(path.parent), target=target, where=str(path))
    if not partial:
        check_targets(str(path), layout.targets, targets)
    names = tuple(case.name for case in layout.cases[len(training) :]) if validation else None
    folds = {} if validation else _folds(path, training, layout)
    stated = _stated_labels(path, content) if isinstance(content, dict) else {}
    return replace(layout, root=root, validates=names, folds=folds, stated={target: stated} if stated else {})


def _description(root: str) -> Path | None:
    if is_url(root):
        return None
    path = Path(root)
    if path.is_file() and path.suffix.lower() == ".json":
        return path
    raw = (path / "imagesTr").is_dir() and not (path / "images").is_dir()
    if not raw:
        return None
    if not (path / DESCRIPTION).is_file():
        raise VolumenError(
            path, f"holds imagesTr/ and no {DESCRIPTION}", remedy="add it, or rename the folders to images and labels"
        )  # fmt: skip
    return path / DESCRIPTION


def _read(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise VolumenError(path, f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise VolumenError(path, f"is not valid JSON ({error})") from None
    known = isinstance(content, list) or (
        isinstance(content, dict) and any(key in content for key in ("training", "file_ending", "dataset"))
    )
    if not known:
        raise VolumenError(
            path,
            expected="a list of {image, label}, a mapping with training, or nnU-Net's dataset.json",
            found=", ".join(list(content)[:5]) if isinstance(content, dict) else repr(content)[:60],
        )
    return content


def _nnunet_items(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of an nnU-Net v2 folder: those that it lists, else those that lie in it."""
    if isinstance(content.get("dataset"), Mapping):
        return [
            {IMAGE: list(case.get("images", ())), LABEL: case.get("label")}
            for case in content["dataset"].values()
        ]
    ending = content.get("file_ending")
    channels = len(content.get("channel_names") or content.get("modality") or {"0": ""})
    if not isinstance(ending, str) or not ending.startswith("."):
        raise VolumenError(f"{path}: file_ending", expected='an ending such as ".nii.gz"', found=repr(ending))
    labels = (
        sorted((path.parent / "labelsTr").glob(f"*{ending}")) if (path.parent / "labelsTr").is_dir() else []
    )
    if not labels:
        raise VolumenError(path.parent / "labelsTr", expected=f"labels CASE{ending}", found="none")
    return [
        {
            IMAGE: [
                f"imagesTr/{label.name[: -len(ending)]}_{number:04d}{ending}" for number in range(channels)
            ],
            LABEL: f"labelsTr/{label.name}",
        }
        for label in labels
    ]


def _with_channels(item: Any, folder: Path) -> Any:
    """Return an entry whose image is there; nnU-Net v1 lists CASE.nii.gz for the files CASE_0000.nii.gz and so on."""
    image = item.get(IMAGE) if isinstance(item, Mapping) else None
    if not isinstance(image, str) or is_url(image) or (folder / image).exists():
        return item
    stem, kind = split_suffix(image)
    ending = image[len(stem) :] if kind else ""
    place = folder / f"{stem}_0000{ending}"
    channels = [
        path
        for path in sorted(place.parent.glob(f"{Path(stem).name}_*{ending}"))
        if re.fullmatch(re.escape(Path(stem).name) + r"_\d{4}" + re.escape(ending), path.name)
    ]
    return {**item, IMAGE: [str(path) for path in channels]} if channels else item


def _folds(path: Path, items: Sequence[Any], layout: Layout) -> dict[str, int]:
    """Return the fold of each image, where a list says in which one it validates, as those of Auto3DSeg do.

    Raises:
        VolumenError: some images have one and others have none, or the folds are not 0, 1, 2, ...
    """
    given = [item.get(FOLD) for item in items]
    if all(fold is None for fold in given):
        return {}
    if sorted(set(given), key=str) != list(range(len(set(given)))) or len(set(given)) < 2:
        raise VolumenError(
            f"{path}: {FOLD}",
            expected="a fold 0, 1, 2, ... of every image",
            found=", ".join(sorted({str(fold) for fold in given})),
            remedy="number them, or take them out",
        )
    return {case.name: int(fold) for case, fold in zip(layout.cases, given, strict=True)}


def _check_files(path: Path, items: Sequence[Any]) -> None:
    """Refuse a list of files that are not there.

    Raises:
        VolumenError: says how many, and names the first.
    """
    named = [
        str(file)
        for item in items
        for key, value in (item.items() if isinstance(item, Mapping) else ())
        if str(key).partition("_")[0] in (IMAGE, LABEL, MASK)
        for file in (value if isinstance(value, list | tuple) else [value])
    ]
    missing = [file for file in named if not is_url(file) and not (path.parent / file).exists()]
    if missing:
        raise VolumenError(
            path,
            f"lists {len(missing)} of {len(named)} files that do not exist, such as {missing[0]}",
            remedy="put them there, or take them out of it",
        )


def _stated_labels(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a description says of its labels, as an entry of `dataset_config.targets`.

    Args:
        path: of the description.
        content: with `labels`: {"0": "background", ...} of MSD and nnU-Net v1, or {"background": 0, "tumour": 1 or
            [1, 2]} of nnU-Net v2, where several values make a region and "ignore" is the value that means unknown; and,
            of regions, `regions_class_order`, the value of each in a label map.
    """
    labels = content.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        return {}
    if all(str(key).isdigit() and isinstance(value, str) for key, value in labels.items()):
        labels = {name: int(value) for value, name in labels.items()}
    values = {str(name): _values(path, name, value) for name, value in labels.items()}
    stated: dict[str, Any] = {}
    ignored = values.pop(IGNORE, None)
    if ignored:
        stated["ignore_label"] = ignored[0]
    foreground = {name: found for name, found in values.items() if found != [0]}
    if any(len(found) > 1 for found in foreground.values()):
        order = content.get("regions_class_order")
        if order is not None and (not isinstance(order, list) or len(order) != len(foreground)):
            raise VolumenError(
                f"{path}: regions_class_order",
                expected=f"{len(foreground)} values, one per region",
                found=order,
            )
        return {**stated, "regions": foreground, **({} if order is None else {"region_values": order})}
    names = {found[0]: name for name, found in values.items()}
    if sorted(names) != list(range(len(names))):
        raise VolumenError(
            f"{path}: labels",
            expected="values 0, 1, 2, ... without gaps",
            found=", ".join(map(str, sorted(names))),
            remedy="renumber the labels",
        )
    if len(names) > 2:
        stated.update(kind="multiclass", out_channels=len(names), classes=[names[n] for n in sorted(names)])
    return stated


def _values(path: Path, name: Any, value: Any) -> list[int]:
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
        raise VolumenError(
            f"{path}: labels.{name}", expected="a label value, or a list of them", found=repr(value)
        )
    return found
