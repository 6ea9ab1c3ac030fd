"""The settled part of a configuration: its sections, the keys that the user gave, and where the run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.config.sections import InferenceConfig, TargetConfig, TrainingSetup
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    import torch

    from volumen.config.dataset import OpenedData
    from volumen.data.sampling.split import Split


class RunDevice:
    """The device of a run, chosen when it is first asked for.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N`, or a device of torch.
    """

    def __init__(self, name: str | torch.device) -> None:
        self.name = str(name)

    @cached_property
    def device(self) -> torch.device:
        """The device; with several processes, this one's own. Joins their group."""
        from volumen.utils.device import choose_device
        from volumen.utils.distributed import initialize

        return initialize(choose_device(self.name))

    @property
    def is_chosen(self) -> bool:
        """Whether the device was asked for yet, and with it the group of processes joined."""
        return "device" in vars(self)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Experiment:
    """The checked sections of an experiment and the data that it is trained on.

    Attributes:
        tr_setup, tr_config, model_config, dataset_config, inference_config: the sections.
        auxiliary_tasks: derived targets by name, as they were given.
        given: keys by section that are null by default and that the user gave a value.
        origin: name of the file that the sections come from, for errors.
        output_dir: folder for the run's own folder; None where none is given.
        run_device: the device, which all configurations of a run share.
        data: the data, which they share as well.
        given_split: a division into training and validation parts in place of one made from the labels.
    """

    # Any: the keys of `UNSET` have a value here, which the types of these three sections do not say.
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

    @property
    def target_configs(self) -> Mapping[str, TargetConfig]:
        """The configured targets by name, checked; empty where every target found is trained."""
        return self.data.target_configs

    @property
    def dataset_dir(self) -> str | None:
        """The data folder; None where none is given."""
        return self.data.folder

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
        """The device as it was given."""
        return self.run_device.name

    @property
    def device(self) -> torch.device:
        """Device on which the network runs; with several processes, this one's own. Joins their group."""
        return self.run_device.device

    @property
    def has_device(self) -> bool:
        """Whether the device was chosen yet, and with it the group of processes joined."""
        return self.run_device.is_chosen

    @property
    def resume_from(self) -> str | None:
        """What the checkpoint handler resumes from: a file, `latest`, or None."""
        setup = self.tr_setup
        if setup.checkpoint_path and not setup.load_weights_only:
            return setup.checkpoint_path
        return "latest" if setup.resume else None

    @property
    def finetune_from(self) -> str | None:
        """A checkpoint to take weights alone from, or None."""
        return self.tr_setup.checkpoint_path if self.tr_setup.load_weights_only else None

    @property
    def resumes(self) -> bool:
        """Whether an existing run is continued."""
        return self.resume_from is not None

    def resumed_file(self, ending: str) -> Path | None:
        """A file of the run that is resumed: beside the checkpoint, which may be of another folder, or this run's own.

        Args:
            ending: of its name, after the model's name, such as `split.json`.

        Returns:
            The file; None where no run is resumed or it has none.
        """
        if not self.resumes:
            return None
        checkpoint = self.tr_setup.checkpoint_path
        beside = (
            sorted(Path(checkpoint).parent.glob(f"*_{ending}"))
            if checkpoint and self.resume_from == checkpoint
            else []
        )
        kept = beside[0] if len(beside) == 1 else self.run_dir / f"{self.tr_setup.model_name}_{ending}"
        return kept if kept.is_file() else None
