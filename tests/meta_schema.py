"""A schema of what the bundle specification and the model zoo require of metadata, for where there is no network.

It was written by hand from the specification and the zoo's bundles, meant to be stricter than the published schema
(2024-07-25), and is neither a copy of that nor compared with it: no package holds the published file. Whether metadata
are valid by that is said only by the slow test that fetches it, which is skipped where it cannot.
"""

from __future__ import annotations

TEXT = {"type": "string", "minLength": 1}
VERSION = {"type": "string", "pattern": r"^\d+\.\d+"}
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "type": TEXT,
        "format": TEXT,
        "modality": TEXT,
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "minItems": 2, "items": {"type": ["string", "integer"]}},
        "dtype": {"enum": ["float32"]},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "additionalProperties": TEXT},
    },
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": [
        "schema",
        "version",
        "changelog",
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
        "schema": {"type": "string", "format": "uri"},
        "version": VERSION,
        "changelog": {"type": "object", "additionalProperties": TEXT},
        "monai_version": VERSION,
        "pytorch_version": VERSION,
        "numpy_version": VERSION,
        "required_packages_version": {"type": "object", "additionalProperties": VERSION},
        "supported_apps": {"type": "object"},
        "name": TEXT,
        "task": TEXT,
        "description": TEXT,
        "authors": TEXT,
        "copyright": TEXT,
        "data_source": {"type": "string"},
        "data_type": {"type": "string"},
        "image_classes": {"type": "string"},
        "label_classes": {"type": "string"},
        "pred_classes": {"type": "string"},
        "eval_metrics": {"type": "object"},
        "intended_use": {"type": "string"},
        "references": {"type": "array", "items": TEXT},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                "inputs": {**TENSORS, "required": ["image"]},
                "outputs": {**TENSORS, "required": ["pred"]},
            },
        },
    },
}
