"""Makes cases from arrays in memory, without copying them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.labels.label_channels import LabelRule, as_label
from volumen.data.layout import OpenCase, check_same_kind, fit_label
from volumen.utils.errors import VolumenError

Arrays = Mapping[str, Mapping[str, Any]]


def cases_from_arrays(
    images: Mapping[str, Any],
    labels: Arrays,
    masks: Arrays,
    *,
    spacing: Sequence[float] | None = None,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
    rules: Mapping[str, LabelRule] | None = None,
) -> list[OpenCase]:
    """Return a case per image with its labels and masks.

    Args:
        images: arrays by name: (Z, Y, X) or (Y, X), or with channels first, (C, Z, Y, X). An array of three axes is
            (Z, Y, X), unless its label has two.
        labels: by image name, then by target: integer arrays with the image's spatial shape.
        masks: by image name, then by target: arrays that are not 0 where the label is valid.
        spacing: voxel size per spatial axis; None: unknown.
        targets: targets to use; None: every target that at least one image has.
        allow_unlabeled: whether images may lack the label of a target.
        rules: how the settings describe the storage of labels, by target.

    Raises:
        VolumenError: there is no image, a name belongs to no image, a label is missing, or shapes do not fit.
    """
    if not images:
        raise VolumenError("images", expected="at least one array", found="none")
    for what, given in (("labels", labels), ("masks", masks)):
        for name in given:
            if name not in images:
                raise VolumenError(what, expected=f"names of images: {', '.join(images)}", found=repr(name))
    chosen = list(targets or sorted({target for entry in labels.values() for target in entry}))
    cases = [
        _case(name, image, labels.get(name, {}), masks.get(name, {}), chosen, spacing, rules or {})
        for name, image in images.items()
    ]
    if not allow_unlabeled:
        _check_complete(cases, chosen)
    check_same_kind(cases)
    return cases


def _case(
    name: str,
    image: Any,
    labels: Mapping[str, Any],
    masks: Mapping[str, Any],
    targets: Sequence[str],
    spacing: Sequence[float] | None,
    rules: Mapping[str, LabelRule],
) -> OpenCase:
    for target in masks:
        if target not in labels:
            raise VolumenError(
                f"masks: {name}", expected=f"targets among {', '.join(labels)}", found=repr(target)
            )
    ndim = min((len(array.shape) for array in labels.values()), default=min(len(image.shape), 3))
    size = None if spacing is None else tuple(float(s) for s in spacing)
    axes = "zyx"[-ndim:] if len(image.shape) == ndim else "c" + "zyx"[-ndim:]
    volume = ArrayVolume(image, axes=axes, spacing=size, path=f"array {name}")

    def fitted(kind: str, target: str, array: Any) -> Any:
        label = ArrayVolume(array, ndim=ndim, spacing=size, path=f"array {name}: {kind} {target}")
        rule = LabelRule() if kind == "mask" else rules.get(target, LabelRule(f"targets.{target}"))
        return fit_label(volume, as_label(label, rule), mask=kind == "mask")

    return OpenCase(
        name,
        volume,
        {target: fitted("label", target, labels[target]) for target in targets if target in labels},
        {target: fitted("mask", target, masks[target]) for target in targets if target in masks},
        size or (1.0,) * ndim,
    )


def _check_complete(cases: Sequence[OpenCase], targets: Sequence[str]) -> None:
    for case in cases:
        for target in targets:
            if target not in case.labels:
                raise VolumenError(
                    f"labels: {case.name}",
                    f"has no label for the target {target!r}",
                    remedy="give it, or set dataset_config.allow_unlabeled_data",
                )
