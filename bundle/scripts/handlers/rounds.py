"""A trainer that runs more than once: in a notebook, or in the rounds of federated learning."""

from __future__ import annotations

import logging

from ignite.engine import Events
from monai.engines import Workflow

from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)


class NextRound:
    """Let each further `trainer.run()` go on after the last finished step, so that epochs keep their numbers.

    Ignite alone starts a finished trainer again at epoch 1, which would replace the checkpoints and the rows of
    `metrics.csv` that its first run wrote. A finished trainer trains `max_epochs` as it was set before its first run
    once more; one whose `state.max_epochs` was raised (as `MonaiAlgo` does in each round) trains up to that number;
    one that was stopped within an epoch ends that epoch. It stands before the handlers that follow the epoch.

    Attributes:
        rounds: how often the trainer has started.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self._epochs = 0
        self._iteration = 0

    def attach(self, engine: Workflow) -> None:
        """Remember where the trainer is after each step, and set its position when it starts again."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._remember)
        # A resumed run that was finished already makes no step.
        engine.add_event_handler(Events.COMPLETED, self._remember)

    def _remember(self, engine: Workflow) -> None:
        self._iteration = engine.state.iteration

    def _start(self, engine: Workflow) -> None:
        self.rounds += 1
        state = engine.state
        if not self._iteration:
            self._epochs = state.max_epochs
            return
        done = self._iteration // state.epoch_length
        if done >= state.max_epochs:
            state.max_epochs = done + self._epochs
        state.iteration, state.epoch = self._iteration, done
        logger.info("training goes on after %s, up to epoch %d", counted(done, "epoch"), state.max_epochs)


def forget_failed_run(engine: Workflow) -> None:
    """Make the next `engine.run()` start at once: Ignite keeps the generator of a failed run, and would only end it."""
    engine._internal_run_generator = None
