"""The configuration of a pretraining: the images of an experiment without its labels, and what of them is hidden."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.config.dataset import OpenedData, chosen
from volumen.config.manager import ConfigManager
from volumen.utils.errors import VolumenError
from volumen.utils.verbatim import reveal

if TYPE_CHECKING:
    from torch import nn

    from volumen.data.layout import Layout
    from volumen.data.sampling.split import Split

logger = logging.getLogger(__name__)

MASK_RATIO = {2: 0.6, 3: 0.75}
"""Share of hidden blocks by dimensions: that of SparK (arXiv:2301.03580) in 2D, that of nnssl's SparK in 3D."""
LEAST_BLOCK, FEWEST_BLOCKS = 8, 4
"""Sides that blocks have at least by default, in voxels of the smallest spacing, if the patch is four times as long:
a smaller hole is completed from its rim without any knowledge of what is in the image."""
_UNSET: dict[str, dict[str, Any]] = {
    "tr_config": {"unlabelled": None},
    "dataset_config": {"targets": {}, "val_path": None},
    "model_config": {"targets": {}},
}
_NEED_LABELS = ("fold", "group_by")


@dataclass(frozen=True, eq=False, repr=False)
class OpenedImages(OpenedData):
    """The images of an experiment; labels and masks are not opened."""

    @cached_property
    def layout(self) -> Layout:
        """Which images there are."""
        from volumen.data.joining import discover_images

        if self.given_layout is not None:
            return self.given_layout
        self.need_folders()
        return chosen(
            discover_images(self.folders, format=self.settings.format), self.settings.volumes, self.origin
        )


class PretrainingConfig(ConfigManager):
    """A configuration of which only images count: no targets, no derived targets, and nothing validates.

    Patch, network, normalisation and resampling follow from the same settings as in a training, so that the encoder
    fits the training that takes it. Images that the settings name for validation (`val_volumes`, `split_path`,
    `val_path`) are left out.
    """

    opened: ClassVar[type[OpenedData]] = OpenedImages
    bundle_configs: ClassVar[tuple[str, ...]] = ("train.yaml", "pretrain.yaml")

    def __init__(self, **arguments: Any) -> None:
        for name, unset in _UNSET.items():
            arguments[name] = _without(reveal(arguments.get(name)), unset)
        super().__init__(**{**arguments, "auxiliary_tasks": None})

    def new_network(self) -> nn.Module:
        """Return a new network: the encoder and the light decoder."""
        from volumen.networks.masked_autoencoder import MaskedAutoencoder

        return MaskedAutoencoder.from_config(self.network_config)

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: those of the image, and one that says what is visible."""
        return self.in_channels + 1

    @property
    def finetune_from(self) -> str | None:
        """None: a checkpoint to finetune belongs to the later training."""
        return None

    @property
    def trains_decoders_first(self) -> bool:
        """False: the decoder is thrown away."""
        return False

    @property
    def mask_ratio(self) -> float:
        """Share of a patch's blocks that are hidden."""
        ratio = self.tr_config.pretrain_mask_ratio
        return MASK_RATIO[self.spatial_dims] if ratio is None else ratio

    @cached_property
    def mask_block(self) -> tuple[int, ...]:
        """Voxels per axis of a hidden block.

        Raises:
            VolumenError: the setting is no multiple of what one position of the deepest features covers.
        """
        least = [prod(stride[axis] for stride in self.plan.strides) for axis in range(self.spatial_dims)]
        block = self.tr_config.pretrain_mask_block
        if block is None:
            wide = [LEAST_BLOCK * min(self.spacing) / size for size in self.spacing]
            return tuple(map(_widened, least, wide, self.patch_size))
        if len(block) != len(least) or any(side % step for side, step in zip(block, least)):
            raise VolumenError(
                f"{self.origin}: tr_config.pretrain_mask_block",
                expected=f"multiples of {list(least)}, the voxels that one position of the deepest features covers",
                found=list(block),
                remedy="leave it out, or give fewer stages (model_config.n_stages)",
            )
        return tuple(block)

    @cached_property
    def intensity_properties(self) -> dict[str, Any]:
        """Statistics of the images for the normalisation, from the settings, else sampled.

        Raises:
            VolumenError: the scheme takes them from labelled objects.
        """
        from volumen.transforms.normalize import schemes_of

        data = self.dataset_config
        if "ct" in schemes_of(data.normalization_scheme) and not data.intensity_properties:
            raise VolumenError(
                f"{self.origin}: dataset_config.normalization_scheme",
                "ct takes its statistics from labelled objects, and pretraining reads no labels",
                remedy="give dataset_config.intensity_properties, as a training's _config.yaml has them, or zscore",
            )
        return super().intensity_properties

    def _new_split(self) -> Split:
        from volumen.data.sampling.split import Split
        from volumen.utils.boxes import whole_box

        data = self.dataset_config
        for key in _NEED_LABELS:
            if getattr(data, key) is not None:
                logger.warning(
                    "dataset_config.%s: has no effect on pretraining, which divides nothing by labels", key
                )
        named = self.data.validation_names is not None
        if named or data.val_volumes is not None or data.split_path is not None:
            return replace(super()._new_split(), val={})
        everything = {name: [whole_box(shape)] for name, shape in self._shapes.items()}
        return Split(everything, {}, 1.0, self.tr_setup.seed)


def _widened(side: int, wide: float, patch: int) -> int:
    """Double a block's side until it is wide enough, as far as it divides the patch into `FEWEST_BLOCKS` or more."""
    while side < wide and patch % (2 * side) == 0 and patch // (2 * side) >= FEWEST_BLOCKS:
        side *= 2
    return side


def _without(section: Any, unset: Mapping[str, Any]) -> Any:
    """Return a section, a mapping or a dataclass, in which some keys have the value that they have by default."""
    if section is None:
        return None
    if isinstance(section, Mapping):
        return {**section, **{key: value for key, value in unset.items() if key in section}}
    return replace(section, **unset)
