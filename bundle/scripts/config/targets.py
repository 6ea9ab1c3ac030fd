"""The targets of a network: labelled ones and those derived from them (`auxiliary_tasks`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from volumen.config.parts.targets import AuxiliaryTaskConfig, LossSpec, TargetConfig
from volumen.config.validation import check_section
from volumen.data.labels.label_channels import region_representatives
from volumen.derived.registry import (
    DERIVATION_KEYS,
    task_kind,
    task_layout,
    task_out_channels,
    validate_task,
)
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A head of the network with its losses and the source of its truth.

    Attributes:
        name: the key of the target in batches and outputs.
        kind: how losses interpret it: binary, multiclass, multilabel; distance, vector, axis, tensor, field.
        out_channels: channels of the head.
        activation: sigmoid, softmax or none; applied to outputs, never before a loss.
        losses: the losses of this head.
        weight: weight of the head in the total loss.
        ignore_label: label value that means unknown, or None.
        ds_interpolation: nearest or linear.
        separate_decoder: whether the head has a separate decoder.
        classes: names of the classes, for reports.
        task_type: type of a derived target, or None for a labelled target.
        source_target: the labelled target from which it is derived, or None.
        task_params: parameters of the derivation.
        instances: what the head learns from labels that number instances, or None if the labels are no instances.
        invert: whether 0 in the labels is the foreground.
        regions: label values of each channel by its name, of a target whose channels are regions of a label map.
        region_values: the value of each region in a predicted label map.
        head: whether the network predicts it; a derived target without a head serves losses of its source.
        class_weights: weight of each class in the losses that take one, "auto" or None.
        fuse: "none", "auto" or the heads that the label is read from besides its own.
    """

    name: str
    kind: str
    out_channels: int
    activation: str
    losses: tuple[LossSpec, ...]
    weight: float = 1.0
    ignore_label: int | None = None
    ds_interpolation: str = "nearest"
    separate_decoder: bool = True
    classes: tuple[str, ...] | None = None
    task_type: str | None = None
    source_target: str | None = None
    task_params: dict[str, Any] = field(default_factory=dict)
    instances: str | None = None
    invert: bool = False
    regions: dict[str, list[int]] | None = None
    region_values: tuple[int, ...] | None = None
    class_weights: str | tuple[float, ...] | None = None
    fuse: str | tuple[str, ...] = "none"
    head: bool = True

    @property
    def auxiliary_task(self) -> bool:
        """Whether the target is derived from a labelled one."""
        return self.task_type is not None

    def loss_section(self) -> dict[str, Any]:
        """Return this head's losses as the plain dictionary that `MultiTaskLoss` expects."""
        return {
            "kind": self.kind,
            "out_channels": self.out_channels,
            "activation": self.activation,
            "losses": [asdict(loss) for loss in self.losses],
            "weight": self.weight,
            "ds_interpolation": self.ds_interpolation,
            "source_target": self.source_target,
            "classes": list(self.classes) if self.classes else None,
        }

    def snapshot(self) -> dict[str, Any]:
        """Return this target's entry in a configuration, as a plain dictionary."""
        head = {
            "out_channels": self.out_channels,
            "losses": [asdict(loss) for loss in self.losses],
            "ds_interpolation": self.ds_interpolation,
            "separate_decoder": self.separate_decoder,
        }
        if self.auxiliary_task:
            return {
                "type": self.task_type,
                "source_target": self.source_target,
                "loss_weight": self.weight,
                "head": self.head,
                **head,
                **self.task_params,
            }
        return {
            **head,
            "activation": self.activation,
            "weight": self.weight,
            "class_weights": list(self.class_weights)
            if isinstance(self.class_weights, tuple)
            else self.class_weights,
            "ignore_label": self.ignore_label,
            "kind": self.kind,
            "instances": self.instances,
            "invert": self.invert,
            "fuse": self.fuse if isinstance(self.fuse, str) else list(self.fuse),
            "classes": list(self.classes) if self.classes else None,
            "regions": self.regions,
            "region_values": list(self.region_values) if self.region_values else None,
        }


def default_losses(kind: str, activation: str | None = None) -> tuple[LossSpec, ...]:
    """Return the losses of a labelled target that lists none: cross-entropy and Dice, or the loss of distances."""
    if kind == "distance":
        return (LossSpec(name="SignedDistanceLoss"),)
    exclusive = kind == "multiclass" and activation != "sigmoid"
    entropy = "CrossEntropyLoss" if exclusive else "BCEWithLogitsLoss"
    return LossSpec(name=entropy), LossSpec(name="SoftDiceLoss")


def read_target(name: str, values: Mapping[str, Any], origin: str) -> TargetConfig:
    """Check a target's entry and resolve its aliases.

    Args:
        name: name of the target.
        values: its entry in the configuration.
        origin: the file the entry comes from, for errors.

    Returns:
        The entry, in which `out_channels` and `ignore_label` have the values of their aliases.

    Raises:
        VolumenError: an unknown key, a wrong value, or aliases that contradict each other.
    """
    where = f"{origin}: targets.{name}"
    config: TargetConfig = check_section(TargetConfig, values or {}, where)
    ignore = _resolve_aliases(where, config, "ignore_label", "ignore_index", "ignore_value")
    channels = _resolve_aliases(where, config, "out_channels", "channels")
    return replace(
        config,
        **_settled_regions(where, config, ignore),
        ignore_label=ignore,
        ignore_index=None,
        ignore_value=None,
        out_channels=channels,
        channels=None,
    )


def _settled_regions(where: str, config: TargetConfig, ignore: int | None) -> dict[str, Any]:
    """Return the keys that regions decide; none without regions.

    Raises:
        VolumenError: regions beside what contradicts them, of the ignored value, or values for another number of them.
    """
    regions = config.regions
    if not regions:
        if config.regions is not None or config.region_values is not None:
            raise VolumenError(
                f"{where}.regions", expected="names and label values, such as {whole: [1, 2], core: [2]}", found="none"
            )  # fmt: skip
        return {}
    for key in ("instances", "activation", "invert"):
        if getattr(config, key) and getattr(config, key) != "sigmoid":
            raise VolumenError(f"{where}.{key}", "contradicts regions", remedy="leave one of the two out")
    if config.kind not in (None, "multilabel"):
        raise VolumenError(
            f"{where}.kind",
            expected="multilabel, as regions overlap",
            found=config.kind,
            remedy="leave it out",
        )
    if any(ignore in values for values in regions.values()):
        raise VolumenError(f"{where}.regions", f"hold {ignore}, which is ignore_label", remedy="take it out")
    values = list(regions.values())
    given = config.region_values
    if given is not None and (len(given) != len(values) or len(set(given)) != len(given)):
        raise VolumenError(
            f"{where}.region_values", expected=f"{len(values)} different values, one per region", found=given
        )
    shown = given or region_representatives(values)
    if len(set(shown)) != len(shown) or max(shown) > 255:
        raise VolumenError(
            f"{where}.regions",
            f"a predicted label map would have the values {', '.join(map(str, shown))}",
            remedy="put inner regions behind outer ones, or set region_values to different values up to 255",
        )
    return {
        "kind": "multilabel",
        "activation": "sigmoid",
        "classes": config.classes or list(regions),
        "region_values": shown,
    }


def make_target(
    config: TargetConfig,
    name: str,
    *,
    kind: str,
    out_channels: int,
    separate: bool,
    losses: Sequence[LossSpec] = (),
    instances: str | None = None,
) -> Target:
    """Return a labelled target from its checked entry and what was detected from the data.

    Args:
        config: the checked entry.
        name: name of the target.
        kind: binary, multiclass, multilabel or, for instances, distance.
        out_channels: channels of the head.
        separate: `model_config.separate_decoders`.
        losses: losses for an entry that lists none and is no distance; empty: cross-entropy and Dice.
        instances: what the head learns from labels that number instances, or None.
    """
    activation = config.activation or {"multiclass": "softmax", "distance": "none"}.get(kind, "sigmoid")
    shared = () if kind == "distance" else tuple(losses)
    return Target(
        name=name,
        kind=kind,
        out_channels=out_channels,
        activation=activation,
        losses=tuple(config.losses) or shared or default_losses(kind, activation),
        weight=config.weight,
        ignore_label=config.ignore_label,
        ds_interpolation=config.ds_interpolation or ("linear" if kind == "distance" else "nearest"),
        separate_decoder=separate if config.separate_decoder is None else config.separate_decoder,
        classes=tuple(config.classes) if config.classes else None,
        instances=instances,
        invert=config.invert,
        regions=config.regions,
        region_values=tuple(config.region_values) if config.region_values else None,
        class_weights=tuple(config.class_weights)
        if isinstance(config.class_weights, list)
        else config.class_weights,
        fuse=config.fuse if isinstance(config.fuse, str) else tuple(config.fuse),
    )


def inject_auxiliary_tasks(
    targets: Mapping[str, Target],
    tasks: Mapping[str, Mapping[str, Any]],
    *,
    spatial_dims: int,
    separate: bool,
    origin: str,
) -> dict[str, Target]:
    """Append the derived targets to the labelled ones.

    Args:
        targets: the labelled targets.
        tasks: the `auxiliary_tasks` section.
        spatial_dims: 2 or 3; decides the channels of vectors and tensors.
        separate: `model_config.separate_decoders`.
        origin: the file the section comes from, for errors.

    Returns:
        Labelled targets, then derived ones, in the given order.

    Raises:
        VolumenError: an unknown type, source or key, a name that a label uses, a head without a loss, or channels
            that the task cannot have.
    """
    everything = dict(targets)
    for name, entry in tasks.items():
        if name in everything:
            raise VolumenError(
                f"{origin}: auxiliary_tasks.{name}",
                "the name is a labelled target's",
                remedy="choose another name",
            )
        everything[name] = _derived_target(name, entry, targets, spatial_dims, separate, origin)
    return everything


def check_fields(targets: Mapping[str, Target], origin: str) -> None:
    """Check that every `field` of a loss is derived from the loss's target, and that what has no head is read.

    Raises:
        VolumenError: names the key.
    """
    read = set()
    for name, target in targets.items():
        derived = [other for other, entry in targets.items() if entry.source_target == name]
        for number, loss in enumerate(target.losses):
            if loss.field is None:
                continue
            if loss.field not in derived or targets[loss.field].out_channels != 1:
                raise VolumenError(
                    f"{origin}: targets.{name}.losses[{number}].field",
                    expected=f"a target of one channel derived from {name}: {', '.join(derived) or 'none'}",
                    found=loss.field,
                    remedy=closest(loss.field, derived) or "add it to auxiliary_tasks, with head: false",
                )
            read.add(loss.field)
    for name, target in targets.items():
        if not target.head and name not in read:
            raise VolumenError(
                f"{origin}: auxiliary_tasks.{name}",
                expected="with head: false a loss of its source that reads it",
                found="none",
                remedy=f"give a loss of {target.source_target} the key field: {name}, or remove the task",
            )


def _derived_target(
    name: str,
    entry: Mapping[str, Any],
    targets: Mapping[str, Target],
    spatial_dims: int,
    separate: bool,
    origin: str,
) -> Target:
    where = f"{origin}: auxiliary_tasks.{name}"
    if not isinstance(entry, Mapping):
        raise VolumenError(where, expected="a mapping with type and source_target", found=repr(entry))
    if "type" not in entry:
        raise VolumenError(where, "no type", remedy="add type: distance_transform, surface_normals, ...")
    source = entry.get("source_target")
    if not isinstance(source, str) or source not in targets:
        raise VolumenError(
            f"{where}.source_target",
            expected=f"one of {', '.join(targets) or 'no target at all'}",
            found=repr(source),
            remedy=closest(str(source), targets) or "name a labelled target",
        )
    head, params = _read_task(name, entry, where)
    type_name = head.type
    of_channels = {"out_channels": head.out_channels, **params}
    channels = task_out_channels(type_name, spatial_dims, of_channels)
    if head.out_channels not in (None, channels):
        raise VolumenError(
            f"{where}.out_channels",
            expected=f"{channels} for {type_name} in {spatial_dims}D",
            found=head.out_channels,
            remedy="leave it out",
        )
    # Refuses a layout that does not fit the channels, before training.
    task_layout(type_name, spatial_dims, of_channels)
    return Target(
        name=name,
        kind=task_kind(type_name),
        out_channels=channels,
        activation="none",
        losses=tuple(head.losses),
        weight=1.0 if head.loss_weight is None else head.loss_weight,
        ds_interpolation=head.ds_interpolation or "linear",
        separate_decoder=separate if head.separate_decoder is None else head.separate_decoder,
        head=head.head,
        task_type=type_name,
        source_target=source,
        task_params=params,
    )


def _read_task(name: str, entry: Mapping[str, Any], where: str) -> tuple[AuxiliaryTaskConfig, dict[str, Any]]:
    """Check an entry of `auxiliary_tasks`.

    Returns:
        The keys that every task has, in which `loss_weight` and `out_channels` have the values of their aliases; and
        the parameters of the derivation as the user gave them: those of its type, and `DERIVATION_KEYS`.
    """
    common = [item.name for item in fields(AuxiliaryTaskConfig)]
    params = {key: value for key, value in entry.items() if key not in common or key in DERIVATION_KEYS}
    channels = entry.get("out_channels", entry.get("channels"))
    validate_task(name, {"type": entry["type"], "out_channels": channels, **params})
    losses = entry.get("losses") or []
    if entry.get("head") is False and losses:
        raise VolumenError(
            f"{where}.losses",
            expected="none, as head: false leaves nothing to train",
            found=f"{len(losses)}",
            remedy="give the losses to the source, with field: this task, or remove head: false",
        )
    if not losses and entry.get("head") is not False:
        raise VolumenError(
            f"{where}.losses",
            "the head has no loss and would train on nothing",
            remedy="list at least one loss, or remove the task",
        )
    if not isinstance(losses, Sequence) or isinstance(losses, str):
        raise VolumenError(f"{where}.losses", expected="a list of {name, weight, kwargs}", found=repr(losses))
    values = {key: value for key, value in entry.items() if key in common}
    head: AuxiliaryTaskConfig = check_section(AuxiliaryTaskConfig, values, where)
    resolved = replace(
        head,
        loss_weight=_resolve_aliases(where, head, "loss_weight", "weight"),
        weight=None,
        out_channels=_resolve_aliases(where, head, "out_channels", "channels"),
        channels=None,
    )
    return resolved, params


def _resolve_aliases(where: str, config: TargetConfig | AuxiliaryTaskConfig, *names: str) -> Any:
    """Return the value of a key that has several names, or None if none of them is set."""
    values = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if len(set(values.values())) > 1:
        raise VolumenError(
            where, f"{' and '.join(values)} contradict each other", remedy=f"keep {names[0]} alone"
        )
    return next(iter(values.values()), None)
