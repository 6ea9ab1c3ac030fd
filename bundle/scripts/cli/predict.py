"""`volumen predict`: flags in, `PredictRequest` out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volumen.cli.flags import add_field_flags, given_fields, open_box
from volumen.config.prediction import HOW, RESULT, WHAT
from volumen.inference.request import SEVERAL, PredictRequest
from volumen.inference.rules import read_rules
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen predict` to a parser: one for each field of `PredictRequest`."""
    # Without a default both are found out later: --like knows them too.
    groups = add_field_flags(
        parser, PredictRequest, (WHAT, HOW, SEVERAL, RESULT), optional=("input", "checkpoint")
    )
    groups[WHAT].add_argument(
        "--config-path",
        metavar="YAML",
        help="experiment file; its inference_config goes before the checkpoint's",
    )


def request_from(arguments: argparse.Namespace, settings: Mapping[str, Any] | None = None) -> PredictRequest:
    """Return the request that flags ask for; what is not given is as in `settings`, else the default.

    Args:
        arguments: the parsed flags.
        settings: fields of `PredictRequest` from an experiment file or a checkpoint.

    Raises:
        VolumenError: a flag's value cannot be, or the input or the checkpoint is missing.
    """
    given: dict[str, Any] = dict(settings or {})
    if getattr(arguments, "like", None) is not None:
        from volumen.inference.record.reproduce import provenance_of, settings_to_reproduce

        given.update(settings_to_reproduce(provenance_of(Path(arguments.like))))
    readers: dict[str, Any] = {"region": open_box, "instances": read_rules, "checkpoint": _one_or_several}
    given.update(given_fields(arguments, PredictRequest, readers))
    for name in ("input", "checkpoint"):
        if name not in given:
            flag = {"input": "-i", "checkpoint": "-m"}[name]
            raise VolumenError(flag, "missing", remedy=f"give the {name}, or --like an earlier prediction")
    return PredictRequest(**given)


def _inference_section(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return `inference_config` as the experiment file gives it."""
    if getattr(arguments, "config_path", None) is None:
        return {}
    from volumen.config.experiment_file import read_experiment
    from volumen.config.prediction import InferenceConfig
    from volumen.config.validation import check_section

    section = read_experiment(arguments.config_path).get("inference_config", {})
    check_section(InferenceConfig, section, f"{arguments.config_path}: inference_config")
    return section


def _one_or_several(paths: list[str]) -> str | tuple[str, ...]:
    return paths[0] if len(paths) == 1 else tuple(paths)


def run_predict(arguments: argparse.Namespace) -> int:
    """Run `volumen predict`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.inference.ensemble import load_model
    from volumen.inference.predict import predict
    from volumen.inference.request import log_report
    from volumen.inference.settings import request_fields
    from volumen.utils.device import choose_device

    section = _inference_section(arguments)
    settings = request_fields(section)
    asked = request_from(arguments, settings)
    predictor = load_model(
        asked.checkpoint,
        choose_device("cpu" if asked.is_shared else asked.device),
        strict=section.get("load_strict"),
        fuse=True,  # the request says it, and the checkpoint's own settings are a part of that
    )
    trained = request_fields(predictor.config.get("inference_config", {}))
    request = request_from(arguments, {**trained, **settings, "checkpoint": asked.checkpoint})
    if request.like is not None:
        use_threads_of(request)
    with ProgressBar() as bar:
        report = predict(request, progress=bar, predictor=predictor)
    log_report(report)
    return 0


def use_threads_of(request: PredictRequest) -> None:
    """Compute with as many threads as the prediction that is repeated: on a CPU the last bits depend on them."""
    import torch

    from volumen.inference.record.reproduce import provenance_of

    threads = provenance_of(Path(str(request.like))).get("machine", {}).get("threads")
    if isinstance(threads, int) and threads > 0 and not request.is_shared:
        torch.set_num_threads(threads)
