"""The network of an experiment: patch, stages and heads, planned from the data unless the settings state them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from volumen.config.experiment_targets import ExperimentTargets
from volumen.metrics.units import short_unit
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import by

if TYPE_CHECKING:
    from torch import nn

    from volumen.networks.planning import NetworkPlan

_LEAST_VOXELS = 0.5
_LARGEST_SHARE = 2
_ANY_IMAGE = 64
"""Voxels along an axis that a patch in lengths may have however small the images are."""


class ExperimentNetwork(ExperimentTargets):
    """An experiment whose patch and network follow from its sections, its data and its targets."""

    @cached_property
    def requested_patch_size(self) -> tuple[int, ...]:
        """The patch from the settings, else one chosen from the data."""
        from volumen.config.detection import default_patch_size

        if self.tr_config.patch_size is None:
            return default_patch_size(self.cases, self.spacing, self.device.type)
        setting, where = self.tr_config.patch_size, f"{self.origin}: tr_config.patch_size"
        size = [setting] * self.spatial_dims if isinstance(setting, str) else list(setting)
        if len(size) != self.spatial_dims:
            raise VolumenError(
                where,
                expected=f"{self.spatial_dims} numbers, as {self.cases[0].image.path} is {self.spatial_dims}D",
                found=size,
                remedy="give one size per spatial axis, (Z, Y, X) or (Y, X)",
            )
        return tuple(
            self._voxels(length, axis, where) if isinstance(length, str) else length
            for axis, length in enumerate(size)
        )

    def _voxels(self, length: str, axis: int, where: str) -> int:
        """Return the number of voxels of a length along an axis, at the (target) spacing.

        Raises:
            VolumenError: the data state no voxel size in a unit of length, or the length does not suit the images.
        """
        from volumen.data.space.units import factor, parse_length

        first, parsed = self.cases[0], parse_length(length)
        assert parsed is not None
        scale = factor(parsed[1], first.unit) if first.unit is not None else None
        if scale is None:
            stated = f"a voxel size in {first.unit or 'no unit'}"
            raise VolumenError(
                where,
                expected=f"a voxel size with a unit of length in {first.image.source}, for a patch of {length}",
                found=stated if self.data.spacing_is_stated else "none",
                remedy="give the patch in voxels",
            )
        voxels = parsed[0] * scale / self.spacing[axis]
        most = max(case.image.shape[axis] for case in self.cases)
        if voxels < _LEAST_VOXELS or voxels > max(_LARGEST_SHARE * most, _ANY_IMAGE):
            raise VolumenError(
                where,
                expected=f"lengths that suit images of up to {most} voxels of {self.spacing[axis]:g} {first.unit}",
                found=f"{length}, {voxels:.3g} voxels",
                remedy="check the unit",
            )
        return max(1, round(voxels))

    @property
    def patch_in_lengths(self) -> bool:
        """Whether the settings state the patch in lengths, which the strides rarely divide as they are."""
        size = self.tr_config.patch_size
        return isinstance(size, str) or any(isinstance(length, str) for length in size or ())

    @property
    def patch_line(self) -> str:
        """A line that says what a patch in lengths is in voxels; empty for any other patch."""
        if not self.patch_in_lengths:
            return ""
        setting = self.tr_config.patch_size
        stated = setting if isinstance(setting, str) else " x ".join(map(str, setting or ()))
        size = [f"{n * step:.4g}" for n, step in zip(self.patch_size, self.spacing, strict=True)]
        line = f"patch {stated}: {by(self.requested_patch_size)} voxels"
        if self.patch_size != self.requested_patch_size:
            line += f", enlarged to {by(self.patch_size)} for the strides"
        return f"{line}, which is {by(size)} {short_unit(self.cases[0].unit)}"

    @cached_property
    def plan(self) -> NetworkPlan:
        """The network's plan, in which values of `model_config` replace planned ones."""
        from volumen.networks.plan_settings import apply_settings
        from volumen.networks.planning import BASE_FEATURES, plan_network

        model = self.model_config
        patch_size = self.requested_patch_size  # outside `try`: its errors already name the setting
        try:
            return apply_settings(
                plan_network(patch_size, self.spacing),
                features_per_stage=model.features_per_stage,
                strides=model.strides or model.pool_op_kernel_sizes,
                kernel_sizes=model.kernel_sizes,
                blocks_per_stage=model.n_blocks_per_stage,
                n_stages=model.n_stages,
                base_features=model.base_features or BASE_FEATURES,
                max_features=model.max_features,
                adjust_patch=self.tr_setup.autoconfigure or self.patch_in_lengths,
            )
        except ValueError as error:
            raise VolumenError(
                f"{self.origin}: model_config", str(error), remedy="correct the setting"
            ) from None

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch in voxels, of a size that the network accepts."""
        return tuple(self.plan.patch_size)

    def new_network(self) -> nn.Module:
        """Return a new network of this experiment, with random weights, on torch's default device."""
        from volumen.networks.multihead import MultiHeadDynUNet

        return MultiHeadDynUNet.from_config(self.network_config)

    @property
    def input_channels(self) -> int:
        """Channels of the network's input."""
        return self.in_channels

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """Arguments of `MultiHeadDynUNet.from_config`."""
        model = self.model_config
        return {
            "spatial_dims": self.spatial_dims,
            "in_channels": self.in_channels,
            "heads": {
                name: {"out_channels": target.out_channels, "separate_decoder": target.separate_decoder}
                for name, target in self.targets.items()
            },
            "features_per_stage": list(self.plan.features_per_stage),
            "strides": [list(stride) for stride in self.plan.strides],
            "kernel_sizes": [list(kernel) for kernel in self.plan.kernel_sizes],
            "n_blocks_per_stage": list(self.plan.blocks_per_stage),
            "n_conv_per_stage_decoder": model.n_conv_per_stage_decoder,
            "norm_op": model.norm_op,
            "nonlin": model.nonlin,
            "dropout_op": model.dropout_op,
            "dropout_op_kwargs": {"p": model.dropout_p} if model.dropout_op else None,
            "conv_bias": model.conv_bias,
            "do_stem": model.do_stem,
            "stem_channels": model.stem_channels,
            "stochastic_depth_p": model.stochastic_depth_p,
            "squeeze_excitation": model.squeeze_excitation,
            "squeeze_excitation_reduction_ratio": model.squeeze_excitation_reduction_ratio,
            "pool_type": model.pool_type,
            "deep_supervision": self.tr_config.enable_deep_supervision,
        }
