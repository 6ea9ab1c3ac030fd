"""Encoders that were pretrained without labels: by `volumen pretrain`, or by nnssl (github.com/MIC-DKFZ/nnssl).

A checkpoint of nnssl holds `network_weights` with the names of `ResidualEncoderUNet` of the package
dynamic-network-architectures, so `from_nnunet` renames them:

| nnssl | here |
| --- | --- |
| encoder.stem.convs.0.conv, .norm | encoder.stem.0.conv, .adn.N |
| encoder.stages.S.blocks.B.conv1.conv, .norm | encoder.stages.S.B.conv1.conv, .adn.N |
| encoder.stages.S.blocks.B.conv2.conv, .norm | encoder.stages.S.B.conv2.conv, .adn.N |
| encoder.stages.S.blocks.B.skip.I.conv, .norm | encoder.stages.S.B.skip.I.conv, .adn.N |
| ....all_modules.0, ....all_modules.K | ....conv, ....norm of the same place, which they replace |
| decoder.encoder... | second names of the same weights, left out |
| decoder... | left out: it reconstructs images |

`conv` and `all_modules.0` are two names of one layer in that package. nnssl's SparK trainers copy each layer under each
of its names and run the copies under `all_modules`; those under `conv` and `norm` keep their random first values. So
`all_modules` counts where both are there; nnU-Net takes the same ones, since they come last in the file.

Beside them lie `nnssl_adaptation_plan` (network, channels and patch of the pretraining), or, from its SparK trainers,
`spark_weights` (the same weights with mask tokens, left out), and `init_args` with `pretrain_json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from volumen.checkpoints.nnunet import SECOND_NAMES, WEIGHTS_KEY, from_nnunet, is_nnunet_state
from volumen.checkpoints.weights import LoadReport, load_partial, plain_name
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import PRETRAINED

VOLUMEN, NNSSL = "volumen", "nnssl"
# Settings that decide which weights an encoder has, and what they compute.
SETTINGS = (
    "spatial_dims", "in_channels", "features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage", "norm_op",
    "norm_op_kwargs", "nonlin", "nonlin_kwargs", "conv_bias", "do_stem", "stem_channels", "squeeze_excitation",
    "squeeze_excitation_reduction_ratio", "pool_type",
)  # fmt: skip
# Of these the settings of a training are null unless the user gives a value; then they follow the encoder.
FOLLOWING = ("features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage")
_RAN = re.compile(r"(.+)\.all_modules\.(\d+)\.(.+)")
_WORDS = {"in_channels": "channels of the images", "spatial_dims": "dimensions of the images"}
# The strides of nnssl's only convolutional network, "ResEncL", which its plan names without arguments.
_PRESET = {"ResEncL": [[1, 1, 1], *[[2, 2, 2]] * 5]}


def pretraining_of(content: Any) -> str | None:
    """Return which program pretrained the encoder of a checkpoint: "volumen", "nnssl", or None if it is no such one."""
    if not isinstance(content, Mapping):
        return None
    config = content.get("model_config")
    if isinstance(config, Mapping) and PRETRAINED in config:
        return VOLUMEN
    arguments = content.get("init_args")
    ssl = isinstance(arguments, Mapping) and "pretrain_json" in arguments
    marks = ssl or "nnssl_adaptation_plan" in content or "spark_weights" in content
    return NNSSL if marks and WEIGHTS_KEY in content else None


def encoder_settings(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a pretrained encoder in the words of `MultiHeadDynUNet`, as far as the file tells.

    Raises:
        VolumenError: a checkpoint of nnssl of another network.
    """
    if pretraining_of(content) == VOLUMEN:
        return {key: content["model_config"][key] for key in SETTINGS if key in content["model_config"]}
    return _nnssl_settings(content, path)


def load_encoder(network: torch.nn.Module, content: Mapping[str, Any], path: Path) -> LoadReport:
    """Copy a pretrained encoder into a network; all of it or nothing.

    Args:
        network: a `MultiHeadDynUNet`, changed in place.
        content: the checkpoint.
        path: the file, for errors.

    Returns:
        What was loaded: every weight of the encoder. What is only in the file: its decoder.

    Raises:
        VolumenError: the encoder has other settings or weights; names the first.
    """
    check_encoder(getattr(network, "final_config", {}), encoder_settings(content, path), path)
    if pretraining_of(content) == VOLUMEN:
        weights: Mapping[str, torch.Tensor] = content["model"]
    else:
        weights = from_nnunet(trained_weights(content[WEIGHTS_KEY]), decoder=None)
    given = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    own = {name: value for name, value in network.state_dict().items() if name.startswith("encoder.")}
    for name in [*own, *(name for name in given if name not in own)]:
        expected, found = (tuple(part[name].shape) if name in part else "none" for part in (own, given))
        if expected != found:
            raise VolumenError(
                path, f"the pretrained encoder does not fit: weight {name}", expected=expected, found=found,
                remedy="leave model_config as it was in the pretraining",
            )  # fmt: skip
    report = load_partial(network, given)
    rest = tuple(name for name in _all_weights(content) if not name.startswith("encoder."))
    return LoadReport(report.loaded, report.missing, rest, report.mismatched, is_encoder=True)


def trained_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return nnssl's weights with the values of the layers that its network ran, under one name each.

    Args:
        weights: `network_weights`; a layer is `X.conv` or `X.norm`, `X.all_modules.0` or `X.all_modules.K`, or both.
    """
    named = {plain_name(name): tensor for name, tensor in weights.items()}
    ran = {}
    for name, tensor in named.items():
        layer = _RAN.fullmatch(name)
        if layer is not None:
            ran[f"{layer[1]}.{'conv' if layer[2] == '0' else 'norm'}.{layer[3]}"] = tensor
    return {**named, **ran}


def check_encoder(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    """Compare a network's settings with those of a pretrained encoder.

    Raises:
        VolumenError: one differs; names it.
    """
    for key, value in theirs.items():
        if key in mine and mine[key] != value:
            raise VolumenError(
                path, f"the pretrained encoder is another one: {_WORDS.get(key, f'model_config.{key}')}",
                expected=value, found=mine[key], remedy=_remedy(key),
            )  # fmt: skip


def _remedy(key: str) -> str:
    if key in _WORDS:
        return "pretrain on images of this kind"
    if key in FOLLOWING:
        return "leave the setting out, so that it follows the encoder"
    return "use the setting of the pretraining"


def _all_weights(content: Mapping[str, Any]) -> list[str]:
    if pretraining_of(content) == VOLUMEN:
        return list(content["model"])
    own = [name for name in map(plain_name, content[WEIGHTS_KEY]) if not SECOND_NAMES.search(name)]
    same = ("architecture.", "encoder.", "decoder.")
    spark = (name for name in map(plain_name, content.get("spark_weights", ())) if not name.startswith(same))
    return [*own, *spark]


def _nnssl_settings(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read a network's settings from nnssl's plan and the shapes of its weights."""
    raw = content[WEIGHTS_KEY]
    if not is_nnunet_state(raw):
        raise VolumenError(
            path, expected="nnssl's residual encoder (names such as encoder.stages.0.blocks.0.conv1)",
            found=f"names such as {', '.join(list(raw)[:2])}",
            remedy="only its convolutional networks (ResEncL) can be taken",
        )  # fmt: skip
    weights = from_nnunet(trained_weights(raw), decoder=None)
    plan = (content.get("nnssl_adaptation_plan") or {}).get("architecture_plans") or {}
    arguments = plan.get("arch_kwargs") or {}
    name = re.compile(r"encoder\.stages\.(\d+)\.(\d+)\.conv1\.conv\.weight")
    blocks = {
        tuple(map(int, match.groups())): weights[key] for key in weights if (match := name.fullmatch(key))
    }
    stages = 1 + max(stage for stage, _ in blocks)
    first = [blocks[stage, 0] for stage in range(stages)]
    stem = weights.get("encoder.stem.0.conv.weight")
    entry = first[0] if stem is None else stem
    found = {
        "spatial_dims": entry.ndim - 2,
        "in_channels": int(entry.shape[1]),
        "features_per_stage": [int(weight.shape[0]) for weight in first],
        "kernel_sizes": [list(weight.shape[2:]) for weight in first],
        "n_blocks_per_stage": [sum(one == stage for one, _ in blocks) for stage in range(stages)],
        "norm_op": "instance",
        "nonlin": "LeakyReLU",
        "do_stem": stem is not None,
        "conv_bias": "encoder.stages.0.0.conv1.conv.bias" in weights,
        "pool_type": "conv",
    }  # fmt: skip
    strides = arguments.get("strides") or _PRESET.get(plan.get("arch_class_name", "ResEncL"))
    if strides is not None and len(strides) == stages:
        found["strides"] = [
            [step] * (entry.ndim - 2) if isinstance(step, int) else [int(s) for s in step] for step in strides
        ]
    return found
