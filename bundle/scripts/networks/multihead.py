"""A network with one residual encoder, and a decoder or a head for every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from volumen.networks.blocks import Decoder, Head, ResidualEncoder
from volumen.networks.fusion import FusionRules, checked_rules, fused_logits
from volumen.networks.gradient_gate import GradientGate
from volumen.networks.operations import Operations, norm_name
from volumen.networks.planning import plan_blocks
from volumen.utils.errors import VolumenError

SHARED = "shared"
POOL_TYPES = ("conv", "avg", "max")


def resolve_out_channels(target: Mapping[str, Any], in_channels: int) -> int:
    """Return the output channels of a target: its `channels` or `out_channels`, or else the input's channels.

    Args:
        target: a target's settings.
        in_channels: channels of the image.

    Returns:
        The number of channels, at least 1.

    Raises:
        ValueError: if the two settings contradict each other, or the number is not a positive integer.
    """
    said = {key: target[key] for key in ("channels", "out_channels") if target.get(key) is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"channels and out_channels contradict each other: {said}")
    channels = next(iter(said.values()), in_channels)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"out_channels must be a positive integer, got {channels!r}")
    return channels


class MultiHeadDynUNet(nn.Module):
    """A U-Net with one residual encoder and several outputs.

    Input (B, in_channels, *spatial), every axis divisible by the product of its strides. Output: a
    dictionary from target to logits (B, out_channels, *spatial). In training with deep supervision each value
    is a list of logits at the decoder's resolutions, full resolution first. Activations belong to
    post-processing.

    The encoder is that of nnU-Net's residual U-Net (Isensee et al. 2024, arXiv:2404.09556): a stem, residual
    blocks, strided convolutions down.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        heads: target to {"out_channels": int, "separate_decoder": bool}; all heads without a separate decoder
            share one decoder.
        features_per_stage: channels of each stage, full resolution first.
        strides: stride at the start of each stage, per axis (or one number); the first is 1.
        kernel_sizes: kernel of each stage, per axis (or one number for all); odd.
        n_blocks_per_stage: residual blocks of each encoder stage; None: 1, 3, 4, 6, 6, ...
        n_conv_per_stage_decoder: convolutions of each decoder stage, lowest resolution first, or one number.
        norm_op: see `Operations`, also for the next six arguments.
        norm_op_kwargs: arguments of the normalisation.
        nonlin: activation.
        nonlin_kwargs: arguments of the activation.
        dropout_op: dropout.
        dropout_op_kwargs: arguments of the dropout.
        conv_bias: whether convolutions have a bias.
        do_stem: whether a convolution precedes the first stage.
        stem_channels: its channels; None: those of the first stage.
        stochastic_depth_p: probability that a sample skips a residual block in training.
        squeeze_excitation: whether residual blocks end in squeeze and excitation.
        squeeze_excitation_reduction_ratio: its hidden width as a fraction of the channels.
        pool_type: downsampling of the encoder: "conv" (strided), "avg" or "max".
        deep_supervision: whether there are heads at every resolution, used in training.
        fusion: target to the rule by which evaluation reads its logit from several heads, see
            `volumen.networks.fusion`; None: each target's own head alone. Training does not use it.

    Raises:
        ValueError: for settings that contradict each other; the message names the setting and its value.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        heads: Mapping[str, Mapping[str, Any]],
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int] | int],
        kernel_sizes: Sequence[Sequence[int] | int] | int = 3,
        n_blocks_per_stage: Sequence[int] | int | None = None,
        n_conv_per_stage_decoder: Sequence[int] | int = 1,
        norm_op: str | None = "instance",
        norm_op_kwargs: Mapping[str, Any] | None = None,
        nonlin: str | None = "LeakyReLU",
        nonlin_kwargs: Mapping[str, Any] | None = None,
        dropout_op: str | float | None = None,
        dropout_op_kwargs: Mapping[str, Any] | None = None,
        conv_bias: bool = True,
        do_stem: bool = True,
        stem_channels: int | None = None,
        stochastic_depth_p: float = 0.0,
        squeeze_excitation: bool = False,
        squeeze_excitation_reduction_ratio: float = 1.0 / 16,
        pool_type: str = "conv",
        deep_supervision: bool = False,
        fusion: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if pool_type not in POOL_TYPES:
            raise ValueError(f"pool_type must be one of {', '.join(POOL_TYPES)}, got {pool_type!r}")
        if not 0 <= stochastic_depth_p < 1:
            raise ValueError(f"stochastic_depth_p must be at least 0 and below 1, got {stochastic_depth_p}")
        features = [int(width) for width in features_per_stage]
        stages = len(features)
        if stages == 0 or min(features) < 1:
            raise ValueError(f"features_per_stage must be positive numbers, got {features_per_stage}")
        steps = _per_stage(strides, stages, spatial_dims, "strides")
        kernels = _per_stage(kernel_sizes, stages, spatial_dims, "kernel_sizes")
        if any(size % 2 == 0 for kernel in kernels for size in kernel):
            raise ValueError(f"kernel_sizes must be odd, got {kernels}")
        if any(step != 1 for step in steps[0]):
            raise ValueError(f"strides must start with 1 on every axis, got {steps[0]}")
        blocks = _counts(n_blocks_per_stage or plan_blocks(stages), stages, "n_blocks_per_stage")
        convolutions = _counts(n_conv_per_stage_decoder, stages - 1, "n_conv_per_stage_decoder")
        self.final_config: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "in_channels": int(in_channels),
            "heads": _checked_heads(heads),
            "features_per_stage": features,
            "strides": steps,
            "kernel_sizes": kernels,
            "n_blocks_per_stage": blocks,
            "n_conv_per_stage_decoder": convolutions,
            "norm_op": norm_op,
            "norm_op_kwargs": dict(norm_op_kwargs or {}),
            "nonlin": nonlin,
            "nonlin_kwargs": dict(nonlin_kwargs or {}),
            "dropout_op": dropout_op,
            "dropout_op_kwargs": dict(dropout_op_kwargs or {}),
            "conv_bias": bool(conv_bias),
            "do_stem": bool(do_stem),
            "stem_channels": stem_channels,
            "stochastic_depth_p": float(stochastic_depth_p),
            "squeeze_excitation": bool(squeeze_excitation),
            "squeeze_excitation_reduction_ratio": float(squeeze_excitation_reduction_ratio),
            "pool_type": pool_type,
            "deep_supervision": bool(deep_supervision),
            "fusion": None,
        }
        self.deep_supervision = bool(deep_supervision)
        self.divisor = tuple(_product(step[axis] for step in steps) for axis in range(spatial_dims))
        operations = Operations(
            norm_op=norm_op,
            norm_op_kwargs=norm_op_kwargs or {},
            nonlin=nonlin,
            nonlin_kwargs=nonlin_kwargs or {},
            dropout_op=dropout_op,
            dropout_op_kwargs=dropout_op_kwargs or {},
            conv_bias=conv_bias,
        )
        self.encoder = ResidualEncoder(
            spatial_dims,
            in_channels,
            features,
            steps,
            kernels,
            blocks,
            operations,
            stem_channels=(stem_channels or features[0]) if do_stem else None,
            pool_type=pool_type,
            stochastic_depth_p=stochastic_depth_p,
            squeeze_excitation_ratio=squeeze_excitation_reduction_ratio if squeeze_excitation else None,
        )
        self._decoder_of = {
            name: key_of(name) if head["separate_decoder"] else SHARED
            for name, head in self.final_config["heads"].items()
        }
        self.decoders = nn.ModuleDict(
            {
                key: Decoder(spatial_dims, features, steps, kernels, convolutions, operations)
                for key in dict.fromkeys(self._decoder_of.values())
            }
        )
        widths = features[: stages - 1] if deep_supervision and stages > 1 else features[:1]
        self.heads = nn.ModuleDict(
            {
                key_of(name): Head(spatial_dims, widths, head["out_channels"])
                for name, head in self.final_config["heads"].items()
            }
        )
        self._gate: GradientGate | None = None
        self.fuse(fusion)
        self.apply(_initialise)

    @classmethod
    def from_config(cls, final_config: Mapping[str, Any]) -> MultiHeadDynUNet:
        """Return a new network with the architecture that `final_config` describes.

        Raises:
            VolumenError: a setting in it is not possible.
        """
        try:
            return cls(**final_config)
        except ValueError as error:
            raise VolumenError("model_config", str(error), remedy="correct the setting") from error

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of the heads."""
        return tuple(self._decoder_of)

    def forward(self, x: Tensor, targets: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the logits of `targets`, or of all targets; only their decoders run, and those that they are read
        from.
        """
        names = self.targets if targets is None else tuple(targets)
        self._check(x, names)
        rules = {} if self.training else {name: r for name, r in self.fusion.items() if name in names}
        if not rules:
            return self._logits(x, names)
        needed = dict.fromkeys((*names, *(head for rule in rules.values() for head in rule["weights"])))
        outputs = self._logits(x, tuple(needed))
        fused = {
            name: fused_logits(outputs, outputs[name], rule["bias"], rule["weights"])
            for name, rule in rules.items()
        }
        return {name: fused.get(name, outputs[name]) for name in names}

    def _logits(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        """Return what the heads give, under deep supervision at all levels."""
        skips = self.encoder(x)
        supervised = self.training and self.deep_supervision
        served: dict[str, list[str]] = {}
        for name in names:
            served.setdefault(self._decoder_of[name], []).append(name)
        outputs: dict[str, Any] = {}
        for (key, heads), inputs in zip(
            served.items(), self._fork(skips, list(served.values()), deciding=-1)
        ):
            decoded = self.decoders[key](inputs)
            for name, features in zip(heads, self._fork(decoded, [[name] for name in heads], deciding=0)):
                head: Any = self.heads[key_of(name)]
                outputs[name] = head.at_all_levels(features) if supervised else head(features)
        return {name: outputs[name] for name in names}

    def fuse(self, rules: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Set the rules by which evaluation reads logits from several heads; None: each target's own head alone.

        Raises:
            ValueError: rules that do not fit the heads.
        """
        self.fusion: FusionRules = checked_rules(rules, self.final_config["heads"])
        self.final_config["fusion"] = self.fusion or None

    def limit_gradients(self, auxiliary: Sequence[str], method: str) -> GradientGate:
        """Limit what the gradients of auxiliary targets change in the parts that they share with other targets.

        Separate decoders meet at the encoder's features, where the gradients of its last stage decide; heads of a
        shared decoder meet at its features, where those of full resolution decide.

        Args:
            auxiliary: names of targets.
            method: see `GradientGate`.

        Returns:
            The gate, which remembers the cosines of the last backward pass.
        """
        self._gate = GradientGate(auxiliary, method)
        return self._gate

    def _fork(self, features: list[Tensor], branches: list[list[str]], deciding: int) -> list[list[Tensor]]:
        """Return the features for each branch; their gradients meet in the gate, if there is one."""
        if self._gate is None or not self.training or len(branches) == 1:
            return [features] * len(branches)
        return self._gate.fork(features, branches, deciding)

    def _check(self, x: Tensor, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._decoder_of:
                raise ValueError(f"target {name!r} has no head; the network has {', '.join(self.targets)}")
        if torch.compiler.is_compiling():
            return
        channels = self.final_config["in_channels"]
        if x.ndim != len(self.divisor) + 2 or x.shape[1] != channels:
            raise ValueError(
                f"input must be (batch, {channels}, {len(self.divisor)} spatial axes), got {tuple(x.shape)}"
            )
        if any(size % divisor for size, divisor in zip(x.shape[2:], self.divisor)):
            raise ValueError(f"input size {tuple(x.shape[2:])} must be divisible by {self.divisor}")
        if tuple(x.shape[2:]) == self.divisor and norm_name(self.final_config["norm_op"]) == "instance":
            raise ValueError(
                f"input size {tuple(x.shape[2:])} must be larger than {self.divisor} along an axis:"
                " nothing can be normalised over the single voxel of the last stage"
            )


class _HeadsView(nn.Module):
    """A view of a `MultiHeadDynUNet` that TorchScript can compile; base of the two classes below."""

    def __init__(self, network: MultiHeadDynUNet, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.decoders = network.decoders
        self.heads = network.heads
        names = network.targets if targets is None else tuple(targets)
        unknown = [name for name in names if name not in network.targets]
        if unknown or not names:
            raise ValueError(f"targets must be of {', '.join(network.targets)}, got {list(names)}")
        self.key_of = {name: key_of(name) for name in names}
        rules = {name: rule for name, rule in network.fusion.items() if name in names}
        # The entries without a name are for TorchScript, which cannot infer the type of an empty dictionary.
        self.fusion_bias = {"": 0.0} | {key_of(name): rule["bias"] for name, rule in rules.items()}
        self.fusion_weights = {"": {"": [0.0]}} | {
            key_of(name): {key_of(head): values for head, values in rule["weights"].items()}
            for name, rule in rules.items()
        }
        needed = dict.fromkeys((*names, *(head for rule in rules.values() for head in rule["weights"])))
        self.decoder_of = {key_of(name): network._decoder_of[name] for name in needed}
        self.used = [key for key in network.decoders if key in self.decoder_of.values()]

    @classmethod
    def from_config(cls, final_config: Mapping[str, Any], targets: Sequence[str] | None = None) -> Self:
        """Return the view of a new network with the architecture that `final_config` describes."""
        return cls(MultiHeadDynUNet.from_config(final_config), targets)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """Return (B, out_channels, *spatial) logits by target."""
        skips: list[Tensor] = self.encoder(x)
        decoded: dict[str, list[Tensor]] = {}
        for key, decoder in self.decoders.items():
            if key in self.used:
                decoded[key] = decoder(skips)
        by_key: dict[str, Tensor] = {}
        for key, head in self.heads.items():
            if key in self.decoder_of:
                by_key[key] = head(decoded[self.decoder_of[key]])
        found: dict[str, Tensor] = {}
        for name, key in self.key_of.items():
            found[name] = by_key[key]
            if key in self.fusion_bias:
                weights = self.fusion_weights[key]
                found[name] = fused_logits(by_key, by_key[key], self.fusion_bias[key], weights)
        return found


class ConcatenatedHeads(_HeadsView):
    """A view of a `MultiHeadDynUNet` that returns one tensor: the targets' logits, concatenated on channels.

    It shares the network's modules under the same names, so either loads the other's state_dict. Its outputs
    contain no dictionary and no list, which MONAI's exports and ONNX require.

    Args:
        network: the network to view.
        targets: the outputs to return, in this order; None: all, in the order of the heads.
    """

    __constants__ = ("joined",)
    joined = True

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, sum of out_channels, *spatial) logits."""
        return torch.cat(list(self.logits(x).values()), dim=1)


class NamedHeads(_HeadsView):
    """A view of a `MultiHeadDynUNet` that returns the logits by target, and that TorchScript can compile.

    Args:
        network: the network to view.
        targets: the outputs to return, in this order; None: all, in the order of the heads.
    """

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return (B, out_channels, *spatial) logits by target."""
        return self.logits(x)


def key_of(name: str) -> str:
    """Return the module name for a target: modules cannot be called "train", "keys" or "a.b"."""
    return "for_" + name.replace(".", "_")


def _checked_heads(heads: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if not heads:
        raise ValueError("heads must name at least one target, got none")
    checked = {}
    for name, head in heads.items():
        unknown = set(head) - {"out_channels", "separate_decoder"}
        if unknown or "out_channels" not in head:
            raise ValueError(f"heads[{name!r}] must have out_channels and separate_decoder, got {dict(head)}")
        checked[str(name)] = {
            "out_channels": resolve_out_channels(head, in_channels=1),
            "separate_decoder": bool(head.get("separate_decoder", True)),
        }
    if len({key_of(name) for name in checked}) < len(checked):
        raise ValueError(f"heads must differ in more than '.' and '_', got {', '.join(checked)}")
    return checked


def _per_stage(values: Any, stages: int, spatial_dims: int, key: str) -> list[list[int]]:
    """Return one list per stage with one number per axis."""
    given = [values] * stages if isinstance(values, int) else list(values)
    if len(given) != stages:
        raise ValueError(f"{key} must have {stages} stages as features_per_stage has, got {given}")
    full = [[int(v)] * spatial_dims if isinstance(v, int) else [int(n) for n in v] for v in given]
    if any(len(value) != spatial_dims or min(value) < 1 for value in full):
        raise ValueError(f"{key} must have {spatial_dims} positive numbers per stage, got {given}")
    return full


def _counts(values: Sequence[int] | int, stages: int, key: str) -> list[int]:
    given = [values] * stages if isinstance(values, int) else [int(value) for value in values]
    if len(given) != stages or any(count < 1 for count in given):
        raise ValueError(f"{key} must have {stages} positive numbers, got {values}")
    return given


def _initialise(module: nn.Module) -> None:
    """Initialise convolutions as He et al. 2015 for a leaky ReLU of slope 0.01, biases with 0."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _product(values: Any) -> int:
    product = 1
    for value in values:
        product *= value
    return product
