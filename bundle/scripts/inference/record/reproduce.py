"""Reproduces a published prediction from the provenance in its output."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.damage import UNREADABLE
from volumen.inference.blocks.block_maker import LEAST_CACHE_BYTES, block_cache_of
from volumen.inference.output.block_log import differences, identity, read_provenance
from volumen.inference.rules import read_rules
from volumen.inference.settings import settings_of_record
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

WHOLE_FILE_BYTES = 1 << 30
SAMPLE_VOXELS = 16


def provenance_of(old: Path) -> dict[str, Any]:
    """Return the provenance of a prediction: an OME-Zarr group, a file, or its `.volumen.json`.

    Raises:
        VolumenError: the prediction has none.
    """
    provenance = read_provenance(old)
    for record in [old] if old.name.endswith(".json") else sorted(old.parent.glob("*.volumen.json")):
        if provenance is None and old.exists():
            provenance = _recorded(record, old.name)
    if not isinstance(provenance, dict):
        raise VolumenError(
            old, "records no finished prediction", remedy="give an output of volumen predict to --like"
        )
    return provenance


def _recorded(record: Path, name: str) -> dict[str, Any] | None:
    """Return the provenance in a record if the record lists a file."""
    try:
        content = json.loads(record.read_text())
        return content["recipe"] if name in (record.name, *content["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_to_reproduce(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `PredictRequest` that reproduce the prediction of a provenance."""
    mask = provenance["mask"]
    return {
        "input": provenance["input"]["path"],
        "checkpoint": _checkpoint(provenance["model"]),
        "targets": tuple(
            name for name, entry in provenance["targets"].items() if entry["kind"] != "instances"
        ),
        **settings_of_record(provenance),
        "patch_size": tuple(provenance["windows"]["patch_size"]),
        "device": provenance["device"],
        "amp": {"float32": "off"}.get(provenance["precision"], provenance["precision"]),
        "mask": None if mask is None else mask["path"],
        "region": tuple((start, stop) for start, stop in provenance["region"]),
        "instances": read_rules(provenance.get("instances")),
        "nonfinite": provenance.get("nonfinite"),
        "axes": provenance["input"]["axes"],
        "level": provenance["input"]["level"],
    }


def _checkpoint(model: Mapping[str, Any]) -> str | tuple[str, ...]:
    members = model.get("members")
    return tuple(member["path"] for member in members) if members else model["path"]


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Compare the provenance of a reproduced prediction with the earlier one, and log the differences.

    Another network or other voxels are refused, since they change the result. Settings that the user changed by flags
    are logged. Other versions, another device or number of threads are a warning, since the last bits may differ.

    Args:
        old: the recorded provenance.
        new: the new provenance.
        where: the earlier prediction.

    Raises:
        VolumenError: the checkpoint, the image or the mask has changed.
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
    for key, flag in (("input", "-i"), ("mask", "--mask")):
        before, now = old[key] or {}, new[key] or {}
        if before and now and before.get("content", now["content"]) != now["content"]:
            raise VolumenError(
                now["path"],
                f"holds other voxels than when {where} was made",
                remedy=f"give the file of then with {flag}",
            )
    settings = differences(_settings(old), _settings(new))
    if settings:
        logger.info("%s: other settings than of %s: %s", new["input"]["path"], where, settings)
    machine = differences(_surroundings(old), _surroundings(new))
    if machine:
        logger.warning("the last bits may differ from %s: %s", where, machine)
    elif not settings:
        logger.info("network, image, settings, versions and machine are those of %s", where)


def _settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a provenance: without the files, whose content is compared, and without the machine."""
    return {
        key: value for key, value in identity(provenance).items() if key not in ("input", "model", "device")
    }


def _surroundings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {"device type": provenance["device"], **provenance["machine"], **provenance["versions"]}


def content_of(volume: Any) -> str:
    """Return a digest of a volume's voxels; a copy has the same digest.

    A file of up to 1 GB is digested completely, a larger one by 64 samples of 1 MB. A zarr array is read at 27 places
    (9 in 2D). This detects an image that was replaced, but not always a few voxels that were changed in a large image.

    Args:
        volume: a `Volume`.
    """
    digest = hashlib.sha256(f"{volume.channels} {tuple(volume.shape)} {np.dtype(volume.dtype).name}".encode())
    path = Path(volume.path)
    if path.is_file():
        _digest_file(path, digest)
    elif path.is_dir():
        # Otherwise the cache would hold the chunks of all places.
        with block_cache_of(LEAST_CACHE_BYTES):
            for place in itertools.product(*(_places(size) for size in volume.shape)):
                try:
                    digest.update(np.ascontiguousarray(volume.read(place)).tobytes())
                except UNREADABLE:
                    digest.update(b"unreadable")
    else:
        digest.update(volume.fingerprint().encode())
    return digest.hexdigest()


def _digest_file(path: Path, digest: Any) -> None:
    size, sample = path.stat().st_size, 1 << 20
    whole = size <= WHOLE_FILE_BYTES
    step = sample if whole else max(sample, size // 64)
    with path.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            digest.update(stream.read(sample))


def _places(size: int) -> list[slice]:
    """Return the slices of the first, the middle and the last few voxels of an axis."""
    length = min(size, SAMPLE_VOXELS)
    return [slice(start, start + length) for start in sorted({0, (size - length) // 2, size - length})]
