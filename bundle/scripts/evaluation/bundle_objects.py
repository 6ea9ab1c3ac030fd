"""What `inference.yaml` and `evaluate.yaml` declare to score predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.metrics import Metric

from volumen.evaluation.cases import Evaluation
from volumen.evaluation.pairing import find_cases
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate, score
from volumen.inference.jobs import volume_name
from volumen.utils import distributed
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


class LabelledDice(Metric):
    """Mean Dice of the predictions that have labels; without a folder of labels there is no metric.

    A prediction that cannot be scored is a warning, never the end of a prediction.

    Args:
        labels: dataset with a `labels` folder.
        masks: folder of masks; None: `masks` beside the labels.
    """

    _state_dict_all_req_keys: tuple[str, ...] = ()

    def __init__(self, labels: str, masks: str | None = None) -> None:
        self.labels, self.masks = str(labels), masks
        self._predictions: list[str] = []
        super().__init__()

    def attach(self, engine: Engine, name: str, *_: Any) -> None:
        """Collect predictions, and score them after the last; do nothing where there are no labels."""
        if not Path(self.labels, "labels").is_dir():
            # MONAI would compare a metric that does not exist.
            setattr(engine.state, "key_metric_name", None)  # noqa: B010
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed, name)

    def reset(self, *_: Any) -> None:
        """Forget all predictions."""
        self._predictions = []

    def update(self, output: str) -> None:
        """Add the path of a prediction."""
        self._predictions.append(output)

    def iteration_completed(self, engine: Engine, *_: Any) -> None:
        """Add the evaluator's last prediction."""
        output: Any = engine.state.output
        self.update(output["pred"])

    def completed(self, engine: Engine, name: str, *_: Any) -> None:
        """Write the value into the evaluator's metrics."""
        engine.state.metrics[name] = self.compute()

    def compute(self) -> float:
        """Return the mean Dice, or NaN where nothing could be scored."""
        folders = sorted({str(Path(path).parent) for path in self._predictions})
        names = {_predicted_name(path) for path in self._predictions}
        scored = []
        for folder in folders:
            request = EvaluateRequest(folder, self.labels, folder, masks=self.masks, metrics=("dice",))
            try:
                scored += [case for case in find_cases(request) if case.name in names]
            except VolumenError as error:
                logger.warning("not scored: %s", error)
        return score(scored, request).mean.get("mean_dice", math.nan) if scored else math.nan


def _predicted_name(path: str) -> str:
    return volume_name(path.removesuffix(".volumen.json"))


class PredictionEvaluator:
    """Scores predictions against a dataset's labels; `run` is what the bundle's `run` calls.

    Args:
        predictions: the folder of predictions.
        dataset_dir: dataset with a `labels` folder.
        output_dir: where the report goes.
        settings: more fields of `EvaluateRequest`.
    """

    def __init__(
        self, predictions: str, dataset_dir: str, output_dir: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in (settings or {}).items()
            if value is not None
        }
        self.request = EvaluateRequest(str(predictions), str(dataset_dir), str(output_dir), **fields)

    def run(self) -> Evaluation:
        """Score the predictions and write the report."""
        evaluation = evaluate(self.request)
        if distributed.is_main():
            for key, value in evaluation.mean.items():
                logger.info("%s: %s", key, "undefined" if math.isnan(value) else f"{value:.4f}")
            logger.info("report: %s", Path(self.request.output, "report.html"))
        return evaluation
