"""Chooses among several arrays of a container, by the names that programs give to images and to labels."""

from __future__ import annotations

from collections.abc import Mapping

from volumen.utils.errors import VolumenError

IMAGE_NAMES = ("volumes/raw", "raw", "image", "images", "data", "main", "exported_data", "volume")
LABEL_NAMES = (
    "volumes/labels/neuron_ids",
    "volumes/labels/ids",
    "label",
    "labels",
    "gt",
    "exported_data",
    "main",
    "data",
    "raw",
)
"""Names that programs give to images and to labels (CREMI, ilastik, PyTorch Connectomics, h5py's examples)."""
_MOST_NAMED = 8


def choose_name(where: str, candidates: Mapping[str, tuple[int, ...]], labels: bool, kind: str) -> str:
    """Return the name of the only candidate, else of the only one with a usual name.

    Args:
        where: the container, named in errors.
        candidates: shape by name.
        labels: whether a label or mask is looked for.
        kind: what a candidate is called in messages.

    Raises:
        VolumenError: there is none, or there are several; lists them.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    usual = [name for name in (LABEL_NAMES if labels else IMAGE_NAMES) if name in candidates]
    if len(usual) == 1:
        return usual[0]
    raise VolumenError(
        where,
        expected=f"one {kind}",
        found=listed(candidates),
        remedy=f"give the path of one, such as {where}/{next(iter(candidates))}"
        if candidates
        else "write it again",
    )


def listed(candidates: Mapping[str, tuple[int, ...]]) -> str:
    """Return names and shapes for a message."""
    names = [f"/{name} {shape}" for name, shape in list(candidates.items())[:_MOST_NAMED]]
    more = len(candidates) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "") if names else "none"
