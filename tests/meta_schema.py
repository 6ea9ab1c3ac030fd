"""Schemas of a bundle's metadata, for where there is no network.

`PUBLISHED` has the rules of the published schema (2024-07-25, also kept at
https://github.com/Project-MONAI/project-monai.github.io in `public/schema`) in words of our own: a slow test fetches
that file and sees that both judge alike. `SCHEMA` asks for all of it and for more: what the bundle specification and
the model zoo's checks want besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

DRAFT = "https://json-schema.org/draft/2019-09/schema"
MAPPING = {"type": "object"}


def texts(*names: str) -> dict[str, Any]:
    """Return properties that are any text."""
    return {name: {"type": "string"} for name in names}


def network(tensors: dict[str, Any], inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    """Return the rules for a network: its inputs and outputs, and the names that there must be."""
    values = {"type": "object", "additionalProperties": tensors}
    return {
        "type": "object",
        "required": ["inputs", "outputs"],
        "properties": {
            "inputs": {**values, "required": inputs},
            "outputs": {**values, "required": outputs},
            "post_processed_outputs": values,
        },
    }


_TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        **texts("type", "format", "dtype"),
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": MAPPING,
    },
}
# A network may also take and give plain values.
_ANY_VALUE = {"anyOf": [{"type": ["number", "string", "boolean"]}, _TENSOR]}

PUBLISHED: dict[str, Any] = {
    "$schema": DRAFT,
    "type": "object",
    "required": [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        **texts("schema", "version", "monai_version", "pytorch_version", "numpy_version"),
        **texts("task", "description", "authors", "copyright", "intended_use"),
        **texts("data_source", "data_type", "image_classes", "label_classes", "pred_classes"),
        "changelog": MAPPING,
        "required_packages_version": MAPPING,
        "eval_metrics": MAPPING,
        "supported_apps": MAPPING,
        "references": {"type": "array", "items": {"type": "string"}},
    },
    # A bundle may have several networks.
    "patternProperties": {"^[_a-zA-Z0-9]+_data_format$": network(_ANY_VALUE, [], [])},
}

_SAID = {"type": "string", "minLength": 1}
_VERSION = {"type": "string", "pattern": r"^\d+\.\d+"}
_STRICT_TENSOR = {
    "allOf": [
        _TENSOR,
        {
            "properties": {
                **dict.fromkeys(("type", "format", "modality"), _SAID),
                "num_channels": {"minimum": 1},
                "spatial_shape": {"minItems": 2},
                "dtype": {"enum": ["float32"]},
                "channel_def": {"additionalProperties": _SAID},
            },
        },
    ]
}
SCHEMA: dict[str, Any] = {
    "$schema": DRAFT,
    "allOf": [
        PUBLISHED,
        {
            # The zoo's checks look for the changelog, its listings for a name.
            "required": ["changelog", "name"],
            "properties": {
                "schema": {"format": "uri"},
                **dict.fromkeys(("version", "monai_version", "pytorch_version", "numpy_version"), _VERSION),
                **dict.fromkeys(("name", "task", "description", "authors", "copyright"), _SAID),
                "changelog": {"additionalProperties": _SAID},
                "required_packages_version": {"additionalProperties": _VERSION},
                "references": {"items": _SAID},
                "network_data_format": network(_STRICT_TENSOR, ["image"], ["pred"]),
            },
        },
    ],
}


def altered(content: Any) -> Iterator[Any]:
    """Yield copies of plain data in which one part, at any depth, is left out or is a value of another type."""
    others: list[Any] = [None, True, 1, 1.5, "", "x", [], [1], ["x"], {}, {"x": 1}]
    if isinstance(content, dict):
        yield {**content, "further": 1}
        for key, value in content.items():
            yield {name: kept for name, kept in content.items() if name != key}
            yield from ({**content, key: changed} for changed in [*others, *altered(value)])
    elif isinstance(content, list):
        for number, value in enumerate(content):
            rest = content[:number], content[number + 1 :]
            yield from ([*rest[0], changed, *rest[1]] for changed in [*others, *altered(value)])
