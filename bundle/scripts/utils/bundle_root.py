"""Finds the bundle's files: beside the code in a checkout, inside the package in a wheel."""

from __future__ import annotations

import time
from pathlib import Path


def bundle_root() -> Path:
    """Return the folder that holds `configs/`.

    Raises:
        FileNotFoundError: if the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent, package / "_bundle"):
        if (root / "configs" / "train.yaml").is_file():
            return root
    raise FileNotFoundError(
        f"the bundle's configs are neither in {package.parent} nor in {package / '_bundle'}"
    )


def bundle_folder() -> str:
    """Return that folder as text: the `bundle_root` of the bundle's configs, from any working directory."""
    return str(bundle_root())


def default_output_dir(root: str, chosen: str | None = None) -> str:
    """Return the folder for a run's output: the chosen one, else one of its own below the bundle, named by the time.

    Args:
        root: the bundle's folder.
        chosen: the folder in the settings, or None.
    """
    return str(chosen or Path(root, "runs", time.strftime("%Y-%m-%d_%H-%M-%S")))


def configs_dir() -> Path:
    """Return the folder of the bundle's configs."""
    return bundle_root() / "configs"


def license_text() -> str:
    """Return the licence of the code: the bundle's own file in a checkout, the distribution's in an installation.

    Raises:
        FileNotFoundError: if the installation is incomplete.
    """
    from importlib.metadata import distribution

    beside = bundle_root() / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    found = distribution("volumen").read_text("licenses/LICENSE")
    if found is None:
        raise FileNotFoundError("the distribution has no licenses/LICENSE")
    return found
