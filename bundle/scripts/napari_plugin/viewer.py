"""Trains on the layers of an open viewer by a Python call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.data.napari_layers import cases_from_viewer
from volumen.run import train_on_cases

if TYPE_CHECKING:
    from volumen.data.labels.label_channels import LabelRule
    from volumen.data.layout import OpenCase


def train_from_viewer(
    viewer: Any,
    output_dir: str | os.PathLike[str],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    device: str = "auto",
    handlers: Sequence[Any] = (),
) -> Path:
    """Train on the Image and Labels layers of an open napari viewer, without copying their arrays.

    Layers are paired by name: Image `scroll`, Labels `scroll_ink`, and Labels `scroll_mask` where labels are valid.

    Args:
        viewer: a napari viewer, or any object with `layers` that have `name`, `data` and `scale`.
        output_dir: folder for the run.
        settings: any part of the experiment's sections, as in an experiment file.
        device: auto, cpu, cuda or cuda:N.
        handlers: objects with `attach(engine)`, which are attached after the trainer's handlers.

    Returns:
        Folder of the run.

    Raises:
        VolumenError: layers do not fit each other, or a setting is wrong.
    """

    def open_layers(
        targets: Sequence[str] | None, allow_unlabeled: bool, rules: Mapping[str, LabelRule]
    ) -> list[OpenCase]:
        return cases_from_viewer(viewer, targets=targets, allow_unlabeled=allow_unlabeled, rules=rules)

    return train_on_cases(open_layers, output_dir, settings, where="viewer", device=device, handlers=handlers)
