"""An encoder that is trained without labels: it sees a part of an image, and a light decoder reconstructs the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from volumen.networks.blocks import Decoder
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.networks.operations import Operations
from volumen.networks.visible_encoder import check_maskable, visible_features
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import PRETRAINED, RECONSTRUCTION

METHOD = "masked reconstruction"
DECODER_SHARE = 0.5
"""Channels of the decoder as a share of the encoder's."""
LEAST_CHANNELS = 8
TOKEN_WIDTH = 0.02
"""Standard deviation of the mask embeddings at the start, as in SparK."""


class MaskedAutoencoder(nn.Module):
    """The encoder of `MultiHeadDynUNet`, and a light decoder that reconstructs hidden voxels.

    As SparK (Tian et al. 2023, arXiv:2301.03580): the encoder computes with visible voxels alone; at every resolution
    a learned embedding replaces the hidden positions ("densifying"); a 1x1 convolution halves the channels; a U-shaped
    decoder with one convolution per stage gives the image. The decoder is thrown away after pretraining.

    Input (B, C + 1, *spatial): the image, and a last channel that is above 0 where a voxel is visible. Output: a
    dictionary with the key "reconstruction": (B, C, *spatial), in units of each block's own mean and standard
    deviation, see `MaskedReconstructionLoss`.

    Args:
        config: the arguments of `MultiHeadDynUNet`; those of heads, deep supervision and fusion have no effect.

    Raises:
        ValueError: settings that contradict each other, or a normalisation that knows no hidden positions.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels = int(config["in_channels"])
        heads = {RECONSTRUCTION: {"out_channels": channels, "separate_decoder": False}}
        arguments = {key: value for key, value in config.items() if key not in _OF_HEADS}
        whole = MultiHeadDynUNet(**arguments, heads=heads)
        check_maskable(whole.encoder)
        self.final_config: dict[str, Any] = {
            **{key: value for key, value in whole.final_config.items() if key not in _OF_HEADS},
            PRETRAINED: METHOD,
        }
        settings = self.final_config
        ndim, features = settings["spatial_dims"], settings["features_per_stage"]
        operations = Operations(
            norm_op=settings["norm_op"], norm_op_kwargs=settings["norm_op_kwargs"],
            nonlin=settings["nonlin"], nonlin_kwargs=settings["nonlin_kwargs"], conv_bias=settings["conv_bias"],
        )  # fmt: skip
        widths = [max(LEAST_CHANNELS, int(width * DECODER_SHARE)) for width in features]
        convolution = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.divisor = whole.divisor
        #: Whether features are computed again in the backward pass; `recompute_activations` sets it.
        self.recomputes = False
        self.encoder = whole.encoder
        self.tokens = nn.ParameterList(
            nn.Parameter(TOKEN_WIDTH * torch.randn(1, width, *(1,) * ndim)) for width in features
        )
        self.projections = nn.ModuleList(
            convolution(width, less, kernel_size=1) for width, less in zip(features, widths)
        )
        self.decoder = Decoder(
            ndim, widths, settings["strides"], settings["kernel_sizes"], [1] * (len(widths) - 1), operations
        )
        self.head = convolution(widths[0], channels, kernel_size=1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MaskedAutoencoder:
        """Return a new network with the encoder that a configuration describes.

        Raises:
            VolumenError: a setting in it is not possible.
        """
        try:
            return cls(config)
        except ValueError as error:
            raise VolumenError("model_config", str(error), remedy="correct the setting") from error

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the reconstruction of the whole image, hidden and visible."""
        image, visible = x[:, :-1], x[:, -1:] > 0
        skips = []
        levels = visible_features(self.encoder, image, visible, recompute=self.recomputes)
        for features, token, project in zip(levels, self.tokens, self.projections):
            steps = [before // after for before, after in zip(visible.shape[2:], features.shape[2:])]
            shown = visible[(slice(None), slice(None), *(slice(None, None, step) for step in steps))]
            skips.append(project(torch.where(shown, features, token.to(features.dtype))))
        return {RECONSTRUCTION: self.head(self.decoder(skips)[0])}


_OF_HEADS = ("heads", "deep_supervision", "fusion", "n_conv_per_stage_decoder", PRETRAINED)
