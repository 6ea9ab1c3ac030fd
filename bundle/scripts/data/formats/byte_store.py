"""Reads files below a folder or a URL, whole or in part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from volumen.data.formats.urls import child, is_url
from volumen.utils.errors import VolumenError, file_fault
from volumen.utils.files.positioned_io import BINARY, read_at
from volumen.utils.memory_pool import share_memory_between_threads


class ByteStore:
    """The files below a folder or a URL; each process must create its own.

    Args:
        root: the folder or URL.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._remote: Any = None
        if is_url(root):
            self._remote, self._base = _filesystem(root)

    def where(self, name: str) -> str:
        """Return the path or URL of a file."""
        return child(self.root, name)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes | None:
        """Return the bytes of a file, or a part of them; None if there is no such file.

        Raises:
            VolumenError: the file cannot be read, or ends before the part does.
        """
        try:
            if self._remote is None:
                data = _read(f"{self.root}/{name}", start, length)
            else:
                stop = None if length is None else start + length
                part = {} if length is None and not start else {"start": start, "end": stop}
                data = self._remote.cat_file(f"{self._base}/{name}", **part)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            remedy = "check the disk and the permissions" if self._remote is None else "check the network"
            raise file_fault(error, self.where(name), "cannot be read", remedy=remedy) from error
        if length is not None and self._remote is not None and len(data) > length:
            data = data[start : start + length]  # a server that answers with the whole file
        if length is not None and len(data) != length:
            raise VolumenError(
                self.where(name),
                "is truncated",
                expected=f"{length} bytes from byte {start} on",
                found=len(data),
                remedy="copy it again",
            )
        return data

    def stamp(self, name: str) -> tuple[Any, ...]:
        """Return a value that changes with a local file; of a URL its name."""
        where = self.where(name)
        if self._remote is not None:
            return (where,)
        try:
            status = os.stat(where)  # noqa: PTH116  (pathlib takes twice as long, once per chunk)
        except (FileNotFoundError, NotADirectoryError):
            return (where, None)
        return (where, status.st_mtime_ns, status.st_size)


def read_json(root: str, name: str) -> dict[str, Any] | None:
    """Return the object in a JSON file below a folder or URL; None if there is no such file.

    Raises:
        VolumenError: the file is no JSON object.
    """
    store = ByteStore(root)
    data = store.get(name)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise VolumenError(store.where(name), expected="a JSON object", found="other content")
    return content


def _read(path: str, start: int, length: int | None) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | BINARY)
    try:
        count = os.fstat(descriptor).st_size - start if length is None else length
        data = read_at(descriptor, count, start)
        while len(data) < count and (more := read_at(descriptor, count - len(data), start + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise VolumenError(url, "URLs need fsspec", remedy="pip install 'volumen[remote]'") from None
    share_memory_between_threads()
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise VolumenError(
            url, f"URLs of this kind need a package ({error})", remedy="install the package that it names"
        ) from None
    except Exception as error:
        raise file_fault(error, url, "cannot be opened", remedy="check the URL") from error
    return filesystem, str(path).rstrip("/")


def is_local_file(root: str, name: str) -> bool:
    """Return whether a folder on disk holds a file."""
    return not is_url(root) and Path(root, name).is_file()
