"""Repeating a published prediction from what its output records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.errors import VolumenError
from scripts.inference.instances import read_rules
from scripts.inference.journal import read_recipe


def recipe_of(old: Path) -> dict[str, Any]:
    """Return the recipe that a prediction records: of an OME-Zarr group, or of a `.volumen.json` file.

    Raises:
        VolumenError: it records none.
    """
    if old.is_file() and old.name.endswith(".json"):
        try:
            recipe = json.loads(old.read_text()).get("recipe")
        except (ValueError, AttributeError):
            recipe = None
    else:
        recipe = read_recipe(old)
    if not isinstance(recipe, dict):
        raise VolumenError(
            old, "records no finished prediction", remedy="give an output of volumen predict to --like"
        )
    return recipe


def settings_like(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `PredictRequest` that make a recipe's prediction again."""
    mask = recipe["mask"]
    return {
        "input": recipe["input"]["path"],
        "checkpoint": recipe["model"]["path"],
        "targets": tuple(name for name, entry in recipe["targets"].items() if entry["kind"] != "instances"),
        "overlap": recipe["windows"]["overlap"],
        "batch_size": recipe["windows"]["batch_size"],
        "patch_size": tuple(recipe["windows"]["patch_size"]),
        "device": recipe["device"],
        "amp": {"float32": "off"}.get(recipe["precision"], recipe["precision"]),
        "tta": recipe["tta"],
        "mask": None if mask is None else mask["path"],
        "region": tuple((start, stop) for start, stop in recipe["region"]),
        "skip_empty": recipe["skip_empty"],
        "dtype": recipe["dtype"],
        "threshold": recipe["threshold"],
        "compress": recipe["compress"],
        **recipe["clean"],
        "instances": read_rules(recipe.get("instances")),
        "pyramid": recipe["pyramid"],
        "on_corrupt": recipe["on_corrupt"],
        "axes": recipe["input"]["axes"],
        "level": recipe["input"]["level"],
    }


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Compare the network and the image of a repeated prediction with those recorded.

    Raises:
        VolumenError: the checkpoint or the image has changed since.
    """
    if old["model"]["sha256"] != new["model"]["sha256"]:
        raise VolumenError(
            new["model"]["path"],
            expected=f"the checkpoint of {where} (SHA-256 {old['model']['sha256'][:12]}...)",
            found=f"{new['model']['sha256'][:12]}...",
            remedy="give that checkpoint with -m",
        )
    if old["input"]["shape"] != new["input"]["shape"] or old["input"]["dtype"] != new["input"]["dtype"]:
        raise VolumenError(
            new["input"]["path"],
            expected=f"shape {old['input']['shape']} of {old['input']['dtype']}, as {where} records",
            found=f"{new['input']['shape']} of {new['input']['dtype']}",
            remedy="give that image with -i",
        )
