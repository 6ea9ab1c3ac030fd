"""Computes the loss of the training: the sum over targets, their losses and the levels of deep supervision."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volumen.derived.informed import INFORMED
from volumen.losses.balancing import AlignedBalancing, GradNormBalancing, build_balancing
from volumen.losses.base import KINDS, LABEL_KINDS, encode_target
from volumen.losses.deep_supervision import INTERPOLATIONS, default_interpolation, downsample, level_weights
from volumen.losses.informed import Knowledge
from volumen.losses.masking import as_real, full_mask, guard, present_samples, zero_of
from volumen.losses.registry import accepted_extras, build_loss
from volumen.losses.trial import failure, try_loss
from volumen.utils.compilation import compile_arguments
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import confidence_key, counted_voxels, free_key, mask_key, upper_key

logger = logging.getLogger(__name__)

LOSS_KEYS = ("name", "weight", "kwargs", "start_epoch", "skip_deep_supervision", "field")
# Other programs' names for the two interpolations.
INTERPOLATION_ALIASES = {"bilinear": "linear", "trilinear": "linear", "area": "linear"}


@dataclass
class _Entry:
    """One entry of a target's `losses`."""

    label: str
    weight: float
    start_epoch: int
    skip_deep_supervision: bool
    extras: frozenset[str]
    where: str
    field: str | None = None


class _Pyramid:
    """A target and its mask at the requested sizes, each computed once per step."""

    def __init__(
        self,
        target: Tensor,
        mask: Tensor | None,
        kind: str,
        interpolation: str,
        knowledge: Knowledge | None = None,
    ) -> None:
        self._source = (target, mask)
        self._kind, self._interpolation = kind, interpolation
        self._knowledge = knowledge
        self._levels: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._known: dict[tuple[int, ...], Knowledge] = {}

    def at(self, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if size not in self._levels:
            self._levels[size] = downsample(
                *self._source, size, kind=self._kind, interpolation=self._interpolation
            )
        return self._levels[size]

    @property
    def informed(self) -> bool:
        """Whether more is known than exact values."""
        return self._knowledge is not None

    def for_loss(self, pred: Tensor, certain: bool) -> tuple[Tensor, dict[str, Any]]:
        """Return the target for a loss that takes a confidence, and its mask, confidence and `certain` if required."""
        size = tuple(pred.shape[2:])
        if size not in self._known:
            assert self._knowledge is not None
            self._known[size] = self._knowledge.at(size, self._kind, self._interpolation)
        known = self._known[size]
        extras: dict[str, Any] = {"mask": known.confidence > 0, "confidence": known.confidence}
        if certain:
            extras["certain"] = self.at(size)[1]
        return known.nearest(pred, self._kind), extras


class MultiTaskLoss(nn.Module):
    """total = sum over targets of weight_t * sum over its losses of weight_l * loss_l.

    Under deep supervision a loss is the sum over levels of its value against the target downsampled to the
    output's own size, with weights 1, 1/2, 1/4, ... normalised to sum 1; an entry with `skip_deep_supervision`
    uses only the full resolution, with weight 1.

    Args:
        targets: name -> {"kind", "losses": [{name, weight=1, kwargs={}, start_epoch=0,
            skip_deep_supervision=False, field=None}], "weight"=1, "ds_interpolation"=nearest for labels, linear else,
            "source_target"=None, "activation"=None, "validity"=None}; other keys are ignored. With activation
            "sigmoid", exclusive classes (kind "multiclass") are trained as one binary decision per class, including the
            background. An entry is active from epoch `start_epoch` on; epochs are counted from 0.
        balancing: "fixed", "aligned", "uncertainty" or "gradnorm", see `volumen.losses.balancing`.
        spacing: voxel size in spatial order, for losses that measure distances. If it is set, every loss of a target
            with "out_channels" is tested on a tiny batch at once.
        balancing_kwargs: arguments of the balancing.
        shared_parameters: see `set_shared_parameters`; "gradnorm" needs them.
        network: the network without wrappers; "aligned" needs it, and limits the gradients of targets with a source.
        device: the device of the outputs; without it the first step moves the parameters to the right device.
        compile: compile every loss with `torch.compile`; also a name of `COMPILE_MODES`, of which CUDA graphs do not
            apply to losses.
        compile_kwargs: more of its arguments.

    Attributes:
        components: detached scalars of the last step: per target the weighted sum of its losses ("membrane"),
            per loss its value ("membrane/SoftDiceLoss"), and the balancing's factor if it has one
            ("membrane/weight"), or the cosine of the gradients before this step ("distance/cosine").
        present: whether a target has a valid voxel in the last step, for targets with a mask: bool tensors. The
            components of a target without a valid voxel are 0 and have no meaning.

    Raises:
        VolumenError: a target without losses, an unknown loss, key, kind or interpolation, or a source that
            is not a target.
    """

    def __init__(
        self,
        targets: Mapping[str, Mapping[str, Any]],
        *,
        balancing: str = "fixed",
        spacing: Sequence[float] | None = None,
        balancing_kwargs: Mapping[str, Any] | None = None,
        shared_parameters: Iterable[nn.Parameter] | None = None,
        network: nn.Module | None = None,
        device: torch.device | str | None = None,
        compile: bool | str = False,
        compile_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not targets:
            raise VolumenError("dataset_config.targets", expected="at least one target", found="none")
        self.epoch = 0
        self.components: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}
        self.target_weights: dict[str, float] = {}
        self._entries: dict[str, list[_Entry]] = {}
        self._how: dict[str, tuple[str, str]] = {}
        self._source: dict[str, str | None] = {}
        self._channels: dict[str, int | None] = {}
        #: Targets whose class indices are converted to one map per class.
        self._encoded: dict[str, bool] = {}
        self._modules_of: dict[str, list[nn.Module]] = {}
        self.losses = nn.ModuleList()
        for name, target in targets.items():
            self._add(name, target, targets, None if spacing is None else tuple(spacing))
        if compile:
            arguments = compile_arguments(True, **(compile_kwargs or {}))
            for module in self.losses:
                module.compile(**arguments)
        self.balancing = self._balancing(balancing, dict(balancing_kwargs or {}))
        if shared_parameters is not None:
            self.set_shared_parameters(shared_parameters)
        if network is not None and isinstance(self.balancing, AlignedBalancing):
            self.balancing.set_network(network, [name for name, source in self._source.items() if source])
        if device is not None:
            self.to(device)

    def _add(
        self, name: str, target: Mapping[str, Any], targets: Mapping[str, Mapping], spacing: Any
    ) -> None:
        where = f"targets.{name}"
        kind = target.get("kind")
        if kind not in KINDS:
            raise VolumenError(f"{where}.kind", expected=f"one of {', '.join(sorted(KINDS))}", found=kind)
        source = target.get("source_target")
        if source is not None and source not in targets:
            raise VolumenError(
                f"{where}.source_target", expected=f"one of {', '.join(targets)}", found=source
            )
        kind = trained_kind(target)
        losses = target.get("losses") or []
        if not losses:
            raise VolumenError(
                f"{where}.losses",
                expected="at least one loss",
                found="none",
                remedy="give it a loss or remove the target: a head without one would never be trained",
            )
        self._source[name] = source
        self._channels[name] = target.get("out_channels")
        self._encoded[name] = kind != target["kind"]
        self._how[name] = (kind, _interpolation(target.get("ds_interpolation"), kind, where))
        self.target_weights[name] = _number(target.get("weight", 1.0), f"{where}.weight")
        self._entries[name], built = [], []
        for i, entry in enumerate(losses):
            loss, parsed = _entry(
                entry, f"{where}.losses[{i}]", kind, source, targets, spacing, self._channels[name]
            )
            if target.get("validity") == INFORMED and "confidence" not in parsed.extras:
                logger.info(
                    "%s.losses[%d]: %s takes no confidence, so of %s it counts only voxels whose value is exact",
                    where,
                    i,
                    parsed.label,
                    name,
                )
            parsed.label = component_labels(losses[: i + 1])[-1]
            self._entries[name].append(parsed)
            built.append(loss)
            self.losses.append(loss)
        # A plain dict of lists, because the modules are already registered in self.losses.
        self._modules_of[name] = built

    def _balancing(self, balancing: str, kwargs: dict[str, Any]) -> nn.Module:
        kinds = {name: kind for name, (kind, _) in self._how.items()}
        return build_balancing(balancing, kinds, self.target_weights, kwargs)

    def set_shared_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the parameters on which a balancing compares gradients ("gradnorm"); other balancings ignore them."""
        if isinstance(self.balancing, GradNormBalancing):
            self.balancing.set_shared_parameters(list(parameters))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, to which `start_epoch` refers."""
        self.epoch = int(epoch)

    def forward(self, outputs: Mapping[str, Tensor | Sequence[Tensor]], batch: Mapping[str, Any]) -> Tensor:
        """Return the total, a float32 scalar on the graph of every output.

        Args:
            outputs: target -> logits (B, C, *spatial), or a list of them, full resolution first.
            batch: target -> (B, Ct, *spatial), and target + "_mask" -> (B, 1, *spatial) bool (without it, all
                voxels are valid). A target with informed validity also has "_confidence", and "_upper" or "_free", see
                `Knowledge`; they serve the losses that take a confidence.

        Raises:
            VolumenError: an output or a batch entry of a target is missing, or labels are not among its classes.
        """
        self._move_to_device_of(outputs)
        self.components = {}
        self.present = present = {}
        values: dict[str, Tensor] = {}
        pyramids = {name: self._pyramid(name, batch) for name in self._entries}
        levels = {name: _levels(outputs, name) for name in self._entries}
        for name in self._entries:
            values[name] = self._target_loss(name, levels, pyramids, batch)
            self.components[name] = values[name].detach()
            counts = counted_voxels(batch, name)
            if counts is not None:
                present[name] = present_samples(counts).any()
        total, factors = self.balancing(values, present)
        for name, factor in factors.items():
            self.components[f"{name}/weight"] = factor.detach()
        if isinstance(self.balancing, AlignedBalancing) and torch.is_grad_enabled():
            self.components.update({f"{name}/cosine": c for name, c in self.balancing.logged().items()})
        return total

    def _move_to_device_of(self, outputs: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Move class weights and balancing to the device of the outputs."""
        first = next(iter(outputs.values()), None)
        if first is None:
            return
        device = (first if isinstance(first, Tensor) else first[0]).device
        if any(x.device != device for x in chain(self.parameters(), self.buffers())):
            self.to(device)

    def _pyramid(self, name: str, batch: Mapping[str, Any]) -> _Pyramid:
        if name not in batch:
            raise VolumenError(
                f"batch[{name!r}]", "the batch holds no such target", found=", ".join(map(str, batch))
            )
        target, mask = batch[name], batch.get(mask_key(name))
        channels, encoded = self._channels[name], self._encoded[name]
        _check_labels(name, target, mask, "multiclass" if encoded else self._how[name][0], channels)
        if encoded:
            assert channels is not None
            target = encode_target(target, "multiclass", channels, torch.uint8)
        confidence = batch.get(confidence_key(name))
        knowledge = None
        if confidence is not None:
            knowledge = Knowledge(target, confidence, batch.get(upper_key(name)), batch.get(free_key(name)))
        return _Pyramid(target, mask, *self._how[name], knowledge)

    def _target_loss(
        self,
        name: str,
        levels: Mapping[str, list[Tensor]],
        pyramids: Mapping[str, _Pyramid],
        batch: Mapping[str, Any],
    ) -> Tensor:
        # Without an active loss a head must still belong to the graph, or DDP would wait for its gradients.
        total = zero_of(levels[name][0])
        for entry, loss in zip(self._entries[name], self._modules_of[name], strict=True):
            if self.epoch < entry.start_epoch:
                continue
            finest_alone = entry.skip_deep_supervision or entry.field is not None
            used = levels[name][:1] if finest_alone else levels[name]
            value = zero_of(used[0])
            for weight, pred in zip(level_weights(len(used)), used, strict=True):
                value = value + weight * self._value(name, entry, loss, pred, levels, pyramids, batch)
            self.components[f"{name}/{entry.label}"] = value.detach()
            total = total + entry.weight * value
        return total

    def _value(
        self,
        name: str,
        entry: _Entry,
        loss: nn.Module,
        pred: Tensor,
        levels: Mapping[str, list[Tensor]],
        pyramids: Mapping[str, _Pyramid],
        batch: Mapping[str, Any],
    ) -> Tensor:
        size = tuple(pred.shape[2:])
        extras: dict[str, Any]
        if pyramids[name].informed and "confidence" in entry.extras:
            target, extras = pyramids[name].for_loss(pred, "certain" in entry.extras)
        else:
            target, mask = pyramids[name].at(size)
            extras = {"mask": mask}
        if "scale" in entry.extras:
            extras["scale"] = tuple(f / s for f, s in zip(levels[name][0].shape[2:], size, strict=True))
        if entry.field is not None:
            extras["field"] = _field(entry.field, batch)
        source = self._source[name]
        if source is not None and "source_pred" in entry.extras:
            extras["source_pred"] = _at_size(levels[source], size)
        if source is not None and "source_mask" in entry.extras:
            extras["source_mask"] = pyramids[source].at(size)[1]
        try:
            return loss(pred, target, **extras)
        except (ValueError, TypeError, IndexError, AssertionError, RuntimeError) as error:
            if isinstance(error, VolumenError) or "memory" in str(error).lower():
                raise
            # The test on a tiny batch does not cover the size of a level.
            remedy = (
                "choose another loss, or set skip_deep_supervision: true where a coarse level is too small"
            )
            raise failure(entry.label, pred, error, entry.where, remedy) from error


def trained_kind(target: Mapping[str, Any]) -> str:
    """Return the kind that a target's losses receive: with a sigmoid, exclusive classes count as independent ones."""
    kind = target["kind"]
    independent = (
        kind == "multiclass" and target.get("activation") == "sigmoid" and target.get("out_channels")
    )
    return "multilabel" if independent else kind


def _check_labels(name: str, target: Tensor, mask: Tensor | None, kind: str, channels: int | None) -> None:
    """Raise for class indices without a channel of the head; only on a CPU, as a GPU would have to synchronise."""
    if kind not in LABEL_KINDS or target.device.type != "cpu" or target.numel() == 0:
        return
    if kind == "multiclass" and channels is None:
        return
    highest = channels - 1 if kind == "multiclass" and channels is not None else 1
    labels = target if mask is None else torch.where(mask, target, torch.zeros_like(target))
    low, high = (value.item() for value in labels.aminmax())
    if low < 0 or high > highest:
        raise VolumenError(
            f"labels of {name}",
            expected=f"values 0 to {highest} in voxels that count",
            found=low if low < 0 else high,
            remedy=f"set targets.{name}.out_channels or targets.{name}.ignore_label",
        )


def _entry(
    entry: Mapping[str, Any],
    where: str,
    kind: str,
    source: str | None,
    targets: Mapping[str, Mapping],
    spacing: Any,
    channels: int | None,
) -> tuple[nn.Module, _Entry]:
    if isinstance(entry, str):
        entry = {"name": entry}
    unknown = [key for key in entry if key not in LOSS_KEYS]
    if unknown or "name" not in entry:
        raise VolumenError(
            where, expected=f"the keys {', '.join(LOSS_KEYS)}", found=", ".join(map(str, entry))
        )
    source_kind = trained_kind(targets[source]) if source is not None else None
    loss = build_loss(
        entry["name"],
        entry.get("kwargs"),
        kind=kind,
        where=where,
        source_kind=source_kind,
        spacing=spacing,
        channels=channels,
    )
    parsed = _Entry(
        label=component_labels([entry])[0],
        weight=_number(entry.get("weight", 1.0), f"{where}.weight"),
        start_epoch=int(_number(entry.get("start_epoch") or 0, f"{where}.start_epoch")),
        skip_deep_supervision=bool(entry.get("skip_deep_supervision", False)),
        extras=accepted_extras(loss),
        where=where,
        field=entry.get("field"),
    )
    if parsed.field is not None and "field" not in parsed.extras:
        raise VolumenError(
            f"{where}.field",
            expected="none, as the loss reads no field",
            found=parsed.field,
            remedy="use SkeletonRecallLoss or FieldWeightedLoss, or remove field",
        )
    if spacing is not None and channels is not None:
        try_loss(
            loss,
            entry["name"],
            kind=kind,
            channels=channels,
            ndim=len(spacing),
            where=where,
            extras=parsed.extras,
            source_channels=(targets[source].get("out_channels") if source is not None else None) or 1,
        )
    return loss, parsed


def component_labels(losses: Sequence[Mapping[str, Any] | str]) -> list[str]:
    """Return the names of a target's losses in `components`: without module names; repeated names get "#2"."""
    labels: list[str] = []
    for entry in losses:
        name = str(entry if isinstance(entry, str) else entry["name"]).rpartition(".")[2]
        taken = sum(label.split("#")[0] == name for label in labels)
        labels.append(f"{name}#{taken + 1}" if taken else name)
    return labels


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise VolumenError(where, expected="a number of at least 0", found=repr(value))
    return float(value)


def _interpolation(value: str | None, kind: str, where: str) -> str:
    if value is None:
        return default_interpolation(kind)
    chosen = INTERPOLATION_ALIASES.get(value, value)
    if chosen not in INTERPOLATIONS:
        raise VolumenError(
            f"{where}.ds_interpolation", expected=f"one of {', '.join(INTERPOLATIONS)}", found=value
        )
    if chosen == "linear" and kind == "multiclass":
        raise VolumenError(f"{where}.ds_interpolation", expected="nearest for class indices", found=value)
    return chosen


def _field(name: str, batch: Mapping[str, Any]) -> Tensor:
    """Return a derived field of the batch, (B, 1, *spatial) float32, 0 where it is not valid."""
    if name not in batch:
        raise VolumenError(
            f"batch[{name!r}]", "the batch holds no such field", found=", ".join(map(str, batch))
        )
    return guard(as_real(batch[name]), full_mask(batch.get(mask_key(name)), batch[name]))


def _levels(outputs: Mapping[str, Tensor | Sequence[Tensor]], name: str) -> list[Tensor]:
    if name not in outputs:
        raise VolumenError(f"outputs[{name!r}]", "the network has no such output", found=", ".join(outputs))
    output = outputs[name]
    # Converted to float32 once for all losses.
    return [as_real(level) for level in ([output] if isinstance(output, Tensor) else output)]


def _at_size(levels: list[Tensor], size: tuple[int, ...]) -> Tensor:
    """Return the level of this size, or the full resolution resized if the source has no such level."""
    for level in levels:
        if tuple(level.shape[2:]) == size:
            return level
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(levels[0].float(), size=size, mode=mode, align_corners=False)
