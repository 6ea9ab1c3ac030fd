"""Notifies a chat or any other service after every validation: one POST of JSON per epoch."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from typing import Any

from ignite.engine import Engine, Events

from volumen.utils import distributed

logger = logging.getLogger(__name__)


class Webhook:
    """POST `{"text", "epoch", "metrics"}` when an epoch ends, from the first process only.

    A service that does not answer is a warning: a message must never end a training.

    Args:
        url: where to post, such as a chat's incoming webhook.
        names: metrics to send; None sends all of the trainer's.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, url: str, names: list[str] | None = None, timeout: float = 5.0) -> None:
        self.url, self.names, self.timeout = url, names, timeout

    def attach(self, engine: Engine) -> None:
        """Post after each epoch of the trainer."""
        if distributed.is_main():
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Post this epoch's metrics."""
        metrics = {
            name: float(value)
            for name, value in engine.state.metrics.items()
            if self.names is None or name in self.names
        }
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._post(
            {
                "text": f"epoch {engine.state.epoch}: {numbers}",
                "epoch": engine.state.epoch,
                "metrics": metrics,
            }
        )

    def _post(self, message: dict[str, Any]) -> None:
        request = urllib.request.Request(
            self.url, json.dumps(message).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout):
                pass
        except (OSError, urllib.error.URLError) as error:
            logger.warning("%s: not told of the epoch (%s)", self.url, error)
