"""A folder of cached arrays: keyed by content, written atomically, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def cache_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """Return the file that holds the arrays for a key (plain data, hashed as canonical JSON)."""
    return folder / f"valid_patches_{hashlib.sha256(_canonical(key)).hexdigest()[:32]}.npz"


def load_arrays(folder: Path, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Return the cached arrays, or None where there are none or the file is damaged (which is logged)."""
    path = cache_path(folder, key)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if arrays.pop("key").tobytes() != _canonical(key):
            raise ValueError("it belongs to other parameters")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s: the cached patch index cannot be used (%s); it is built again", path, error)
        return None
    return arrays


def store_arrays(folder: Path, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays for a key: under a temporary name first, then renamed, so that no reader sees half a file.

    A folder that cannot be written to, or a full disk, is a warning: the index exists, only not on disk.
    """
    path = cache_path(folder, key)
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}_", suffix=".tmp", dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, key=np.frombuffer(_canonical(key), np.uint8), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        logger.warning("%s: the patch index is not cached there (%s)", folder, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _canonical(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True, separators=(",", ":")).encode()
