"""The single exception class for all errors that a user can cause."""

from __future__ import annotations

from collections.abc import Iterator


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


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
