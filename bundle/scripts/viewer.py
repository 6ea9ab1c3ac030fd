"""Training on the layers of an open viewer, by a Python call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.command import find_cause
from scripts.config import ConfigManager
from scripts.data.layout import Layout
from scripts.data.napari_layers import cases_from_viewer
from scripts.errors import VolumenError
from scripts.experiment_file import check_section_names, merge, refuse_code
from scripts.train import run_bundle, shipped_sections


def train_from_viewer(
    viewer: Any,
    output_dir: str | Path,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    device: str = "auto",
    handlers: Sequence[Any] = (),
) -> Path:
    """Train on the Image and Labels layers of an open napari viewer, without copying their arrays.

    Layers are paired by name: Image `scroll`, Labels `scroll_ink`, and Labels `scroll_mask` where the loss counts.

    Args:
        viewer: a napari viewer, or anything with `layers` that have `name`, `data` and `scale`.
        output_dir: folder for the run.
        settings: any part of the experiment's sections, as an experiment file holds them.
        device: auto, cpu, cuda or cuda:N.
        handlers: objects with `attach(engine)`, which come after the trainer's own.

    Returns:
        Folder of the run.

    Raises:
        VolumenError: layers that do not fit each other, or a wrong setting.
    """
    given = {name: dict(section) for name, section in (settings or {}).items()}
    check_section_names(given, "settings")
    refuse_code(given, "settings")
    sections = merge(shipped_sections(), given)
    # Arrays in memory are nobody's files: an index of them must not be found again by another session.
    sections["dataset_config"]["cache_valid_patches"] = False
    config = viewer_config(viewer, sections, str(output_dir), device)
    try:
        run_bundle("train.yaml", (), {"experiment": config}, handlers=handlers)
    except Exception as error:
        config.finish()  # the viewer lives on
        cause = find_cause(error)  # MONAI wraps what its components raise
        if isinstance(cause, VolumenError):
            raise cause from None
        raise
    return config.run_dir


def viewer_config(
    viewer: Any, sections: Mapping[str, Mapping[str, Any]], output_dir: str, device: str
) -> ConfigManager:
    """Return the configuration of a training on a viewer's layers.

    Args:
        viewer: as in `train_from_viewer`.
        sections: all sections.
        output_dir: folder for the run.
        device: auto, cpu, cuda or cuda:N.
    """
    values: dict[str, Any] = dict(sections)
    config = ConfigManager(**values, output_dir=output_dir, device=device, origin="settings")
    cases = cases_from_viewer(
        viewer,
        targets=list(config.target_configs) or None,
        allow_unlabeled=config.dataset_config.allow_unlabeled_data,
    )
    targets = tuple(sorted({target for case in cases for target in case.labels}))
    config.use_cases(cases, Layout(root="viewer", format="napari", cases=(), targets=targets))
    return config
