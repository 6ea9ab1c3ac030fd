"""A lock file that one process holds, and that the system releases when the process ends."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LockHeldError(Exception):
    """Another process holds the lock; the message says which."""


class ProcessLock:
    """Holds a lock file from its creation until `release`.

    With `fcntl` it is a record lock: it belongs to one process, so that the workers of a DataLoader that outlive a
    killed trainer by some seconds do not hold it, as they would with `flock`. Elsewhere it is a lock of the package
    filelock, which torch installs.

    Args:
        path: the lock file; it is created, and removed at the release.

    Raises:
        LockHeldError: another process holds it.
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._portable: Any = None
        if fcntl is not None:
            self._descriptor = _lock_record(path)
        else:
            self._portable = _lock_portable(path)

    def release(self) -> None:
        """Remove the file and release the lock."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
        else:
            # Windows removes no open file.
            self._portable.release()
            with suppress(OSError):  # another process has just locked it
                self.path.unlink(missing_ok=True)


def _lock_record(path: Path) -> int:
    """Lock the file at a path and write into it who holds it; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise LockHeldError(holder or "another process") from error
        if _is_file(descriptor, path):
            break
        # The former holder removed the file between our opening and locking it.
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _lock_portable(path: Path) -> Any:
    import filelock

    # Not bound to the thread: another one may release it.
    lock = filelock.FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise LockHeldError("another process") from error
    return lock


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
