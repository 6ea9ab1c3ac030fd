"""Registry of derived targets: their keys, channels, loss kind and the halo that they need.

This module imports no heavy packages, because the configuration uses it before any array exists.

A project adds its own task by a class, which a decorator or an installed entry point registers:

    # my_package/tasks.py
    from volumen.derived.registry import DerivedTask, register_task

    @register_task
    class Thickness(DerivedTask):
        '''Twice the depth within the foreground: a sheet's thickness on its middle surface.'''

        type_name = "thickness"
        kind = "distance"
        turns = ("scalars",)
        defaults = {"reach": None}

        def derive(self, source, params):
            signed, valid = source.signed_distance(params["reach"])
            return 2 * (-signed).clip(min=0)[None], valid[None]

    # pyproject.toml of my_package
    [project.entry-points."volumen.tasks"]
    thickness = "my_package.tasks:Thickness"

The experiment then contains `type: thickness` in `auxiliary_tasks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.derived.channel_layout import PARTS, ChannelLayout, make_layout
from volumen.derived.extents import add_radii, distance_halo, resolve_reach
from volumen.derived.informed import COMPLETED, EXACT, INFORMED, VALIDITIES, Informed
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from volumen.derived.batch_fields import BatchFields
    from volumen.derived.source_fields import SourceFields

ENTRY_POINT_GROUP = "volumen.tasks"
DERIVATION_KEYS = frozenset(
    {"classes", "ignore_index", "ignore_label", "ignore_value", "auxiliary_task", "validity"}
)
"""Keys of a derivation of any type, besides those of its type."""
COMMON_KEYS = DERIVATION_KEYS | {
    "type",
    "source_target",
    "head",
    "losses",
    "loss_weight",
    "weight",
    "out_channels",
    "channels",
    "activation",
    "separate_decoder",
    "optional",
    "ds_interpolation",
}
"""Keys of every derived target besides those of its type: the fields of
`volumen.config.parts.targets.AuxiliaryTaskConfig`, whose values the configuration checks. A derivation ignores
those that concern the head and its losses."""


class DerivedTask:
    """A target that is computed from the labels of another one.

    Attributes:
        type_name: the value of `type:` in `auxiliary_tasks`.
        kind: the kind for losses: "distance", "vector", "axis", "tensor", "multilabel", "binary" or "field".
        turns: how the channels change, in their order, when the image is mirrored or rotated: names among
            `channel_layout.PARTS`, such as ("vector", "scalars"). It follows from the kinds "vector", "axis" and
            "tensor". Without it the target cannot be predicted with test-time augmentation.
        defaults: the keys of the type, with their defaults.
        choices: the allowed values of a key, if they are limited.
    """

    type_name: ClassVar[str] = ""
    kind: ClassVar[str] = "field"
    turns: ClassVar[Sequence[str] | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        """Return the number of channels for a 2D or 3D image."""
        return 1

    def offsets(self, ndim: int, params: Mapping[str, Any]) -> Sequence[Sequence[int]]:
        """Return the voxel offset per axis of each channel that compares two voxels: the part "offsets"."""
        return ()

    def layout(self, ndim: int, params: Mapping[str, Any]) -> ChannelLayout | None:
        """Return how the channels change when the image is rotated, or None if the type does not define it.

        Raises:
            ValueError: `turns` does not match the number of channels.
        """
        channels = self.out_channels(ndim, params)
        if self.turns is not None:
            return make_layout(self.turns, ndim, channels, self.offsets(ndim, params))
        try:
            return make_layout((self.kind,), ndim, channels)
        except ValueError:
            return None

    def check(self, name: str, params: Mapping[str, Any]) -> None:
        """Raise VolumenError if values (not keys) of `params` are wrong."""

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        """Return the number of voxels per axis around a value at which its filters read the source's fields."""
        return (0,) * len(spacing)

    def halo(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        """Return the number of voxels per axis around a value that affect it: the margin and the reach."""
        margin = self.margin(params, spacing)
        return add_radii(margin, distance_halo(params["reach"], spacing)) if "reach" in params else margin

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Compute the target.

        Args:
            source: labels, where they are known, and fields that are computed once for all tasks.
            params: the task's keys, completed with defaults.

        Returns:
            values float32 (C, *source.shape), valid bool (1, *source.shape).
        """
        raise NotImplementedError

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute the target of a batch on the training device; the workers derive the tasks without this method.

        Args:
            source: the same fields as for `derive`, as tensors with a batch axis in front.
            params: the task's keys, completed with defaults.

        Returns:
            values float32 (B, C, *core), valid bool (B, 1, *core): equal to those of `derive`.
        """
        raise NotImplementedError

    def derive_informed(self, source: SourceFields, params: Mapping[str, Any]) -> Informed:
        """Compute the target with all that is known of it where labels are partly unknown.

        A task without this method is always derived with exact validity.

        Args:
            source: fields of the label, as for `derive`.
            params: settings of the task, as for `derive`.

        Returns:
            arrays on *source.shape; where `valid` is True the values are those of `derive`.
        """
        raise NotImplementedError

    def derive_informed_batch(self, source: BatchFields, params: Mapping[str, Any]) -> Informed:
        """Compute `derive_informed` for a batch on the training device: (B, ..., *core)."""
        raise NotImplementedError

    @property
    def on_device(self) -> bool:
        """Whether the task has `derive_batch`, and no subclass overrides only its `derive`."""
        return self._defines("derive_batch", before=("derive",))

    @property
    def informs(self) -> bool:
        """Whether the task has `derive_informed`, and no subclass overrides only its `derive`."""
        return self._defines("derive_informed", before=("derive",))

    @property
    def informs_on_device(self) -> bool:
        """Whether the task has `derive_informed_batch`, and no subclass overrides only another derivation."""
        others = ("derive", "derive_batch", "derive_informed")
        return self.informs and self._defines("derive_informed_batch", before=others)

    def _defines(self, method: str, before: Sequence[str]) -> bool:
        """Whether a class defines a method, and no class below it one of the methods `before` alone."""
        for cls in type(self).__mro__:
            if method in vars(cls):
                return cls is not DerivedTask
            if any(name in vars(cls) for name in before):
                return False
        return False


_TASKS: dict[str, DerivedTask] = {}
_loaded_entry_points = False


def register_task(task: type[DerivedTask]) -> type[DerivedTask]:
    """Class decorator: make `type: <task.type_name>` available to every experiment.

    Raises:
        ValueError: no type name, the name is taken by another class, or `turns` names unknown parts.
    """
    name = task.type_name
    if not name:
        raise ValueError(f"{task.__qualname__} has no type_name")
    if isinstance(task.turns, str) or any(part not in PARTS for part in task.turns or ()):
        raise ValueError(
            f"{task.__qualname__}.turns must be a tuple of names among {PARTS}, got {task.turns!r}"
        )
    known = _TASKS.get(name)
    if known is not None and type(known).__qualname__ != task.__qualname__:
        raise ValueError(f"task type {name!r} is already defined by {type(known).__qualname__}")
    _TASKS[name] = task()
    return task


def get_task(type_name: str, where: str = "auxiliary_tasks") -> DerivedTask:
    """Return the registered task of this type.

    Raises:
        VolumenError: no task of this type is registered.
    """
    _load_entry_points()
    if not isinstance(type_name, str) or type_name not in _TASKS:
        raise VolumenError(
            f"{where}.type",
            expected=f"one of {', '.join(sorted(_TASKS))}",
            found=repr(type_name),
            remedy=closest(str(type_name), _TASKS),
        )
    return _TASKS[type_name]


def task_types() -> tuple[str, ...]:
    """Return the names of all task types, sorted."""
    _load_entry_points()
    return tuple(sorted(_TASKS))


def task_out_channels(type_name: str, ndim: int, params: Mapping[str, Any] | None = None) -> int:
    """Return the number of output channels of a task for a 2D or 3D image."""
    task = get_task(type_name)
    return task.out_channels(ndim, complete_params(task, params or {}))


def task_kind(type_name: str) -> str:
    """Return the kind of target for the losses: "distance", "vector", "axis", "tensor", ..."""
    return get_task(type_name).kind


def task_layout(type_name: str, ndim: int, params: Mapping[str, Any]) -> ChannelLayout | None:
    """Return how the channels of a task change when the image is rotated, or None if its type does not define it.

    Raises:
        VolumenError: the type does not exist, or its `turns` does not match its channels.
    """
    task = get_task(type_name)
    try:
        return task.layout(ndim, complete_params(task, params))
    except ValueError as error:
        raise VolumenError(
            f"task type {type_name}", f"turns: {error}", remedy=f"correct {type(task).__qualname__}.turns"
        ) from None


def complete_params(task: DerivedTask, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `params`, completed with the task's defaults."""
    given = {key: value for key, value in params.items() if value is not None or key not in task.defaults}
    if given.get("validity") is None:
        given["validity"] = EXACT
    return {"classes": None, **task.defaults, **given}


def validate_task(name: str, params: Mapping[str, Any]) -> None:
    """Check one entry of `auxiliary_tasks`.

    Args:
        name: the key of the entry, for messages.
        params: its content.

    Raises:
        VolumenError: the type or a key is unknown (the message names the closest one), or a value is out of range.
    """
    where = f"auxiliary_tasks.{name}"
    if "type" not in params:
        raise VolumenError(where, "no type", remedy=f"add type: one of {', '.join(task_types())}")
    task = get_task(params["type"], where)
    known = COMMON_KEYS | set(task.defaults)
    for key in params:
        if key not in known:
            raise VolumenError(
                f"{where}.{key}",
                expected=f"a key of {task.type_name}: {', '.join(sorted(task.defaults))} or of every task",
                found=repr(key),
                remedy=closest(str(key), known),
            )
    full = complete_params(task, params)
    check_validity(f"{where}.validity", full["validity"])
    for key, allowed in task.choices.items():
        if full[key] not in allowed:
            raise VolumenError(
                f"{where}.{key}",
                expected=f"one of {', '.join(map(str, allowed))}",
                found=repr(full[key]),
                remedy=closest(str(full[key]), allowed),
            )
    _check_numbers(where, full)
    task.check(where, full)


def check_validity(where: str, value: Any) -> None:
    """Check a value of `validity`.

    Raises:
        VolumenError: it is no value, or one that this version does not offer.
    """
    if value == COMPLETED:
        raise VolumenError(
            where,
            "validity: completed is not available in this version",
            expected="exact or informed",
            found=repr(value),
            remedy="choose informed",
        )
    if value not in VALIDITIES:
        raise VolumenError(
            where, expected="exact or informed", found=repr(value), remedy=closest(str(value), VALIDITIES[:2])
        )


def derives_on_device(task: DerivedTask, params: Mapping[str, Any]) -> bool:
    """Whether a task can be derived for a batch with the validity in its parameters (null: exact)."""
    informed = params.get("validity") == INFORMED and task.informs
    return task.informs_on_device and task.on_device if informed else task.on_device


def derive_halo(tasks: Mapping[str, Mapping[str, Any]], spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the halo with which derived patches equal a crop of the derived whole volume.

    Args:
        tasks: entries of `auxiliary_tasks` by name.
        spacing: voxel size per spatial axis.

    Returns:
        voxels per spatial axis; zeros without tasks.
    """
    spacing = tuple(float(size) for size in spacing)
    halo = [0] * len(spacing)
    for params in tasks.values():
        task = get_task(params["type"])
        own = task.halo(complete_params(task, params), spacing)
        halo = [max(pair) for pair in zip(halo, own)]
    return tuple(halo)


def served_extent(
    tasks: Iterable[tuple[DerivedTask, Mapping[str, Any]]], source: str, spacing: Sequence[float]
) -> tuple[float | None, tuple[int, ...]]:
    """Return the largest reach, and the largest margin per axis, that the tasks of a source need."""
    served = [(task, params) for task, params in tasks if params["source_target"] == source]
    reaches = [resolve_reach(params["reach"], spacing) for _, params in served if "reach" in params]
    margins = [task.margin(params, spacing) for task, params in served]
    return max(reaches, default=None), tuple(map(max, zip(*margins)))


def _check_numbers(where: str, params: Mapping[str, Any]) -> None:
    for key, least in (("reach", 0.0), ("grad_sigma", None), ("tensor_sigma", None)):
        value = params.get(key)
        if value is None:
            continue
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < 0 or (least is not None and value <= least):
            expected = "a finite number above 0" if least is not None else "a finite number of at least 0"
            raise VolumenError(f"{where}.{key}", expected=expected, found=repr(value))
    classes = params.get("classes")
    if classes is not None and not (
        isinstance(classes, (list, tuple)) and classes and all(type(value) is int for value in classes)
    ):
        raise VolumenError(f"{where}.classes", expected="a list of class numbers", found=repr(classes))


def _load_entry_points() -> None:
    """Import the built-in tasks, then those of installed packages."""
    global _loaded_entry_points
    if _loaded_entry_points:
        return
    _loaded_entry_points = True
    import volumen.derived.critical_task
    import volumen.derived.instance_tasks
    import volumen.derived.tasks  # noqa: F401

    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            register_task(point.load())
        except Exception as error:
            _loaded_entry_points = False
            raise VolumenError(
                f"entry point {point.name} = {point.value}",
                f"cannot be loaded as a task ({type(error).__name__}: {error})",
                remedy="mend or uninstall the package that offers it",
            ) from error
