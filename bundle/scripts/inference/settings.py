"""Settings of an experiment as fields of a prediction's request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volumen.inference.request import PredictRequest
from volumen.inference.rules import read_rules

_FIELD_OF = {
    "checkpoint_path": "checkpoint",
    "output_targets": "targets",
    "num_dataloader_workers": "workers",
}


def request_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PredictRequest` that an `inference_config` holds, under their names there.

    Args:
        section: an `inference_config`; nulls are left out, and keys that are no field, such as those that concern
            the checkpoint or that another version of the program knew.
    """
    fields: dict[str, Any] = {}
    for key, value in section.items():
        name = _FIELD_OF.get(key, key)
        if value is not None and name in PredictRequest.__dataclass_fields__:
            fields[name] = tuple(value) if isinstance(value, list) else value
    if "instances" in fields:
        fields["instances"] = read_rules(fields["instances"])
    return fields
