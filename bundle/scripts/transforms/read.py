"""Reads a patch from its volumes: crop, spatial augmentation and normalisation in one step."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.transforms import Transform

from scripts.errors import VolumenError
from scripts.transforms import resample
from scripts.transforms.normalize import Normalizer
from scripts.transforms.spatial import SpatialTransform

_LOGGER = logging.getLogger(__name__)

Box = tuple[tuple[int, int], ...]


class ReadPatchd(Transform):
    """Reads image, labels and masks of `sample["location"]`, carrying out `sample["spatial"]` on the way.

    Only the region that the drawn transform needs is read, clipped to `location.bounds`. Without rotation or
    scaling the patch is a plain crop, bitwise; else one resampling does all: linear for the image, nearest for
    labels and masks.

    Args:
        targets: names of the targets to read.
        patch_size: voxels per axis; None: the location's size.
        halo: voxels per axis by which labels and masks reach beyond the patch on every side.
        normalization_scheme, intensity_properties: as for `Normalizer`.
        image_order: 1 for linear interpolation; 3 for cubic splines (SciPy, about ten times slower).
        ignore_labels: target to the label value that means "unknown".
        nonfinite: what to do with NaN and infinity in an image: "zero" (0 after normalisation, one warning per
            volume) or "refuse".

    Writes, for C image channels and Ct label channels:
        image: float32 (C, *patch), 0 outside the bounds.
        <target>: integer (Ct, *(patch + 2 halo)), 0 where unknown.
        <target>_mask: bool (1, *(patch + 2 halo)): the label is known.
        in_volume: bool (1, *(patch + 2 halo)), or None when every voxel lies inside the volume.
        spacing, volume_name, start (of the patch before augmentation).

    Raises:
        VolumenError: a setting is not valid, or an image holds NaN or infinity and they are refused.
    """

    def __init__(
        self,
        targets: Sequence[str],
        patch_size: Sequence[int] | None = None,
        halo: Sequence[int] | int = 0,
        normalization_scheme: str = "unit",
        intensity_properties: Mapping[str, Any] | None = None,
        image_order: int = 1,
        ignore_labels: Mapping[str, int] | None = None,
        nonfinite: str = "zero",
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
        self._warned: set[str] = set()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        case, location = sample.pop("case"), sample.pop("location")
        size = self.patch_size or tuple(location.size)
        spatial = sample.pop("spatial", None) or SpatialTransform.identity(len(size))
        bounds = tuple(tuple(span) for span in location.bounds)
        patch = Grid.of_patch(location.start, size, (0,) * len(size), spatial, case.spacing)
        wide = Grid.of_patch(location.start, size, self._halo(len(size)), spatial, case.spacing)

        sample["image"] = self._image(case.image, patch, bounds)
        labels = GridReader(wide, bounds)
        for target in self.targets:
            sample[target], sample[f"{target}_mask"] = self._label(case, target, labels)
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

    def _image(self, volume: Any, grid: Grid, bounds: Box) -> np.ndarray:
        region = grid.region(bounds)
        if _empty(region):
            return np.zeros((volume.channels, *grid.out_shape), dtype=np.float32)
        raw = volume.read(region)
        if raw.dtype.kind == "f":
            raw = self._finite(raw, volume, region)
        if grid.matrix is not None:
            return grid.interpolate(self.normalizer(raw), region, self.image_order)
        if grid.covers(region):
            return self.normalizer(grid.spatial.orient(raw))
        out = np.zeros((len(raw), *grid.shape), dtype=np.float32)
        self.normalizer.into(raw, grid.place(out, region))
        return np.ascontiguousarray(grid.spatial.orient(out))

    def _finite(self, raw: np.ndarray, volume: Any, region: tuple[slice, ...]) -> np.ndarray:
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
                "%s: %d NaN or infinite values in the patch at %s count as 0; set nonfinite: refuse to stop instead",
                volume.path,
                count,
                tuple(span.start for span in region),
            )
        zero = self.normalizer.zero_level(raw.dtype, len(raw)).astype(raw.dtype)
        return np.where(finite, raw, zero.reshape(-1, *(1,) * (raw.ndim - 1)))

    def _label(self, case: Any, target: str, reader: GridReader) -> tuple[np.ndarray, np.ndarray]:
        volume = case.labels.get(target)
        if volume is None:
            shape = (1, *reader.grid.out_shape)
            return np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=bool)
        label = reader.read(volume)
        known = reader.inside()
        if target in case.masks:
            permitted = (reader.read(case.masks[target]) > 0).all(axis=0, keepdims=True)
            known = permitted if known is None else known & permitted
        if target in self.ignore_labels:
            ignored = (label == self.ignore_labels[target]).any(axis=0, keepdims=True)
            known = ~ignored if known is None else known & ~ignored
            # A reserved value must not reach code that counts classes.
            label = np.where(ignored, label.dtype.type(0), label)
        if known is None:
            known = np.ones((1, *label.shape[1:]), dtype=bool)
        return label, known


@dataclass(frozen=True, eq=False)
class Grid:
    """Where in a volume the voxels of a patch lie.

    Args:
        spatial: the drawn transform.
        matrix: (n, n) from voxels of the patch, flips included, to voxels of the volume; None for a plain crop.
        offset: (n,) position of the patch's voxel 0 (with a matrix) or first corner (a crop) in the volume.
        shape: voxels per axis as sampled: for a crop before axes are permuted.
        out_shape: voxels per axis of the patch.
    """

    spatial: SpatialTransform
    matrix: np.ndarray | None
    offset: np.ndarray
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @classmethod
    def of_patch(
        cls,
        start: Sequence[int],
        size: Sequence[int],
        halo: Sequence[int],
        spatial: SpatialTransform,
        spacing: Sequence[float],
    ) -> Grid:
        """The grid of a patch of `size` at `start`, widened by `halo`, after `spatial` about its centre."""
        out_shape = tuple(int(n) + 2 * int(width) for n, width in zip(size, halo))
        first = np.asarray(start, dtype=float)
        if spatial.matrix is None:
            inner = np.asarray(spatial.sampled(halo))
            return cls(spatial, None, first - inner, spatial.sampled(out_shape), out_shape)
        matrix = spatial.oriented_matrix(spacing)
        centre = first + (np.asarray(size) - 1) / 2
        offset = centre - matrix @ ((np.asarray(out_shape) - 1) / 2)
        return cls(spatial, matrix, offset, out_shape, out_shape)

    def region(self, bounds: Box) -> tuple[slice, ...]:
        """The voxels of the volume that the grid touches, clipped to `bounds`."""
        if self.matrix is None:
            low, high = self.offset.astype(int), self.offset.astype(int) + self.shape
        else:
            reach = self.matrix * (np.asarray(self.shape) - 1)
            low = np.floor(self.offset + np.minimum(reach, 0).sum(axis=1)).astype(int)
            high = np.floor(self.offset + np.maximum(reach, 0).sum(axis=1)).astype(int) + 2
        spans = []
        for first, last, (start, stop) in zip(low, high, bounds):
            begin = min(max(int(first), start), stop)
            spans.append(slice(begin, max(begin, min(int(last), stop))))
        return tuple(spans)

    def covers(self, region: tuple[slice, ...]) -> bool:
        """Whether a crop's region was not clipped."""
        return all(span.stop - span.start == size for span, size in zip(region, self.shape))

    def place(self, array: np.ndarray, region: tuple[slice, ...]) -> np.ndarray:
        """The view of a crop (C, *shape) that `region` of the volume fills."""
        spans = (
            slice(span.start - int(first), span.stop - int(first)) for span, first in zip(region, self.offset)
        )
        return array[(slice(None), *spans)]

    def interpolate(self, source: np.ndarray, region: tuple[slice, ...], order: int) -> np.ndarray:
        """Samples `source` (C, *region) float32 on the grid: (C, *out_shape) float32, zero outside the region."""
        out = np.zeros((len(source), *self.out_shape), dtype=np.float32)
        matrix, offset = self._in_three(region)
        if order == 3:
            return _spline(source, matrix, offset, out)
        for channel in range(len(source)):
            box = np.ascontiguousarray(resample.as_box(source[channel]))
            resample.trilinear(box, matrix, offset, resample.as_box(out[channel]))
        return out

    def nearest(self, region: tuple[slice, ...]) -> np.ndarray:
        """Flat index into `region` of the voxel nearest to each voxel of the grid, -1 outside: (nz, ny, nx)."""
        matrix, offset = self._in_three(region)
        shape = (1,) * (3 - len(region)) + tuple(span.stop - span.start for span in region)
        index = np.empty((1,) * (3 - len(region)) + self.out_shape, dtype=np.int64)
        resample.nearest_index(matrix, offset, np.asarray(shape), index)
        return index

    def inside(self, bounds: Box) -> np.ndarray | None:
        """Voxels (1, *out_shape) of the grid that lie in `bounds`; None if all do."""
        region = self.region(bounds)
        if self.matrix is None:
            if self.covers(region):
                return None
            out = np.zeros((1, *self.shape), dtype=bool)
            self.place(out, region)[...] = True
            return np.ascontiguousarray(self.spatial.orient(out))
        if region == self.region(((-(2**40), 2**40),) * len(region)):
            return None
        return (self.nearest(tuple(slice(*span) for span in bounds)) >= 0).reshape(1, *self.out_shape)

    def _in_three(self, region: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        assert self.matrix is not None
        missing = 3 - len(region)
        matrix, offset = np.eye(3), np.zeros(3)
        matrix[missing:, missing:] = self.matrix
        offset[missing:] = self.offset - [span.start for span in region]
        return matrix, offset


class GridReader:
    """Reads several label volumes of one case on the same grid, sharing the geometry.

    Args:
        grid: where the voxels lie.
        bounds: the part of the volumes that may be read.
    """

    def __init__(self, grid: Grid, bounds: Box) -> None:
        self.grid, self.bounds = grid, bounds
        self.region = grid.region(bounds)
        self._index: np.ndarray | None = None

    def read(self, volume: Any) -> np.ndarray:
        """Nearest values (Ct, *out_shape) in the volume's own dtype, zero outside the bounds."""
        if _empty(self.region):
            return np.zeros((volume.channels, *self.grid.out_shape), dtype=volume.dtype)
        raw = np.asarray(volume.read(self.region))
        if self.grid.matrix is None:
            if not self.grid.covers(self.region):
                whole = np.zeros((len(raw), *self.grid.shape), dtype=raw.dtype)
                self.grid.place(whole, self.region)[...] = raw
                raw = whole
            return np.ascontiguousarray(self.grid.spatial.orient(raw))
        if self._index is None:
            self._index = self.grid.nearest(self.region)
        flat = raw.reshape(len(raw), *(1,) * (4 - raw.ndim), *raw.shape[1:])
        return resample.gather(flat, self._index).reshape(len(raw), *self.grid.out_shape)

    def inside(self) -> np.ndarray | None:
        """Voxels (1, *out_shape) inside the bounds; None if all are."""
        return self.grid.inside(self.bounds)


def _empty(region: tuple[slice, ...]) -> bool:
    return any(span.start == span.stop for span in region)


def _spline(source: np.ndarray, matrix: np.ndarray, offset: np.ndarray, out: np.ndarray) -> np.ndarray:
    from scipy.ndimage import affine_transform

    missing = 3 - (source.ndim - 1)
    known = affine_transform(
        np.ones(source.shape[1:], dtype=np.uint8),
        matrix[missing:, missing:],
        offset[missing:],
        out.shape[1:],
        order=0,
        mode="grid-constant",
    ).astype(bool)
    for channel in range(len(source)):
        affine_transform(
            source[channel],
            matrix[missing:, missing:],
            offset[missing:],
            output=out[channel],
            order=3,
            mode="nearest",
        )
        out[channel][~known] = 0.0
    return out
