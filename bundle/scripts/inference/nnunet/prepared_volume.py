"""A view of an image as a network of nnU-Net sees it: normalised, cropped and resampled, region by region."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from volumen.data.formats.volumes import Region, check_region
from volumen.data.space.resampling import interpolate, nearest
from volumen.data.views import VolumeView
from volumen.inference.nnunet.grid import PlannedGrid, halo_span, spline
from volumen.transforms.normalize import Normalizer
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Normalisation:
    """How the values of an image are normalised and interpolated.

    Args:
        rows: low, high, shift and width per channel: (C, 4), see `Normalizer`.
        masked: channels that are mapped in the mask alone, bool (C,).
        mask: of the nonzero box, bool; None where no channel needs one.
        limits: least and largest normalised value per channel and slice, (2, C, slices), to which interpolated values
            are cut; None: they are not cut.
        order: of the interpolation.
        nonfinite: "zero" makes NaN and infinity 0 after normalisation; "refuse" stops.
    """

    rows: np.ndarray
    masked: np.ndarray
    mask: np.ndarray | None
    limits: np.ndarray | None
    order: int
    nonfinite: str = "zero"

    def apply(self, values: np.ndarray, place: Region) -> np.ndarray:
        """Normalise a part of the nonzero box.

        Args:
            values: (C, *space), any real dtype.
            place: of the part in the box.

        Returns:
            float32 (C, *space).
        """
        values = values.astype(np.float32, copy=False)
        result = Normalizer.apply(values, self.rows.astype(np.float32))
        if self.mask is not None and self.masked.any():
            stay = self.masked.reshape(-1, *[1] * (values.ndim - 1)) & ~self.mask[place]
            result = np.where(stay, values, result)
        return result


class PreparedVolume(VolumeView):
    """A view of an image as a network of nnU-Net sees it, float32.

    Args:
        volume: the image.
        grid: voxels of the view.
        normalisation: of the values.
    """

    def __init__(self, volume: Volume, grid: PlannedGrid, normalisation: Normalisation) -> None:
        super().__init__(volume)
        self.grid, self.normalisation = grid, normalisation
        self.shape = grid.sizes
        self.dtype = np.dtype("float32")
        self.chunks = tuple(
            max(1, min(size, math.ceil(chunk / step)))
            for chunk, step, size in zip(volume.chunks, grid.step, grid.sizes, strict=True)
        )
        self.geometry = volume.geometry
        if volume.geometry.spacing is not None:
            spacing = tuple(s * step for s, step in zip(volume.geometry.spacing, grid.step, strict=True))
            self.geometry = replace(volume.geometry, spacing=spacing)
        self.affine = None
        self._warned = False

    def inner_region(self, region: Region) -> Region:
        box = self.grid.stored_box([(part.start, part.stop) for part in region])
        return tuple(slice(*span) for span in box)

    def fingerprint(self) -> str:
        """Return a hash of the image's content and of the preparation."""
        from volumen.data.caching.fingerprints import digest

        return digest(
            [self.volume.fingerprint(), self.grid.start, self.grid.sizes, self.normalisation.rows.tolist()]
        )

    def read(self, region: Region) -> np.ndarray:
        region = check_region(region, self.shape)
        if any(part.start == part.stop for part in region):
            return np.empty((self.channels, *(part.stop - part.start for part in region)), self.dtype)
        grid = self.grid
        if not grid.is_resampled:
            return self._normalised(region)
        # Positions in the box.
        positions = [
            grid.stored_positions(axis, part.start, part.stop) - grid.start[axis]
            for axis, part in enumerate(region)
        ]
        order = self.normalisation.order
        spans = [
            halo_span(where, size, 0 if axis == grid.nearest_in else order)
            for axis, (where, size) in enumerate(zip(positions, grid.box, strict=True))
        ]
        values = self._normalised(tuple(slice(*span) for span in spans))
        first = [low for low, _ in spans]
        axes = [axis for axis in range(len(region)) if axis != grid.nearest_in]
        if order == 3:
            values = self._splined(values, positions, first, axes)
        elif order == 1:
            values = interpolate(values, positions, first, axes)
        for axis, where in enumerate(positions):
            if axis == grid.nearest_in or order == 0:
                places = [first[n] + np.arange(size) for n, size in enumerate(values.shape[1:])]
                places[axis] = where
                values = nearest(values, places, first)
        return np.ascontiguousarray(values, dtype=np.float32)

    def _splined(
        self, values: np.ndarray, positions: list[np.ndarray], first: list[int], axes: list[int]
    ) -> np.ndarray:
        """Interpolate along axes, and cut to the range of the whole image, or of each slice of it."""
        result = values.astype(np.float64)
        for axis in axes:
            result = spline(result, axis, positions[axis], first[axis], self.grid.box[axis])
        if self.normalisation.limits is None:
            return result
        low, high = self.normalisation.limits
        shape = [len(values), *[1] * (values.ndim - 1)]
        if self.grid.nearest_in is not None:
            axis = self.grid.nearest_in
            part = slice(first[axis], first[axis] + values.shape[axis + 1])
            low, high = low[:, part], high[:, part]
            shape[axis + 1] = -1
        return np.clip(result, low.reshape(shape), high.reshape(shape))

    def _normalised(self, place: Region) -> np.ndarray:
        """Return normalised stored voxels, of a part of the nonzero box."""
        region = tuple(
            slice(part.start + low, part.stop + low) for part, low in zip(place, self.grid.start, strict=True)
        )
        raw = self.volume.read(region)
        values = self.normalisation.apply(raw, place)
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            self._check_finite(raw, region)
            values[~np.isfinite(raw)] = 0
        return values

    def _check_finite(self, raw: np.ndarray, region: Region) -> None:
        """Warn once of values that are not finite.

        Raises:
            VolumenError: the setting refuses them.
        """
        first = np.argwhere(~np.isfinite(raw))[0][1:]
        place = tuple(int(index) + part.start for index, part in zip(first, region, strict=True))
        if self.normalisation.nonfinite == "refuse":
            raise VolumenError(
                self.path,
                expected="finite intensities",
                found=f"NaN or infinite values, the first of a part at {place}",
                remedy="repair the image, or count them as 0 with --nonfinite zero",
            )
        if not self._warned:
            self._warned = True
            logger.warning("%s: NaN or infinite values, such as at %s, count as 0", self.path, place)
