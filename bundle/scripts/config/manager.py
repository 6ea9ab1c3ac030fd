"""The configuration of a run: checks the sections, adds what the data decide, and writes all of it as a snapshot.

`ConfigManager` is what the bundle's YAML refers to as `@config`. It holds one frozen dataclass per section and
answers, lazily, what follows from them and from the data. Each group of answers has a class of its own, which builds
on the one before: `experiment`, `experiment_data`, `experiment_targets`, `experiment_network`, `experiment_split`,
`experiment_training`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.config.dataset import OpenedData
from volumen.config.experiment import RunDevice
from volumen.config.experiment_file import SECTION_NAMES, check_section_names, refuse_code
from volumen.config.experiment_training import ExperimentTraining
from volumen.config.parts.dataset import DatasetConfig
from volumen.config.parts.network import ModelConfig
from volumen.config.parts.setup import TrainingSetup
from volumen.config.parts.targets import TargetConfig
from volumen.config.parts.training import TrainingConfig
from volumen.config.prediction import InferenceConfig
from volumen.config.sections import SECTIONS
from volumen.config.targets import read_target
from volumen.config.validation import check_sections, given_keys, retired_keys
from volumen.utils.errors import VolumenError
from volumen.utils.verbatim import reveal

if TYPE_CHECKING:
    import torch

    from volumen.data.layout import Layout, OpenCase
    from volumen.data.sampling.split import Split

logger = logging.getLogger(__name__)


class ConfigManager(ExperimentTraining):
    """The checked sections of an experiment, and the properties that follow from them and the data. Immutable.

    Args:
        tr_setup: training setup; see `volumen.config.parts.setup.TrainingSetup`. This and every other section is a
            mapping of keys to values, or its dataclass.
        tr_config: training parameters.
        model_config: network settings.
        dataset_config: data settings.
        inference_config: prediction settings.
        auxiliary_tasks: derived targets by name.
        dataset_dir: data folder, or several; takes precedence over `dataset_config.data_path`.
        output_dir: output folder; takes precedence over `tr_setup.ckpt_out_base`.
        device: where the network runs: `auto`, `cpu`, `cuda`, `cuda:N`, a device of torch, or the device of another
            configuration of the same run.
        origin: name of the file the sections come from, for errors.
        given: keys by section that are null by default and to which the user gave a value; None: all keys with a
            value.
        data: the data of another configuration of the same experiment, in place of those that `dataset_dir` and
            `dataset_config` name.
        split: division into training and validation parts; None: computed from the labels.

    Raises:
        VolumenError: an unknown key or a wrong value; names file, key and remedy.
    """

    opened: ClassVar[type[OpenedData]] = OpenedData
    """How the data are opened."""

    def __init__(
        self,
        *,
        tr_setup: Mapping[str, Any] | TrainingSetup | None = None,
        tr_config: Mapping[str, Any] | TrainingConfig | None = None,
        model_config: Mapping[str, Any] | ModelConfig | None = None,
        dataset_config: Mapping[str, Any] | DatasetConfig | None = None,
        inference_config: Mapping[str, Any] | InferenceConfig | None = None,
        auxiliary_tasks: Mapping[str, Any] | None = None,
        dataset_dir: str | Sequence[str] | None = None,
        output_dir: str | None = None,
        device: str | torch.device | RunDevice = "auto",
        origin: str = "configuration",
        given: Mapping[str, frozenset[str]] | None = None,
        data: OpenedData | None = None,
        split: Split | None = None,
    ) -> None:
        sections = reveal(
            {
                "tr_setup": tr_setup,
                "tr_config": tr_config,
                "model_config": model_config,
                "dataset_config": dataset_config,
                "inference_config": inference_config,
            }
        )
        tasks, origin, device = reveal(auxiliary_tasks), reveal(origin), reveal(device)
        dataset_dir, output_dir = reveal(dataset_dir), reveal(output_dir)
        plain = {name: values for name, values in sections.items() if not isinstance(values, SECTIONS[name])}
        check_section_names({**plain, "auxiliary_tasks": tasks}, origin)
        refuse_code({**plain, "auxiliary_tasks": tasks}, origin)
        checked = _with_unlabelled(check_sections(sections, origin))
        for line in retired_keys(plain, origin):
            logger.warning("%s", line)
        super().__init__(
            **checked,
            auxiliary_tasks=dict(tasks or {}),
            given=given_keys(sections) if given is None else given,
            origin=origin,
            output_dir=output_dir or checked["tr_setup"].ckpt_out_base,
            run_device=device if isinstance(device, RunDevice) else RunDevice(device),
            data=data
            or _data(self.opened, checked["dataset_config"], checked["model_config"], dataset_dir, origin),
            given_split=split,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"a configuration does not change; {name} is given to the constructor")

    def variant(
        self, *, data: OpenedData | None = None, split: Split | None = None, **sections: Any
    ) -> ConfigManager:
        """Return the same experiment on the same opened data with other sections.

        The data are not opened again, even if the new `dataset_config` would open them differently.

        Args:
            data: other data; None: the same.
            split: another division into training and validation parts; None: the same if it was given, else
                computed from the sections.
            **sections: checked sections by name, such as `tr_config`.
        """
        return type(self)(
            **{**{name: getattr(self, name) for name in SECTION_NAMES}, **sections},
            output_dir=self.output_dir,
            device=self.run_device,
            origin=self.origin,
            given=self.given,
            data=data or self.data,
            split=split or self.given_split,
        )

    def with_lists(self, train: Sequence[Any], val: Sequence[Any] | None = None) -> ConfigManager:
        """Train on images that are listed one by one, in place of a folder.

        Args:
            train: the result of `items("train")`, which changes nothing, or a list of
                {"image": path, "label": path}, see `volumen.data.datalist`. If the settings have one target, `label`
                belongs to it.
            val: images that validate. The result of `items("val")`: a share of the listed images validates
                (`tr_setup.tr_val_split`); an empty list: none.

        Returns:
            This experiment, or the same with the listed images.

        Raises:
            VolumenError: an entry is no such dictionary, or only `val` is given.
        """
        from volumen.data.datalist import LABEL, CaseItems

        by_split = val is None or isinstance(val, CaseItems)
        if isinstance(train, CaseItems):
            if not by_split:
                raise VolumenError(
                    "validate#dataset#data", "is a list and train#dataset#data is none", remedy="give both"
                )
            return self
        target = next(iter(self.target_configs)) if len(self.target_configs) == 1 else LABEL
        return self.variant(data=self.data.listed(train, None if by_split else val, target))

    def with_cases(self, cases: list[OpenCase], layout: Layout) -> ConfigManager:
        """Train on volumes that are already open, such as a viewer's layers, in place of a folder's.

        Args:
            cases: the volumes, checked against each other.
            layout: their names and targets.

        Returns:
            The same experiment with these volumes.
        """
        return self.variant(data=replace(self.data, given_cases=cases, given_layout=layout))

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return every section with all values filled in: plain data that trains the same model again."""
        from volumen.data.layout import FORMATS

        model = self.network_config
        return {
            "tr_setup": {
                **asdict(self.tr_setup),
                "ckpt_out_base": _text(self.output_dir),
                "checkpoint_path": self.finetune_from,
                "resume": False,
            },
            "tr_config": {**asdict(self.tr_config), "patch_size": list(self.patch_size)},
            "model_config": {
                **asdict(self.model_config),
                "targets": {},
                "in_channels": self.in_channels,
                "features_per_stage": model["features_per_stage"],
                "n_blocks_per_stage": model["n_blocks_per_stage"],
                "kernel_sizes": model["kernel_sizes"],
                "strides": model["strides"],
                "pool_op_kernel_sizes": None,
            },
            "dataset_config": {
                **asdict(self.dataset_config),
                # A value here would count as the user's, which is never lowered.
                **({"min_labeled_ratio": None} if self.relaxes_labeled_ratio else {}),
                "data_path": self.dataset_dir,
                # Several folders may have several formats, which are found again.
                "format": self.layout.format if self.layout.format in FORMATS else None,
                "targets": {name: target.snapshot() for name, target in self.primary_targets.items()},
                "trained_spacing": list(self.spacing) if self.data.spacing_is_stated else None,
                "trained_unit": self.cases[0].unit,
                "trained_orientation": self.orientation,
                "intensity_properties": self.intensity_properties,
                "trained_intensities": self.trained_intensities,
            },
            "inference_config": asdict(self.inference_config),
            "auxiliary_tasks": {
                name: target.snapshot()
                for name, target in self.learned_or_read.items()
                if target.auxiliary_task
            },
        }


def _with_unlabelled(checked: dict[str, Any]) -> dict[str, Any]:
    """Accept images without labels where the training learns from them."""
    if checked["tr_config"].unlabelled is None:
        return checked
    return {**checked, "dataset_config": replace(checked["dataset_config"], allow_unlabeled_data=True)}


def _data(
    kind: type[OpenedData],
    settings: DatasetConfig,
    model: ModelConfig,
    dataset_dir: str | Sequence[str] | None,
    origin: str,
) -> OpenedData:
    paths = dataset_dir or settings.data_path or ()
    return kind(
        folders=(str(paths),) if isinstance(paths, str | os.PathLike) else tuple(map(str, paths)),
        settings=settings,
        target_configs=_target_configs(settings.targets, model.targets, origin),
        configured_channels=model.in_channels,
        origin=origin,
    )


def _target_configs(
    here: Mapping[str, Any], there: Mapping[str, Any], origin: str
) -> dict[str, TargetConfig]:
    """Join the targets of `dataset_config` and of `model_config`."""
    twice = sorted(name for name in set(here) & set(there) if here[name] != there[name])
    if twice:
        raise VolumenError(
            f"{origin}: targets.{twice[0]}",
            "dataset_config.targets and model_config.targets contradict each other",
            remedy="keep one of them",
        )
    return {name: read_target(name, entry, origin) for name, entry in {**there, **here}.items()}


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
