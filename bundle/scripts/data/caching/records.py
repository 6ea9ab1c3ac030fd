"""Caches small arrays of many volumes in one file per data set.

One file per volume would be slower than reading small images again, since thousands of files would be opened,
renamed and flushed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import digest
from volumen.data.caching.index_cache import load_arrays, store_arrays

_SPARE = 1000
"""Least number of records of earlier runs that are retained beside those of this run."""

Arrays = Mapping[str, np.ndarray]


class Records:
    """Arrays by key, read from one file at first use; new ones are written to it at the end of the `with` block.

    Records of earlier runs that this run does not use are retained, up to twice as many as this run uses.

    Args:
        folder: folder of the cache; None stores nothing.
        name: plain data that identifies the file.

    Example:
        with Records.of(cache_dir, "label values", labels) as records:
            values = label_values(label, records=records)
    """

    def __init__(self, folder: Path | None, name: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = dict(name)
        self._earlier: dict[str, Arrays] | None = None
        self._used: dict[str, Arrays] = {}
        self._changed = False

    @classmethod
    def of(cls, folder: str | os.PathLike | None, what: str, volumes: Iterable[Any]) -> Records:
        """Return the records of one kind for the volumes of a data set, which is identified by its folder.

        Args:
            folder: folder of the cache; None stores nothing.
            what: kind of the records.
            volumes: some volumes of the data set, all of one kind (images, or labels).
        """
        paths = sorted({str(volume.source) for volume in volumes})
        return cls(None if folder is None else Path(folder), {"records": what, "of": _shared_folder(paths)})

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error or Ctrl-C, so that the results until then need not be computed again.
        self.save()

    @property
    def enabled(self) -> bool:
        """Whether records are stored; otherwise computing a key is useless."""
        return self.folder is not None

    def get(self, key: Mapping[str, Any]) -> Arrays | None:
        """Return the arrays of a key (plain data), or None."""
        if self.folder is None:
            return None
        if self._earlier is None:
            self._earlier = _unpack(load_arrays(self.folder, self.name))
        text = _text(key)
        found = self._used.get(text)
        if found is None:
            found = self._earlier.get(text)
            if found is not None:
                self._used[text] = found
        return found

    def put(self, key: Mapping[str, Any], arrays: Arrays) -> None:
        """Store the arrays of a key."""
        if self.folder is not None:
            self._used[_text(key)] = dict(arrays)
            self._changed = True

    def save(self) -> None:
        """Write the file if `put` was called since the last time."""
        if self.folder is None or not self._changed:
            return
        earlier = [(key, arrays) for key, arrays in (self._earlier or {}).items() if key not in self._used]
        room = max(_SPARE, 2 * len(self._used))
        store_arrays(self.folder, self.name, _pack({**self._used, **dict(earlier[:room])}))
        self._changed = False


def _text(key: Mapping[str, Any]) -> str:
    return digest(f"{name} {value!r}" for name, value in sorted(key.items()))


def _shared_folder(paths: list[str]) -> str:
    """Return the deepest folder (or beginning of a URL) in which all paths lie."""
    folders = [path.rsplit("/", 1)[0] if "/" in path else "" for path in paths]
    first, last = min(folders, default="").split("/"), max(folders, default="").split("/")
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    shared = "/".join(first[:same])
    return shared if "://" in shared else str(Path(shared).absolute())


def _pack(records: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    """Join records into two arrays: a table of contents as JSON, and the bytes of all arrays."""
    contents = {
        key: [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
        for key, arrays in records.items()
    }
    parts = [
        np.ascontiguousarray(array).tobytes() for arrays in records.values() for array in arrays.values()
    ]
    return {
        "contents": np.frombuffer(json.dumps(contents).encode(), np.uint8),
        "bytes": np.frombuffer(b"".join(parts), np.uint8),
    }


def _unpack(stored: Arrays | None) -> dict[str, Arrays]:
    if stored is None:
        return {}
    data = stored["bytes"].tobytes()
    records: dict[str, Arrays] = {}
    start = 0
    for key, entries in json.loads(stored["contents"].tobytes()).items():
        arrays = {}
        for name, dtype, shape in entries:
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
            start += arrays[name].nbytes
        records[key] = arrays
    return records
