"""The fixed part of a configuration: its sections, the keys that the user gave, and the run's folder and device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.config.parts.setup import TrainingSetup
from volumen.config.parts.targets import TargetConfig
from volumen.config.prediction import InferenceConfig
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    import torch

    from volumen.config.dataset import OpenedData
    from volumen.data.sampling.split import Split


class RunDevice:
    """The device of a run, chosen at first use.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N`, or a device of torch.
    """

    def __init__(self, name: str | torch.device) -> None:
        self.name = str(name)

    @cached_property
    def device(self) -> torch.device:
        """The device of this process. The first use also joins the process group if there are several processes."""
        from volumen.utils.device import choose_device
        from volumen.utils.distributed import initialize

        return initialize(choose_device(self.name))

    @property
    def is_chosen(self) -> bool:
        """Whether the device has been chosen, and thus the process group joined."""
        return "device" in vars(self)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Experiment:
    """The checked sections of an experiment and the data on which it trains.

    Attributes:
        tr_setup, tr_config, model_config, dataset_config, inference_config: the sections.
        auxiliary_tasks: derived targets by name, as the user gave them.
        given: keys by section that are null by default and to which the user gave a value.
        origin: name of the file that the sections come from, for errors.
        output_dir: parent of the run's folder; None if none is given.
        run_device: the device; all configurations of a run share it.
        data: the data; all configurations of an experiment share them.
        given_split: a division into training and validation parts in place of one made from the labels.
    """

    # Any: the keys of `UNSET` are never None here, which the types of these three sections do not express.
    tr_setup: TrainingSetup
    tr_config: Any
    model_config: Any
    dataset_config: Any
    inference_config: InferenceConfig
    auxiliary_tasks: dict[str, Any]
    given: Mapping[str, frozenset[str]]
    origin: str
    output_dir: str | None
    run_device: RunDevice
    data: OpenedData
    given_split: Split | None = None

    bundle_configs: ClassVar[tuple[str, ...]] = ("train.yaml",)
    """The bundle's configs whose objects run this experiment; a later one replaces parts of an earlier one."""

    @property
    def target_configs(self) -> Mapping[str, TargetConfig]:
        """The configured targets by name, checked; empty if all targets that are found are trained."""
        return self.data.target_configs

    @property
    def dataset_dir(self) -> str | list[str] | None:
        """The data folder, or the list of several; None where none is given."""
        return self.data.path

    @property
    def run_dir(self) -> Path:
        """Folder of this run: `<output>/<model_name>`."""
        if not self.output_dir:
            raise VolumenError(
                "-o/--output", "no output folder is given", remedy="give -o or tr_setup.ckpt_out_base"
            )
        return Path(self.output_dir) / self.tr_setup.model_name

    @property
    def device_name(self) -> str:
        """The device's name as the user gave it."""
        return self.run_device.name

    @property
    def device(self) -> torch.device:
        """Device of this process, on which the network runs. The first use joins the process group."""
        return self.run_device.device

    @property
    def has_device(self) -> bool:
        """Whether the device has been chosen, and thus the process group joined."""
        return self.run_device.is_chosen

    @property
    def resume_from(self) -> str | None:
        """The checkpoint from which training resumes: a file, `latest`, or None."""
        setup = self.tr_setup
        if setup.checkpoint_path and not setup.load_weights_only:
            return setup.checkpoint_path
        return "latest" if setup.resume else None

    @property
    def finetune_from(self) -> str | None:
        """A checkpoint from which only the weights are loaded, or None."""
        return self.tr_setup.checkpoint_path if self.tr_setup.load_weights_only else None

    @property
    def resumes(self) -> bool:
        """Whether an existing run is continued."""
        return self.resume_from is not None

    def resumed_file(self, ending: str) -> Path | None:
        """Find a file of the resumed run: beside its checkpoint, which may lie elsewhere, or in this run's folder.

        Args:
            ending: end of its name, after the model's name, such as `split.json`.

        Returns:
            The file; None if no run is resumed or the run has no such file.
        """
        if not self.resumes:
            return None
        checkpoint = self.tr_setup.checkpoint_path
        beside = (
            sorted(Path(checkpoint).parent.glob(f"*_{ending}"))
            if checkpoint and self.resume_from == checkpoint
            else []
        )
        found = beside[0] if len(beside) == 1 else self.run_dir / f"{self.tr_setup.model_name}_{ending}"
        return found if found.is_file() else None
