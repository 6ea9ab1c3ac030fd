"""Turns errors from a data loader's workers into one-line messages without the worker's traceback."""

from __future__ import annotations

from volumen.utils.errors import VolumenError

_IN_WORKER = "in DataLoader worker process"
_DIED = ("DataLoader worker", "exited unexpectedly", "is killed by signal")


def explain(error: BaseException) -> BaseException:
    """Return the error to show to the user in place of one that a data loader raised.

    A worker's exception arrives with its traceback inside its message, and a worker that died arrives as a
    `RuntimeError`.

    Args:
        error: any exception.

    Returns:
        A one-line `VolumenError` for wrong input, failed reading or the death of a worker; otherwise the same
        exception.
    """
    text = str(error)
    if _IN_WORKER in text:
        return _from_worker(error, text)
    if (
        isinstance(error, RuntimeError)
        and text.startswith(_DIED[0])
        and any(part in text for part in _DIED[1:])
    ):
        return VolumenError(
            "tr_config.num_dataloader_workers",
            f"a worker process died ({_first_sentence(text)}), often for lack of memory",
            remedy="use fewer workers, then go on with --resume",
        )
    return error


def _from_worker(error: BaseException, text: str) -> BaseException:
    marker = f"{VolumenError.__name__}: "
    if isinstance(error, VolumenError):
        where, _, problem = text.rpartition(f".{marker}")[2].partition(": ")
        return VolumenError(where, problem.rstrip(": "))
    if isinstance(error, OSError):
        last = text.strip().splitlines()[-1]
        return VolumenError("reading data", last, remedy="bring the file back, then go on with --resume")
    return error


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(". ")
