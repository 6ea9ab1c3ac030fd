"""Names the metric by which epochs are compared, and whether larger or smaller values are better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from volumen.metrics.score_names import is_score, smaller_is_better
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

#: Metrics with these words in their name are better when smaller.
SMALLER_IS_BETTER = ("loss", "error", "mae", "mse", "hd95", "hausdorff", "distance", "angle", "angular")


class KeyMetric:
    """The name of a metric and the direction in which it improves.

    Args:
        name: a column of `metrics.csv`, e.g. "val/membrane/dice"; None uses `default`.
        mode: "max", "min", or "auto" to decide from the name.
        default: None is the evaluator's own key metric, or "val/loss" if it has none.
        names: every metric that validation can measure, without "val/"; None if they are not known in advance.

    Raises:
        VolumenError: the metric does not exist.
    """

    def __init__(
        self,
        name: str | None = None,
        mode: str = "auto",
        *,
        default: str | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if mode not in ("auto", "max", "min"):
            raise VolumenError("tr_config.key_metric_mode", expected="auto, max or min", found=repr(mode))
        self.name = name or default
        self.mode = mode
        self._known = None if names is None else [f"val/{metric}" for metric in names]
        if name is not None and self._known is not None and name not in self._known:
            raise VolumenError(
                "tr_config.key_metric",
                expected=f"one of {', '.join(self._known)}",
                found=repr(name),
                remedy=closest(name, self._known),
            )

    def value(self, engine: Any) -> float | None:
        """Return this epoch's value from the trainer's `state.metrics`; None if it was not measured or is NaN.

        Raises:
            VolumenError: the epoch was validated, `names` is None, and the metric does not exist.
        """
        name, measured = self.resolve(engine), engine.state.metrics
        value = measured.get(name)
        if value is None:
            self._check_is_measured(name, measured)
            return None
        value = float(value)
        return None if math.isnan(value) else value

    def _check_is_measured(self, name: str, measured: Mapping[str, Any]) -> None:
        """Raise at the first validation if validation does not measure a metric of this name."""
        if self._known is not None:
            return  # it exists, and was undefined this time
        validated = sorted(other for other in measured if other.startswith("val/"))
        if self.name is not None and validated and name not in measured:
            raise VolumenError(
                "tr_config.key_metric", expected=f"one of {', '.join(validated)}", found=repr(name)
            )

    def resolve(self, engine: Any) -> str:
        """Return the metric's name; the evaluator's key metric when no name was given."""
        return self.name or getattr(engine.state, "key_metric", None) or "val/loss"

    def replaces(self, earlier: str | None) -> bool:
        """Return whether values that a checkpoint recorded under a name are of another metric than this one.

        Args:
            earlier: name of the metric; None if it was not recorded.
        """
        return None not in (earlier, self.name) and earlier != self.name

    def better(self, new: float, old: float, engine: Any) -> bool:
        """Return whether the value `new` is better than `old`."""
        return new < old if self.smaller_is_better(engine) else new > old

    def smaller_is_better(self, engine: Any) -> bool:
        """Return whether smaller values of the metric are better."""
        if self.mode != "auto":
            return self.mode == "min"
        # The name of a target or class must not decide the direction of the metric.
        parts = self.resolve(engine).removeprefix("val/").split("/")
        if len(parts) > 1 and is_score(parts[1]):
            return smaller_is_better("/".join(parts))
        words = re.split(r"[^a-z0-9]+", self.resolve(engine).lower())
        return any(word in SMALLER_IS_BETTER for word in words)
