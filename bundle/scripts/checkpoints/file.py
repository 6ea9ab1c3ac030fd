"""Writes checkpoint files atomically with a checksum, and reads them without running code from them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

CHECKSUM = "checksum"
_REMEDY = "use another checkpoint: each epoch of a run leaves one"


class DamagedCheckpoint(VolumenError):
    """A checkpoint file that cannot be read, or whose content is not what was written."""


def save_checkpoint(content: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write a checkpoint; afterwards the file is either complete or does not exist.

    Args:
        content: nested dictionaries, lists and tuples of tensors and plain Python values. A checksum over all
            of it is added under "checksum".
        path: the file's final name.

    Returns:
        The path.

    Raises:
        VolumenError: the disk is full or cannot be written. No partial file remains.
    """
    path = Path(path)
    content = dict(content)
    content[CHECKSUM] = checksum(content)

    def write(file: BinaryIO) -> None:
        recording: Any = _ErrorRecordingFile(file)
        try:
            torch.save(content, recording)
        except Exception:
            if recording.error is not None:
                raise recording.error from None
            raise

    write_run_file(path, write)
    return path


def read_file(
    path: str | os.PathLike,
    *,
    map_location: str | torch.device = "cpu",
    mmap: bool = False,
    allowed: Sequence[Any] = (),
) -> Any:
    """Return the content of a file of `torch.save`. Only this function reads such files: no code from them runs.

    Args:
        path: the file.
        map_location: the device of the tensors; "meta" reads only their shapes.
        mmap: read tensors from the disk only when they are used.
        allowed: classes that the file may hold besides tensors and plain values (`torch.serialization.safe_globals`).

    Raises:
        DamagedCheckpoint: the file is truncated, of another kind, or holds other objects.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        raise DamagedCheckpoint(
            path, f"the checkpoint is damaged or of another kind ({_reason(error)})", remedy=_REMEDY
        ) from error


def verify_checksum(content: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Compare a checkpoint's content with its checksum, and return the content without the checksum.

    Raises:
        DamagedCheckpoint: the content differs from what was written.
    """
    rest = dict(content)
    written = rest.pop(CHECKSUM)
    found = checksum(rest)
    if written != found:
        raise DamagedCheckpoint(
            path,
            "the checkpoint is damaged",
            expected=f"checksum {str(written)[:12]}",
            found=found[:12],
            remedy=_REMEDY,
        )
    return rest


def load_checkpoint(path: str | os.PathLike, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint and verify its checksum. No code from the file runs (`weights_only=True`).

    Raises:
        VolumenError: the file does not exist.
        DamagedCheckpoint: the file is truncated, altered, or not a checkpoint of this program.
    """
    path = Path(path)
    if not path.is_file():
        raise VolumenError(path, "there is no such checkpoint")
    content = read_file(path, map_location=map_location)
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise DamagedCheckpoint(path, "this file is no checkpoint of volumen (it holds no checksum)")
    return verify_checksum(content, path)


def checksum(content: Any) -> str:
    """Return the SHA-256 over the names, types and bytes of nested dictionaries, lists, tensors and plain values.

    The order of a dictionary's keys counts, the device of a tensor does not.

    Raises:
        TypeError: a value has a type that a checkpoint must not hold.
    """
    digest = hashlib.sha256()
    _update(digest, content)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"tensor {plain.dtype} {tuple(plain.shape)};".encode())
        # Viewed as bytes because NumPy has no bfloat16.
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _update(digest, key)
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, float):
        digest.update(b"float;" + struct.pack("<d", value))
    elif value is None or isinstance(value, (bool, int, str)):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(
            f"a checkpoint may hold tensors and plain values, not {type(value).__name__}: {value!r}"
        )


def plain(value: Any) -> Any:
    """Convert NumPy numbers, arrays and paths in a nested structure to types that `weights_only=True` loads.

    Raises:
        TypeError: a value has a type that a checkpoint must not hold.
    """
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, (bool, int, float, str)):
        # Subclasses of the plain types (numpy.float64 is a float) would be pickled with their own class.
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    raise TypeError(f"a checkpoint may hold tensors and plain values, not {type(value).__name__}: {value!r}")


class _ErrorRecordingFile(io.RawIOBase):
    """A file that stores the reason of a failed write, because torch's writer raises an error without it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_run_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file of a run; afterwards it is either complete or unchanged; see `write_atomically`.

    Raises:
        VolumenError: the disk is full or cannot be written. No partial file remains.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise writing_failed(path, error) from error


def writing_failed(
    path: Path, error: OSError, *, go_on: str = "go on with --resume; every older checkpoint is whole"
) -> VolumenError:
    """Return the one-line error for a file that could not be written.

    Args:
        path: the file.
        error: the error of the write.
        go_on: the remedy once a full disk has space again.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VolumenError(
            path.parent,
            f"the disk is full, {path.name} was not written",
            remedy=f"free space and {go_on}",
        )
    return VolumenError(
        path, f"cannot be written ({error.strerror or error})", remedy="check the folder's permissions"
    )


def _reason(error: Exception) -> str:
    foreign = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if foreign:
        return f"it holds objects of {foreign[1]}, which may run code"
    if isinstance(error, pickle.UnpicklingError):
        return "torch finds no weights in it"  # torch's own message is about its versions
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
