"""Stores the state of handlers in checkpoints: a handler registers itself on its trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ignite.engine import Engine

from volumen.utils import distributed

_ATTRIBUTE = "stateful_handlers"
# Under this key a checkpoint stores a list with the state of each process.
_BY_PROCESS = "by_process"


class Stateful(Protocol):
    """Any object with a state that a resumed run must restore."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        ...


@runtime_checkable
class PerProcessState(Stateful, Protocol):
    """A state of which each process holds its own part, such as sums over its own patches."""

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Combine the states of several processes into one."""
        ...


def between_epochs(engine: Engine) -> bool:
    """Return whether the engine is at the start of an epoch, not in the middle of a resumed one."""
    length = engine.state.epoch_length
    return length is None or engine.state.iteration % length == 0


def register_state(engine: Engine, name: str, item: Stateful) -> None:
    """Save an object's state in every checkpoint of this trainer and restore it on resuming.

    Args:
        engine: the trainer.
        name: the key in the checkpoint; the same in every run.
        item: the object with the state.

    Raises:
        ValueError: the name is taken by another object.
    """
    registered = registered_state(engine)
    if registered.get(name, item) is not item:
        raise ValueError(f"two handlers want to save their state as {name!r}")
    registered[name] = item


def registered_state(engine: Engine) -> dict[str, Stateful]:
    """Return all registered objects by name."""
    if not hasattr(engine, _ATTRIBUTE):
        setattr(engine, _ATTRIBUTE, {})
    return getattr(engine, _ATTRIBUTE)


def saved_states(engine: Engine) -> dict[str, dict[str, Any]]:
    """Return the states of all registered objects for a checkpoint. Every process must call it at the same time."""
    states = {}
    for name, item in registered_state(engine).items():
        states[name] = item.state_dict()
        if isinstance(item, PerProcessState) and distributed.is_distributed():
            states[name] = {_BY_PROCESS: distributed.gather(states[name])}
    return states


def restore_states(engine: Engine, saved: Mapping[str, dict[str, Any]]) -> None:
    """Restore all registered objects from a checkpoint; a state with a part per process goes to the processes.

    If the checkpoint has more parts than there are processes, a process combines several; if it has fewer, some
    processes start without a state.
    """
    for name, item in registered_state(engine).items():
        if name not in saved:
            continue
        if not isinstance(item, PerProcessState):
            item.load_state_dict(saved[name])
            continue
        # Without a list it is the state of a single process, or of the first one alone in an older file.
        parts = saved[name].get(_BY_PROCESS, [saved[name]])[distributed.rank() :: distributed.world_size()]
        if parts:
            item.load_state_dict(parts[0] if len(parts) == 1 else item.joined(parts))
