"""How a handler's memory gets into checkpoints: it registers itself on the trainer it is attached to."""

from __future__ import annotations

from typing import Any, Protocol

from ignite.engine import Engine

_ATTRIBUTE = "stateful_handlers"


class Stateful(Protocol):
    """Anything with a memory that a resumed run must have again."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


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
