"""Stores the split of a run on disk, so that a resumed run never validates on its training data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from volumen.data.sampling.split import Split
from volumen.utils.errors import VolumenError


def read_split(path: Path) -> Split:
    """Read a run's split.

    Raises:
        VolumenError: the file is missing or damaged.
    """
    try:
        return Split.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VolumenError(path, f"is not a split ({error})", remedy="start a new run") from None


def load_split(path: Path, shapes: Mapping[str, Sequence[int]]) -> Split:
    """Read a run's split and check that it fits the volumes.

    Args:
        path: file that contains the text of `split_text`.
        shapes: spatial shape by volume.

    Raises:
        VolumenError: the file is damaged, or describes other volumes.
    """
    split = read_split(path)
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


def split_text(split: Split, fingerprint: str) -> str:
    """Return the text of a run's split file: volumes, regions and the data's fingerprint."""
    return json.dumps({**split.to_dict(), "fingerprint": fingerprint}, indent=1) + "\n"
