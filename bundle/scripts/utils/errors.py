"""The one exception for everything a user can cause, and what is not a user's fault."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path


class VolumenError(ValueError):
    """A mistake in the input, the configuration or the environment, reported in one line.

    Args:
        where: the file, folder or configuration key with the error.
        problem: what is wrong, unless `expected` and `found` already state it.
        expected: the correct value or state.
        found: the actual value or state.
        remedy: what the user can do.

    Example:
        >>> print(VolumenError("labels/a_ink.tif", expected="shape (8, 8)", found="(8, 9)", remedy="resample it"))
        labels/a_ink.tif: expected shape (8, 8), found (8, 9); resample it
    """

    def __init__(
        self,
        where: object,
        problem: str = "",
        *,
        expected: object = None,
        found: object = None,
        remedy: str = "",
    ) -> None:
        said = [problem] if problem else []
        if expected is not None:
            said.append(f"expected {expected}")
        if found is not None:
            said.append(f"found {found}")
        line = f"{where}: {', '.join(said)}"
        if remedy:
            line += f"; {remedy}"
        super().__init__(" ".join(line.split()))
        self._arguments = (where, problem, expected, found, remedy)

    def __reduce__(self):
        # Workers of a DataLoader send exceptions through pickle, which would drop keyword arguments.
        return _rebuild, (type(self), self._arguments)


# What torch says of main memory, and of a GPU through libraries.
_WITHOUT_MEMORY = re.compile(r"out of memory|can't allocate memory|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE)
_CODE = str(Path(__file__).resolve().parents[1])


def is_defect(error: BaseException) -> bool:
    """Tell whether an error comes from a mistake in a program rather than from what the program was given.

    A name that does not exist is always such a mistake. An `AttributeError` or `TypeError` is one if this package
    raised it: it asked a library for something that the installed version does not have, or called it with wrong
    arguments. Raised inside a library they may as well come from damaged data.
    """
    if isinstance(error, AttributeError | TypeError):
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_CODE)
    return isinstance(error, NameError)


def file_fault(error: Exception, where: object, problem: str, *, remedy: str) -> VolumenError:
    """Return the error that says that a file cannot be read.

    Args:
        error: what a library raised while it read the file.
        where: the file or URL.
        problem: what cannot be read.
        remedy: what to do if the file is at fault.

    Raises:
        AttributeError, NameError, TypeError: `error` itself, if it is a defect of a program: it says nothing of the
            file.
    """
    if is_defect(error):
        raise error
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        remedy = f"free some memory or use a smaller patch; if only this file needs so much, {remedy}"
    elif isinstance(error, AttributeError):
        remedy += ", or, if other programs can read it, report this: a library may not fit to this program"
    elif isinstance(error, ImportError):
        remedy = "install the package that it names, in a version that fits"
    elif isinstance(error, PermissionError):
        remedy = "give yourself read permission (chmod u+r)"
    elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "allow more open files (ulimit -n)"
    return VolumenError(where, f"{problem} ({reason})", remedy=remedy)


def _rebuild(cls: type[VolumenError], arguments: tuple) -> VolumenError:
    where, problem, expected, found, remedy = arguments
    return cls(where, problem, expected=expected, found=found, remedy=remedy)


def find_cause(error: BaseException) -> BaseException:
    """Return the error to show to the user: ours, or the innermost one, of a chain of wrapped errors."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, VolumenError):
            return link
    return chain[-1]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory of a device or of the machine was not enough, at any place of a chain of errors."""
    return any(
        isinstance(link, MemoryError)
        or type(link).__name__ == "OutOfMemoryError"
        or (isinstance(link, RuntimeError) and _WITHOUT_MEMORY.search(str(link)) is not None)
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
