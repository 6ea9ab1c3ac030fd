"""The network of an experiment: patch, stages and heads, planned from the data unless the settings state them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from volumen.config.experiment_targets import ExperimentTargets
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.networks.planning import NetworkPlan


class ExperimentNetwork(ExperimentTargets):
    """An experiment whose patch and network follow from its sections, its data and its targets."""

    @cached_property
    def requested_patch_size(self) -> tuple[int, ...]:
        """The patch from the settings, else one chosen from the data."""
        from volumen.config.detection import default_patch_size

        if self.tr_config.patch_size is None:
            return default_patch_size(self.cases, self.spacing, self.device.type)
        size = tuple(self.tr_config.patch_size)
        if len(size) != self.spatial_dims:
            raise VolumenError(
                f"{self.origin}: tr_config.patch_size",
                expected=f"{self.spatial_dims} numbers, as {self.cases[0].image.path} is {self.spatial_dims}D",
                found=list(size),
                remedy="give one size per spatial axis, (Z, Y, X) or (Y, X)",
            )
        return size

    @cached_property
    def plan(self) -> NetworkPlan:
        """The network's plan, in which values of `model_config` replace planned ones."""
        from volumen.networks.plan_settings import apply_settings
        from volumen.networks.planning import plan_network

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
                base_features=model.base_features,
                max_features=model.max_features,
                adjust_patch=self.tr_setup.autoconfigure,
            )
        except ValueError as error:
            raise VolumenError(
                f"{self.origin}: model_config", str(error), remedy="correct the setting"
            ) from None

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch in voxels, of a size that the network accepts."""
        return tuple(self.plan.patch_size)

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
