"""Converts settings of a request: from an experiment, and to and from the record of a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from volumen.config.described import setting_fields
from volumen.config.prediction import PredictionSettings
from volumen.inference.request import PredictRequest
from volumen.inference.rules import read_rules

PLACES = {
    "overlap": ("windows", "overlap"),
    "batch_size": ("windows", "batch_size"),
    "min_size": ("clean", "min_size"),
    "keep_largest": ("clean", "keep_largest"),
    "fill_holes": ("clean", "fill_holes"),
}
"""Path in a record of each setting that is not stored under its own name."""
RECORDED_ELSEWHERE = ("mask", "amp")
"""Settings that a record replaces by their effect: the mask's content, the precision of the device."""
_ABSENT = object()


def request_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PredictRequest` that an `inference_config` holds, under their names there.

    Args:
        section: an `inference_config`; nulls are left out, and so are keys that are no field, such as those of the
            checkpoint or of another version of the program.
    """
    field_of_key = {item.key: item.name for item in setting_fields(PredictRequest)}
    given: dict[str, Any] = {}
    for key, value in section.items():
        name = field_of_key.get(key, key)
        if value is not None and name in PredictRequest.__dataclass_fields__:
            given[name] = tuple(value) if isinstance(value, list) else value
    if "instances" in given:
        given["instances"] = read_rules(given["instances"])
    return given


def recorded_settings(request: PredictionSettings) -> dict[str, Any]:
    """Return the settings of a request as a record stores them."""
    record: dict[str, Any] = {}
    for name in _recorded_names():
        *folders, key = PLACES.get(name, (name,))
        place = record
        for folder in folders:
            place = place.setdefault(folder, {})
        place[key] = getattr(request, name)
    return record


def settings_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a record; those that it lacks, since an older version wrote it, are left out."""
    settings = {}
    for name in _recorded_names():
        place: Any = record
        for key in PLACES.get(name, (name,)):
            place = place.get(key, _ABSENT) if isinstance(place, Mapping) else _ABSENT
        if place is not _ABSENT:
            settings[name] = tuple(place) if isinstance(place, list) else place
    return settings


def _recorded_names() -> list[str]:
    return [item.name for item in fields(PredictionSettings) if item.name not in RECORDED_ELSEWHERE]
