"""A data loader that copies the next batch to a GPU while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from monai.data import DataLoader

from volumen.data.sampling.unlabelled import JoinedBatches, JoinedPatches, UnlabelledStream
from volumen.utils.sample_keys import PACKED


class PatchLoader(DataLoader):
    """MONAI's data loader; for a GPU, batch n + 1 is read and copied on its own stream while batch n is used.

    Args:
        dataset: the samples.
        device: device of the training; only for CUDA something changes.
        unlabelled: patches without labels that are added to every batch; None: none.
        arguments: further arguments of MONAI's `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        device: str | torch.device = "cpu",
        unlabelled: UnlabelledStream | None = None,
        **arguments: Any,
    ) -> None:
        if unlabelled is not None:
            dataset = JoinedPatches(dataset, unlabelled.patches)
            arguments["batch_sampler"] = JoinedBatches(
                arguments.pop("sampler"), arguments.pop("batch_size"), unlabelled.per_batch
            )
        super().__init__(dataset, **arguments)
        self.device = torch.device(device)

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return copied_ahead(batches, self.device) if self.device.type == "cuda" else batches


def copied_ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on a CUDA device; the copies run on a stream beside that of the training.

    Args:
        batches: dictionaries with pinned tensors.
        device: where the tensors shall lie; packed facts that are read on the host stay there.
    """
    stream = torch.cuda.Stream(device)

    def copy(batch: Any) -> tuple[Any, Any]:
        with torch.cuda.stream(stream):
            copied = on_device(batch, device)
            return copied, stream.record_event()

    def ready(batch: Any, event: Any) -> Any:
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        # Without this the memory could be used again for a later copy while the training still reads it.
        _each_tensor(batch, lambda tensor: tensor.record_stream(current) if tensor.is_cuda else None)
        return batch

    return one_ahead(batches, copy, ready)


def one_ahead(
    items: Iterable[Any], start: Callable[[Any], tuple[Any, Any]], finish: Callable[[Any, Any], Any]
) -> Iterator[Any]:
    """Yield `finish(*start(item))` for each item; `start` of the next item precedes the `yield` of this one."""
    waiting: tuple[Any, Any] | None = None
    for item in items:
        started = start(item)
        if waiting is not None:
            yield finish(*waiting)
        waiting = started
    if waiting is not None:
        yield finish(*waiting)


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device, without waiting for the copies."""
    if not isinstance(batch, dict):
        return batch
    return {key: value if _stays(key) else _moved(value, device) for key, value in batch.items()}


def _stays(key: Any) -> bool:
    """Whether an entry is read on the host: packed facts of a batch, and the places of its patches."""
    name = str(key)
    return name == "start" or (name.startswith(PACKED) and name.endswith(("/flags", "/spacing")))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value


def _each_tensor(batch: Any, act: Callable[[torch.Tensor], Any]) -> None:
    def once(tensor: torch.Tensor) -> torch.Tensor:
        act(tensor)
        return tensor

    for value in batch.values() if isinstance(batch, dict) else ():
        if isinstance(value, torch.Tensor):
            act(value)
        elif hasattr(value, "mapped"):
            value.mapped(once)
