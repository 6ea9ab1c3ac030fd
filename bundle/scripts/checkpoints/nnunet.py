"""Load the weights of nnU-Net v2's residual-encoder U-Nets.

nnU-Net builds them from the package dynamic-network-architectures (`ResidualEncoderUNet`). The names correspond:

| nnU-Net | here |
| --- | --- |
| encoder.stem.convs.I.conv | encoder.stem.I.conv |
| encoder.stages.S.blocks.B.conv1.conv | encoder.stages.S.B.conv1.conv |
| encoder.stages.S.blocks.B.skip.I.conv | encoder.stages.S.B.skip.I.conv |
| ....norm | ....adn.N |
| decoder.transpconvs.S | decoders.D.up.S.conv |
| decoder.stages.S.convs.I.conv | decoders.D.stages.S.I.conv |
| decoder.seg_layers.S | left out: the heads belong to other targets |

D is the requested decoder. The names with `all_modules` and `decoder.encoder` are second names of the same
weights. A checkpoint file holds them under `network_weights`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from volumen.checkpoints.weights import LoadReport, load_partial, plain_name
from volumen.networks.multihead import SHARED, MultiHeadDynUNet, key_of

WEIGHTS_KEY = "network_weights"
SECOND_NAMES = re.compile(r"(^|\.)all_modules\.|^decoder\.encoder\.")
RENAMED = (
    (re.compile(r"^encoder\.stem\.convs\."), "encoder.stem."),
    (re.compile(r"^encoder\.stages\.(\d+)\.blocks\."), r"encoder.stages.\1."),
    (re.compile(r"^decoder\.transpconvs\.(\d+)\."), r"decoder.up.\1.conv."),
    (re.compile(r"^decoder\.stages\.(\d+)\.convs\."), r"decoder.stages.\1."),
    (re.compile(r"\.norm\.(weight|bias|running_mean|running_var|num_batches_tracked)$"), r".adn.N.\1"),
)


def safe_globals() -> list[Any]:
    """Return the types in nnU-Net's files other than tensors: the numbers of its log, in NumPy's types.

    Use: `with torch.serialization.safe_globals(safe_globals()): torch.load(path, weights_only=True)`. They
    are plain values and run no code. Files of NumPy 1 name `numpy.core`, those of NumPy 2 `numpy._core`.
    """
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds, codecs.encode]


def is_nnunet_state(state_dict: Mapping[str, Any]) -> bool:
    """Return whether the names are those of an nnU-Net residual-encoder U-Net."""
    return any(re.match(r"encoder\.stages\.\d+\.blocks\.", plain_name(name)) for name in state_dict)


def from_nnunet(state_dict: Mapping[str, Tensor], decoder: str | None = None) -> dict[str, Tensor]:
    """Rename nnU-Net's weights to this program's names.

    Args:
        state_dict: the checkpoint's `network_weights`.
        decoder: name of the module that receives the decoder ("shared" or `key_of(target)`); None: encoder only.

    Returns:
        This program's names with the same tensors.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        name = plain_name(name)
        if SECOND_NAMES.search(name) or name.startswith("decoder.seg_layers."):
            continue
        for pattern, ours in RENAMED:
            name = pattern.sub(ours, name)
        if name.startswith("decoder."):
            if decoder is None:
                continue
            name = f"decoders.{decoder}." + name.removeprefix("decoder.")
        renamed[name] = tensor
    return renamed


def load_nnunet(
    network: MultiHeadDynUNet, checkpoint: Mapping[str, Any], *, decoder_for: str | None = None
) -> LoadReport:
    """Load an nnU-Net v2 residual-encoder U-Net into a network's encoder.

    Args:
        network: the network, changed in place.
        checkpoint: nnU-Net's checkpoint, or its `network_weights` alone.
        decoder_for: target whose decoder receives the checkpoint's decoder; None: encoder only.

    Returns:
        What was loaded; `missing` lists the network's other weights, among them the heads.

    Raises:
        ValueError: if the weights belong to another kind of network, or the target has no head.
    """
    weights = checkpoint.get(WEIGHTS_KEY, checkpoint)
    if not is_nnunet_state(weights):
        raise ValueError(
            "checkpoint must be of a residual-encoder U-Net (names such as encoder.stages.0.blocks.0.conv1),"
            f" got names such as {', '.join(list(weights)[:3])}"
        )
    decoder = None
    if decoder_for is not None:
        if decoder_for not in network.targets:
            raise ValueError(
                f"target {decoder_for!r} has no head; the network has {', '.join(network.targets)}"
            )
        separate = network.final_config["heads"][decoder_for]["separate_decoder"]
        decoder = key_of(decoder_for) if separate else SHARED
    return load_partial(network, from_nnunet(weights, decoder))
