"""Seeds and stores the random generators, so that a resumed run draws the same numbers as an uninterrupted one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Workflow

from volumen.utils import distributed


class SeedIterations:
    """Seed every generator at each iteration from (seed, process, iteration).

    A resumed run then draws the same numbers in a step (dropout, stochastic depth, a user's own handler), no matter
    what the workers, the validation or the construction of a data iterator drew before.

    Args:
        seed: the experiment's seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = int(seed)

    def attach(self, engine: Workflow) -> None:
        """Seed when an iteration of the trainer starts."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Workflow) -> None:
        """Seed for the engine's iteration."""
        seed_everything(self.seed, distributed.rank(), engine.state.iteration)


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and torch's global generators from a tuple of non-negative integers."""
    first, second = np.random.SeedSequence([abs(part) for part in key]).generate_state(2)
    random.seed(int(first))
    np.random.seed(int(second))
    torch.manual_seed(int(first) << 32 | int(second))


def random_state() -> dict[str, Any]:
    """Return the states of all global generators as plain values and tensors."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of `random_state`; GPU states only if their number matches the number of GPUs."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
