"""How a handler's memory gets into checkpoints: it registers itself on the trainer it is attached to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ignite.engine import Engine

from volumen.utils import distributed

_ATTRIBUTE = "stateful_handlers"
# Under this key a checkpoint keeps a list: what each of several processes remembered.
_BY_PROCESS = "by_process"


class Stateful(Protocol):
    """Anything with a memory that a resumed run must have again."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


@runtime_checkable
class Divided(Stateful, Protocol):
    """A memory of which each of several processes has its own part, such as sums over its own patches."""

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of one process that has several processes' parts."""
        ...


def between_epochs(engine: Engine) -> bool:
    """Whether no epoch is under way, so that its memory is to begin anew; a resumed one may be in its middle."""
    length = engine.state.epoch_length
    return length is None or engine.state.iteration % length == 0


def register_state(engine: Engine, name: str, item: Stateful) -> None:
    """Have an object's state saved in every checkpoint of this trainer and restored on resuming.

    Args:
        engine: the trainer.
        name: the key in the checkpoint; the same in every run.
        item: what has the state.

    Raises:
        ValueError: the name is taken by another object.
    """
    known = registered_state(engine)
    if known.get(name, item) is not item:
        raise ValueError(f"two handlers want to save their state as {name!r}")
    known[name] = item


def registered_state(engine: Engine) -> dict[str, Stateful]:
    """All that is registered, by name."""
    if not hasattr(engine, _ATTRIBUTE):
        setattr(engine, _ATTRIBUTE, {})
    return getattr(engine, _ATTRIBUTE)


def saved_states(engine: Engine) -> dict[str, dict[str, Any]]:
    """The state of all that is registered, as checkpoints keep it. Every process must ask at the same time."""
    states = {}
    for name, item in registered_state(engine).items():
        states[name] = item.state_dict()
        if isinstance(item, Divided) and distributed.is_distributed():
            states[name] = {_BY_PROCESS: distributed.gather(states[name])}
    return states


def restore_states(engine: Engine, saved: Mapping[str, dict[str, Any]]) -> None:
    """Give all that is registered the state that a checkpoint has of it, or of each process its own.

    A checkpoint of more processes than there are now is divided among them; of fewer, some begin with nothing.
    """
    for name, item in registered_state(engine).items():
        if name not in saved:
            continue
        if not isinstance(item, Divided):
            item.load_state_dict(saved[name])
            continue
        # Without a list it is the state of a single process, or of the first one alone in an older file.
        parts = saved[name].get(_BY_PROCESS, [saved[name]])[distributed.rank() :: distributed.world_size()]
        if parts:
            item.load_state_dict(parts[0] if len(parts) == 1 else item.joined(parts))
