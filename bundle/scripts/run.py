"""A training from start to end: the bundle's configs run as MONAI runs them, seeded before, cleaned up after."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.config.experiment_file import check_section_names, merge, refuse_code, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.data.labels.label_channels import LabelRule, label_rule
from volumen.data.layout import Layout
from volumen.utils.bundle_root import configs_dir
from volumen.utils.errors import VolumenError, find_cause, is_out_of_memory
from volumen.utils.verbatim import Verbatim, protect

if TYPE_CHECKING:
    from volumen.data.layout import OpenCase
    from volumen.handlers.metric import KeyMetric
    from volumen.handlers.records.run_directory import RunDirectory

Settings = Mapping[str, Mapping[str, Any]]
logger = logging.getLogger(__name__)

FIRST_STEPS = 10
"""Steps after whose last one a lack of memory no longer starts the run again."""
OpenCases = Callable[[Sequence[str] | None, bool, Mapping[str, LabelRule]], list["OpenCase"]]
"""Opens volumes, given the configured targets (None: all there are), whether labels may be missing, and what the
settings say of how labels are stored."""


def train_on_folder(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    device: str = "auto",
    handlers: Sequence[Any] = (),
) -> Path:
    """Train on a data folder.

    Args:
        data: folder with `images/`, `labels/<image>_<target>` and, optionally, `masks/`, or several.
        output_dir: folder for the run.
        settings: any part of the experiment's sections, as an experiment file holds them.
        device: auto, cpu, cuda or cuda:N.
        handlers: objects with `attach(engine)`, which come after the trainer's own.

    Returns:
        Folder of the run.

    Raises:
        VolumenError: data that do not fit each other, or a wrong setting.
    """
    config = ConfigManager(
        **_all_sections(settings),
        dataset_dir=os.fspath(data) if isinstance(data, str | os.PathLike) else [os.fspath(d) for d in data],
        output_dir=os.fspath(output_dir),
        device=device,
        origin="settings",
    )
    return _train(config, handlers)


def train_on_cases(
    open_cases: OpenCases,
    output_dir: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    where: str = "arrays",
    device: str = "auto",
    handlers: Sequence[Any] = (),
) -> Path:
    """Train on volumes that are no files: arrays in memory, or the layers of a viewer.

    Args:
        open_cases: opens the volumes.
        output_dir: folder for the run.
        settings: any part of the experiment's sections.
        where: what holds the volumes, for messages.
        device: auto, cpu, cuda or cuda:N.
        handlers: objects with `attach(engine)`.

    Returns:
        Folder of the run.

    Raises:
        VolumenError: volumes that do not fit each other, or a wrong setting.
    """
    sections = _all_sections(settings)
    # Another session must not find an index of arrays that only this process holds.
    sections["dataset_config"]["cache_valid_patches"] = False
    config = ConfigManager(**sections, output_dir=os.fspath(output_dir), device=device, origin="settings")
    rules = {name: label_rule(name, vars(target)) for name, target in config.target_configs.items()}
    cases = open_cases(list(config.target_configs) or None, config.dataset_config.allow_unlabeled_data, rules)
    targets = tuple(sorted({target for case in cases for target in case.labels}))
    layout = Layout(root=where, format="napari", cases=(), targets=targets)
    return _train(config.with_cases(cases, layout), handlers)


def _all_sections(settings: Settings | None) -> dict[str, Any]:
    given = {name: dict(section) for name, section in (settings or {}).items()}
    check_section_names(given, "settings")
    refuse_code(given, "settings")
    return merge(shipped_sections(), given)


def _train(config: ConfigManager, handlers: Sequence[Any]) -> Path:
    try:
        run_bundle("train.yaml", (), {"experiment": config}, handlers=handlers)
    except Exception as error:
        finish_run(config)  # the calling process lives on
        cause = find_cause(error)  # MONAI wraps what its components raise
        if isinstance(cause, VolumenError):
            raise cause from None
        raise
    return config.run_dir


def run_bundle(
    name: str,
    overlays: Sequence[str],
    overrides: dict[str, Any],
    *,
    handlers: Sequence[Any] = (),
    tracking: str | None = None,
) -> int:
    """Run one of the bundle's configs as `python -m monai.bundle run` does.

    Args:
        name: file name under `configs/`.
        overlays: more config files, merged over it in order.
        overrides: values by MONAI id; texts in them are taken as they are, never as references or expressions.
        handlers: more handlers of the trainer, objects with `attach(engine)`.
        tracking: "mlflow" or a file of MONAI's tracking settings; None tracks nothing.

    Returns:
        Exit code.
    """
    try:
        return _run_once(name, overlays, overrides, handlers, tracking)
    except _OutOfMemory as error:
        smaller = error.smaller
        logger.warning(
            "out of memory in the first steps: starting again with %s", smaller.tr_config.memory_choice
        )
    # Only here, where the error and its frames are gone, is the memory of the first try free.
    finish_run(smaller)
    _free_memory()
    return _run_once(name, overlays, {**overrides, "config": smaller}, handlers, tracking, again=True)


class _OutOfMemory(Exception):
    """The first steps ran out of memory.

    Args:
        smaller: the configuration of a run that needs less.
    """

    def __init__(self, smaller: ConfigManager) -> None:
        super().__init__("out of memory")
        self.smaller = smaller


def _run_once(
    name: str,
    overlays: Sequence[str],
    overrides: dict[str, Any],
    handlers: Sequence[Any],
    tracking: str | None,
    *,
    again: bool = False,
) -> int:
    """Run a config; see `run_bundle`.

    Raises:
        _OutOfMemory: the first steps ran out of memory, a smaller batch or patch may be chosen, and not `again`.
    """
    from monai.bundle import ConfigWorkflow

    # It would log that our own logging set-up stays; importing it has set its level.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    configs = configs_dir()
    overrides = {key: protect(value) for key, value in overrides.items()}
    if tracking is not None and isinstance(overrides.get("output_dir"), Verbatim):
        # MONAI would write its copy of the config as JSON, which knows no such text; ours is written in any case.
        overrides["save_execute_config"] = False
    workflow = ConfigWorkflow(
        config_file=[str(configs / name), *overlays],
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        tracking=tracking,
        **overrides,
    )
    if handlers:
        # Before `initialize` the parser holds the plain config; a list in it may hold objects besides.
        workflow.parser["train#handlers"].extend(handlers)
    workflow.initialize()
    smaller = None
    try:
        results = workflow.run()
    except Exception as error:
        if again or not is_out_of_memory(error):
            raise
        smaller = _smaller_run(workflow.parser)
        if smaller is None:
            raise
    if smaller is not None:
        raise _OutOfMemory(smaller)
    workflow.finalize()
    codes = [result for result in results if isinstance(result, int) and not isinstance(result, bool)]
    return codes[-1] if codes else 0


def _smaller_run(parser: Any) -> ConfigManager | None:
    """Return the configuration with half the batch or patch, if a new run failed in its first steps."""
    from volumen.time_budget.memory_fit import halved
    from volumen.utils.distributed import is_distributed

    config = parser.get_parsed_content("config")
    steps = parser.get_parsed_content("train#trainer").state.iteration
    if config.resumes or is_distributed() or steps > FIRST_STEPS:
        return None
    return halved(parser.get_parsed_content("experiment"), config)


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_run(
    config: ConfigManager, run_directory: RunDirectory | None = None, key_metric: KeyMetric | None = None
) -> None:
    """Seed everything, check that the run may write where it is to write, and log what will be trained.

    Args:
        config: the experiment.
        run_directory: the run's folder; nothing is created here.
        key_metric: the metric that chooses the best epoch. It is checked when it is made, so it is asked for here,
            before the data are searched for patches.

    Raises:
        VolumenError: a folder that belongs to another run, or a checkpoint that does not fit.
    """
    from volumen.config.log import log_experiment
    from volumen.handlers.records.tracking import stay_local
    from volumen.utils.device import time_convolutions
    from volumen.utils.memory import keep_freed_memory

    stay_local()
    # Several processes meet at their devices, before the first of them touches the disk.
    keep_freed_memory(config.device)
    if run_directory is not None:
        run_directory.check()
        if config.resume_from is not None:
            _check_resumable(config, run_directory, config.resume_from)
    seed_everything(config.tr_setup.seed, config.tr_setup.deterministic)
    time_convolutions(config.device, config.tr_setup.deterministic)
    log_experiment(config)


def finish_run(config: ConfigManager) -> None:
    """Give back the memory that `start_run` had the C library hold, and leave the group of processes, if any."""
    from volumen.utils.distributed import finalize
    from volumen.utils.memory import return_freed_memory

    if config.has_device:  # the run may have failed before
        return_freed_memory(config.device)
    finalize()


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch: weights and dropout; sampling and augmentation have seeds of their own.

    Args:
        seed: the seed.
        deterministic: whether torch refuses operations whose result varies from call to call.
    """
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        # Without it cuBLAS refuses to be deterministic; it reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _check_resumable(config: ConfigManager, run_directory: RunDirectory, resume: str) -> None:
    import torch

    from volumen.handlers.records.resumable import check_resumable

    with torch.device("meta"):
        network = config.new_network()
    check_resumable(run_directory, resume, network, config.fingerprints)
