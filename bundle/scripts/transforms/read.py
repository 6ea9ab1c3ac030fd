"""Reads a patch from its volumes: crop, spatial augmentation and normalisation in one step."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Transform

from volumen.data.resampled import resampling_of
from volumen.data.target_spacing import stored_case
from volumen.data.validity import inside_mask, known_voxels, without_ignored
from volumen.transforms.deferred import RawLabel, RawPatch, as_int32, as_tensor
from volumen.transforms.kernels.grid import Grid, LabelReader, Region, is_empty
from volumen.transforms.normalize import Normalizer
from volumen.transforms.spatial import SpatialTransform
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import DEFERRED, mask_key

_LOGGER = logging.getLogger(__name__)


class ReadPatchd(Transform):
    """Read image, labels and masks of `sample["location"]`, and apply `sample["spatial"]` while reading.

    Only the region that the drawn transform needs is read, clipped to `location.bounds`. Without rotation or
    scaling the patch is an exact crop; otherwise it is resampled once: linearly for the image, nearest
    for labels and masks. The location of a volume with a target spacing is on its resampled grid.

    Args:
        targets: names of the targets to read.
        patch_size: voxels per axis; None: the location's size.
        halo: voxels per axis by which labels and masks extend beyond the patch on every side.
        normalization_scheme, intensity_properties: as for `Normalizer`.
        image_order: 1 for linear interpolation; 3 for cubic splines (SciPy, about ten times slower).
        ignore_labels: target to the label value that means "unknown".
        label_channels: target to the channels of its label, for a case without that label; default 1.
        nonfinite: treatment of NaN and infinity in an image: "zero" (0 after normalisation, one warning
            per volume) or "refuse".

    Writes, for C image channels and Ct label channels:
        image: float32 (C, *patch), reflected at the bounds; labels beyond the bounds are not known.
        <target>: integer (Ct, *(patch + 2 halo)), 0 where unknown.
        <target>_mask: bool (1, *(patch + 2 halo)): the label is known.
        in_volume: bool (1, *(patch + 2 halo)), or None when every voxel lies inside the volume.
        spacing, volume_name, start (of the patch before augmentation).
    If the sample has a `RawPatch` under `DEFERRED`, the image and the labels are stored there as they are read, and
    only the patch's `worker_targets` are sampled as above.

    Raises:
        VolumenError: a setting is not valid, or an image holds NaN or infinity and `nonfinite` is "refuse".
    """

    def __init__(
        self,
        targets: Sequence[str],
        patch_size: Sequence[int] | None = None,
        halo: Sequence[int] | int = 0,
        normalization_scheme: str | Sequence[str] = "unit",
        intensity_properties: Mapping[str, Any] | None = None,
        image_order: int = 1,
        ignore_labels: Mapping[str, int] | None = None,
        nonfinite: str = "zero",
        label_channels: Mapping[str, int] | None = None,
    ) -> None:
        if image_order not in (1, 3):
            raise VolumenError("image_order", expected="1 or 3", found=image_order)
        if nonfinite not in ("zero", "refuse"):
            raise VolumenError("nonfinite", expected="'zero' or 'refuse'", found=repr(nonfinite))
        self.targets = tuple(targets)
        self.patch_size = None if patch_size is None else tuple(int(size) for size in patch_size)
        self.halo = halo
        self.normalizer = Normalizer(normalization_scheme, intensity_properties)
        self.image_order = image_order
        self.ignore_labels = dict(ignore_labels or {})
        self.nonfinite = nonfinite
        self.label_channels = dict(label_channels or {})
        self._warned: set[str] = set()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        case, location = sample.pop("case"), sample.pop("location")
        size = self.patch_size or tuple(location.size)
        spatial = sample.pop("spatial", None) or SpatialTransform.identity(len(size))
        bounds = tuple(tuple(span) for span in location.bounds)
        patch = Grid.of_patch(location.start, size, (0,) * len(size), spatial, case.spacing)
        wide = Grid.of_patch(location.start, size, self._halo(len(size)), spatial, case.spacing)
        resampling = resampling_of(case.image)
        if resampling is not None:
            # Composed with the augmentation, so that stored voxels are interpolated only once.
            patch, wide = patch.resampled(resampling), wide.resampled(resampling)
            bounds, case = resampling.stored_box(bounds), stored_case(case)

        deferred = sample.get(DEFERRED)
        labels = LabelReader(wide, bounds)
        if deferred is None:
            sample["image"] = self._image(case.image, patch, patch.region(bounds))
        else:
            sample[DEFERRED] = self._raw(deferred, case, patch, bounds, labels)
        for target in self.targets if deferred is None else deferred.worker_targets:
            sample[target], sample[mask_key(target)] = self._label(case, target, labels)
        if deferred is None or deferred.worker_targets:
            sample["in_volume"] = wide.inside(tuple((0, n) for n in case.image.shape))
        sample["spacing"] = tuple(float(step) for step in case.spacing)
        sample["volume_name"] = case.name
        sample["start"] = tuple(int(first) for first in location.start)
        return sample

    def _halo(self, ndim: int) -> tuple[int, ...]:
        if isinstance(self.halo, int):
            return (self.halo,) * ndim
        if len(self.halo) != ndim:
            raise ValueError(f"halo must have {ndim} entries, got {self.halo!r}")
        return tuple(int(width) for width in self.halo)

    def _image(self, volume: Any, grid: Grid, region: Region) -> np.ndarray:
        if is_empty(region):
            return np.zeros((volume.channels, *grid.patch_shape), dtype=np.float32)
        raw, normalizer, coefficients = self._stored(volume, region)
        zero = normalizer.zero_level(coefficients)
        # The image is reflected, because a constant beyond the border would change the instance normalisation.
        raw, region = grid.reflect(raw, region)
        # Interpolating raw values moves less memory than interpolating normalised ones, and has the same result.
        return normalizer.apply(grid.sample(raw, region, zero, self.image_order), coefficients)

    def _stored(self, volume: Any, region: Region) -> tuple[np.ndarray, Normalizer, np.ndarray]:
        """Return a region's finite values, and the normaliser and coefficients that belong to them."""
        raw = np.asarray(volume.read(region))
        normalizer = self.normalizer.for_volume(volume)
        coefficients = normalizer.coefficients(raw.dtype, len(raw))
        if raw.dtype.kind == "f":
            raw = self._finite(raw, volume, region, normalizer.zero_level(coefficients))
        return raw, normalizer, coefficients

    def _raw(
        self, deferred: RawPatch, case: Any, patch: Grid, bounds: tuple, labels: LabelReader
    ) -> RawPatch:
        """Return a patch's stored voxels; the worker changes none of them."""
        if self.image_order != 1:
            raise ValueError("splines are not available on the training device")
        region, image = patch.region(bounds), None
        coefficients = np.ones((case.image.channels, 4), np.float32)
        if not is_empty(region):
            raw, _, coefficients = self._stored(case.image, region)
            image = as_tensor(raw)
        return RawPatch(
            worker_targets=deferred.worker_targets,
            patch=patch,
            wide=labels.grid,
            image=image,
            image_region=region,
            coefficients=coefficients,
            labels={target: self._raw_label(case, target, labels.region) for target in self.targets},
            label_region=labels.region,
            volume_shape=tuple(int(n) for n in case.image.shape),
            spacing=tuple(float(step) for step in case.spacing),
        )

    def _raw_label(self, case: Any, target: str, region: Region) -> RawLabel:
        volume, ignore = case.labels.get(target), self.ignore_labels.get(target)
        if volume is None:
            return RawLabel(None, None, None, self.label_channels.get(target, 1))
        if is_empty(region):
            return RawLabel(None, None, None, volume.channels)
        label = np.asarray(volume.read(region))
        mask = np.asarray(case.masks[target].read(region)) if target in case.masks else None
        known, extremes = None if mask is None else inside_mask(mask), None
        if ignore is not None and not _holds(label.dtype, ignore):
            ignore = None
        if label.dtype.kind in "iu" and not np.can_cast(label.dtype, np.int32):
            known, label, ignore = known_voxels(label, mask, ignore), without_ignored(label, ignore), None
            extremes, label = _extremes(label, known), as_int32(label)
        stored_mask = None if known is None else as_tensor(known[None])
        return RawLabel(as_tensor(label), stored_mask, ignore, volume.channels, extremes)

    def _finite(self, raw: np.ndarray, volume: Any, region: Region, zero: np.ndarray) -> np.ndarray:
        finite = np.isfinite(raw)
        if finite.all():
            return raw
        count = raw.size - int(finite.sum())
        first = np.argwhere(~finite)[0][1:] + [span.start for span in region]
        if self.nonfinite == "refuse":
            raise VolumenError(
                volume.path,
                expected="finite intensities",
                found=f"{count} NaN or infinite values, the first at {tuple(int(i) for i in first)}",
                remedy="repair the image or set nonfinite: zero",
            )
        if volume.path not in self._warned:
            self._warned.add(volume.path)
            _LOGGER.warning(
                "%s: %d NaN or infinite values in the patch at %s count as 0 (nonfinite: refuse would stop)",
                volume.path,
                count,
                tuple(span.start for span in region),
            )
        return np.where(finite, raw, zero.astype(raw.dtype).reshape(-1, *(1,) * (raw.ndim - 1)))

    def _label(self, case: Any, target: str, reader: LabelReader) -> tuple[np.ndarray, np.ndarray]:
        volume = case.labels.get(target)
        if volume is None:
            shape, channels = reader.grid.patch_shape, self.label_channels.get(target, 1)
            return np.zeros((channels, *shape), dtype=np.uint8), np.zeros((1, *shape), dtype=bool)
        label = reader.read(volume)
        mask = reader.read(case.masks[target]) if target in case.masks else None
        ignore = self.ignore_labels.get(target)
        trusted = known_voxels(label, mask, ignore)
        valid = reader.inside
        if trusted is not None:
            valid = trusted[None] if valid is None else valid & trusted
        if valid is None:
            valid = np.ones((1, *label.shape[1:]), dtype=bool)
        return without_ignored(label, ignore), valid


def _holds(dtype: np.dtype, value: int) -> bool:
    """Whether a type can hold a value, which otherwise never equals any of its values."""
    if dtype.kind not in "iu":
        return True
    return bool(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max)


def _extremes(label: np.ndarray, known: np.ndarray | None) -> tuple[int, int] | None:
    """Return the smallest and the largest known value, or None if there is none."""
    values = label if known is None else label[:, known]
    return (int(values.min()), int(values.max())) if values.size else None
