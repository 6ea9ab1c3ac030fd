"""Split files: that of a run, which a resumed run reads again, and one that a person wrote.

The file of a run is JSON: `train` and `val` map the names of volumes to lists of boxes, a box being [start, stop] per
axis in voxels. A person may write a list of names in place of boxes: then the whole volumes are meant. Without `train`
all that does not validate trains. A list of such splits is one per fold, as in nnU-Net's `splits_final.json`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from volumen.data.case_names import known_name, with_known_names
from volumen.data.sampling.split import Split
from volumen.utils.boxes import Box, box_text, whole_box
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

Shapes = Mapping[str, Sequence[int]]


def read_split(path: Path) -> Split:
    """Read a run's split.

    Raises:
        VolumenError: the file is missing or damaged.
    """
    try:
        return Split.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VolumenError(path, f"is not a split ({error})", remedy="start a new run") from None


def with_cases(split: Split, known: Container[str]) -> Split:
    """Return a split with its volumes as the cases of the data are called now."""
    return replace(split, train=with_known_names(split.train, known), val=with_known_names(split.val, known))


def load_split(path: Path, shapes: Shapes) -> Split:
    """Read a run's split and check that it fits the volumes.

    Args:
        path: file that contains the text of `split_text`.
        shapes: spatial shape by volume.

    Raises:
        VolumenError: the file is damaged, or describes other volumes.
    """
    split = with_cases(read_split(path), shapes)
    for name, boxes in [*split.train.items(), *split.val.items()]:
        shape = shapes.get(name)
        if shape is None or any(stop > extent for box in boxes for (_, stop), extent in zip(box, shape)):
            raise VolumenError(
                path,
                expected=f"volume {name!r} as it was when the run began",
                found="no such volume" if shape is None else f"shape {tuple(shape)}",
                remedy="resume with the same data",
            )
    return split


def given_split(
    path: Path, shapes: Shapes, train_fraction: float, seed: int, fold: tuple[int, int] | None = None
) -> Split:
    """Read a split that a person chose: the file of another run, or one written by hand.

    Args:
        path: the file.
        shapes: spatial shape by volume.
        train_fraction, seed: values of the settings, which are recorded.
        fold: number of the split in a file that lists several, and how many it lists; None for a file with one.

    Raises:
        VolumenError: no such file or fold, a volume that does not exist or is named twice, a box outside of its
            volume, or a voxel that both trains and validates.
    """
    content = _one_of(path, _content(path), fold)
    val = _part(path, "val", content["val"], shapes)
    train = (
        _part(path, "train", content["train"], shapes)
        if content.get("train") is not None
        else {name: [whole_box(shape)] for name, shape in shapes.items() if name not in val}
    )
    if not train:
        raise VolumenError(path, "leaves no image for training", remedy="name fewer volumes in val")
    _refuse_shared(path, train, val)
    rule = f"split {path.name}" + (f", fold {fold[0]}/{fold[1]}" if fold is not None else "")
    return Split(train, val, train_fraction, seed, rule)


def split_text(split: Split, fingerprint: str) -> str:
    """Return the text of a run's split file: volumes, regions and the data's fingerprint."""
    return json.dumps({**split.to_dict(), "fingerprint": fingerprint}, indent=1) + "\n"


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise VolumenError(path, f"cannot be read ({error.strerror})", remedy="check --split") from None
    except ValueError as error:
        raise VolumenError(
            path, f"is not valid JSON ({error})", remedy="give the _split.json of a run, or correct it"
        ) from None


def _one_of(path: Path, content: Any, fold: tuple[int, int] | None) -> Mapping[str, Any]:
    if isinstance(content, list):
        if fold is None:
            raise VolumenError(
                path,
                f"lists {len(content)} splits",
                remedy=f"choose one by --fold, 0/{len(content)} to {len(content) - 1}/{len(content)}",
            )
        number, count = fold
        if count != len(content):
            raise VolumenError(path, expected=f"{count} splits, as --fold says", found=len(content))
        content = content[number]
    elif fold is not None:
        raise VolumenError(path, "holds one split", remedy="leave out --fold")
    if not isinstance(content, Mapping) or not content.get("val"):
        raise VolumenError(path, expected='{"train": [names], "val": [names]}', found=repr(content)[:80])
    return content


def _part(path: Path, part: str, content: Any, shapes: Shapes) -> dict[str, list[Box]]:
    """Return the boxes of a part by volume, whole volumes where the file lists names alone."""
    names = list(content) if isinstance(content, Mapping | list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise VolumenError(f"{path}: {part}", expected="names of volumes", found=repr(content)[:80])
    names = [known_name(name, shapes) for name in names]
    for name, times in Counter(names).items():
        if times > 1:
            raise VolumenError(f"{path}: {part}", f"names the volume {name!r} twice", remedy="name it once")
        if name not in shapes:
            raise VolumenError(
                f"{path}: {part}",
                expected="names of images in the data",
                found=repr(name),
                remedy=closest(name, shapes) or f"known: {', '.join(list(shapes)[:10])}",
            )
    regions = with_known_names(content, shapes) if isinstance(content, Mapping) else {}
    return {name: _boxes(f"{path}: {part}.{name}", regions.get(name), shapes[name]) for name in names}


def _boxes(where: str, regions: Any, shape: Sequence[int]) -> list[Box]:
    if regions is None:
        return [whole_box(shape)]
    try:
        boxes = [tuple((int(start), int(stop)) for start, stop in box) for box in regions]
    except (TypeError, ValueError):
        boxes = []
    fits = all(
        len(box) == len(shape) and all(0 <= a < b <= n for (a, b), n in zip(box, shape)) for box in boxes
    )
    if not boxes or not fits:
        raise VolumenError(
            where,
            expected=f"boxes [[start, stop] for each axis] inside of shape {tuple(shape)}",
            found=repr(regions)[:80],
        )
    return boxes


def _refuse_shared(path: Path, train: Mapping[str, list[Box]], val: Mapping[str, list[Box]]) -> None:
    for name in sorted(set(train) & set(val)):
        for ours, theirs in itertools.product(train[name], val[name]):
            if all(a < d and c < b for (a, b), (c, d) in zip(ours, theirs, strict=True)):
                raise VolumenError(
                    path,
                    f"{name}: [{box_text(ours)}] trains and [{box_text(theirs)}] validates, which share voxels",
                    remedy="change one of them",
                )
