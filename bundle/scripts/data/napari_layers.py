"""Makes cases from the layers of an open napari viewer, without copying their arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unicodedata import normalize

import numpy as np

from volumen.data.formats.listing import Entry
from volumen.data.formats.volumes import ArrayVolume, Volume
from volumen.data.labels.label_channels import LabelRule, as_label
from volumen.data.layout import OpenCase, check_same_kind, fit_label, with_spacing
from volumen.data.pairing import Case, pair_cases
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError


def cases_from_viewer(
    viewer: Any,
    *,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
    rules: Mapping[str, LabelRule] | None = None,
) -> list[OpenCase]:
    """Pair a viewer's layers by name: Image layers with Labels `<image>_<target>` and `<image>_mask`.

    Args:
        viewer: a napari viewer, or anything with `layers` that have `name`, `data` and `scale`.
        targets: targets to use; by default all that have a layer.
        allow_unlabeled: accept images that lack the layer of some target.
        rules: how the settings describe labels, by target; the channels of a layer are always separate targets.

    Raises:
        VolumenError: a layer is missing or its shape does not fit.
    """
    images = {layer.name: layer for layer in viewer.layers if _kind(layer) == "image"}
    labels = {layer.name: layer for layer in viewer.layers if _kind(layer) == "labels"}
    if not images:
        raise VolumenError(
            "napari", expected="an Image layer", found="none", remedy="add the image to the viewer"
        )
    masks = [name for name in labels if name.endswith("_mask")]
    rest = [name for name in labels if name not in masks]
    entries = [[_entry(name) for name in names] for names in (images, rest, masks)]
    paired, _ = pair_cases("napari", *entries, targets=targets, allow_unlabeled=allow_unlabeled)
    cases = [_open_case(case, images, labels, rules or {}) for case in paired]
    check_same_kind(cases)
    return with_spacing(cases)


def _open_case(
    case: Case, images: dict[str, Any], labels: dict[str, Any], rules: Mapping[str, LabelRule]
) -> OpenCase:
    image = _image_volume(images[case.image])

    def fitted(name: str, mask: bool, rule: LabelRule) -> Volume:
        label = as_label(_label_volume(labels[name], image), replace(rule, separate=True))
        return fit_label(image, label, mask=mask)

    return OpenCase(
        case.name,
        image,
        {target: fitted(name, False, rules.get(target, LabelRule())) for target, name in case.labels.items()},
        {target: fitted(name, True, LabelRule()) for target, name in case.masks.items()},
        (1.0,) * len(image.shape),
    )


def _entry(name: str) -> Entry:
    return Entry(normalize("NFC", name), "napari", name)


def _kind(layer: Any) -> str:
    return str(getattr(layer, "_type_string", type(layer).__name__)).lower()


def _finest(layer: Any) -> Any:
    return layer.data[0] if getattr(layer, "multiscale", False) else layer.data


def _image_volume(layer: Any) -> Volume:
    array = _finest(layer)
    rgb = bool(getattr(layer, "rgb", False))
    ndim = len(array.shape) - rgb
    axes = {2: "yx", 3: "zyx", 4: "czyx"}.get(ndim)
    if axes is None:
        raise VolumenError(layer.name, expected="a layer of 2 to 4 axes", found=f"shape {tuple(array.shape)}")
    return ArrayVolume(
        array,
        axes=axes + "c" * rgb,
        geometry=_geometry(layer, min(ndim, 3)),
        path=f"napari layer {layer.name}",
    )


def _label_volume(layer: Any, image: Volume) -> Volume:
    array = _finest(layer)
    ndim = len(image.shape)
    return ArrayVolume(array, ndim=ndim, geometry=_geometry(layer, ndim), path=f"napari layer {layer.name}")


def _geometry(layer: Any, ndim: int) -> Geometry:
    """Return the geometry of a layer in the viewer, without napari's rotation and shear."""
    units = getattr(layer, "units", None)
    scale = getattr(layer, "scale", None)
    return viewer_geometry(
        (1.0,) * ndim if scale is None else scale,
        getattr(layer, "translate", None),
        None if units is None else str(units[-1]),
        ndim,
    )


def viewer_geometry(
    scale: Sequence[float], translate: Sequence[float] | None, unit: str | None, ndim: int
) -> Geometry:
    """Return the geometry of a napari layer; an axis of negative scale is reversed.

    Args:
        scale: voxel size per axis of the layer.
        translate: place of the first voxel per axis of the layer; None: 0.
        unit: unit of both, as napari names it.
        ndim: number of spatial axes, which are the last axes of the layer.
    """
    sizes = [float(value) for value in scale][-ndim:]
    place = [0.0] * ndim if translate is None else [float(value) for value in translate][-ndim:]
    return stated_geometry(
        [abs(size) for size in sizes],
        unit_name(unit),
        origin=place,
        directions=np.diag([-1.0 if size < 0 else 1.0 for size in sizes]),
    )
