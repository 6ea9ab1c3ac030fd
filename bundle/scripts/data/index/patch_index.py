"""The index of valid patches: the allowed locations of each patch, as arrays with one row per patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.utils.boxes import Box


@dataclass(frozen=True)
class PatchLocation:
    """The location of one patch.

    Args:
        case: index into the list of cases.
        start: first voxel per axis; negative, or too near the end, only if the region is smaller than the patch.
        size: patch size in voxels.
        bounds: the region of the volume that may be read; the rest of the patch is reflected, and no label is
            known there.
    """

    case: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    bounds: Box


@dataclass(frozen=True)
class PatchTable:
    """Patches of one kind, as arrays with one row per patch (N patches, D axes, K classes).

    Args:
        region: (N,) row of `PatchIndex.regions`.
        start: (N, D) first voxel, on the grid.
        share: (N,) labelled share of the patch, the largest over the targets.
        shifts: (N,) uint64; bit i is set if the patch remains valid when it is moved by the i-th of
            `PatchIndex.shifts`.
        class_shifts: (K, N) uint64; bit i is set if, in addition, the k-th of `PatchIndex.classes` lies in the central
            part of the patch: half of it along every axis, rounded to the nearest border of the counting grid, and up
            to the region's end for a patch that lies there. It is also set if the patch contains, outside its central
            part, voxels of the class that lie in no patch's central part.
    """

    region: np.ndarray
    start: np.ndarray
    share: np.ndarray
    shifts: np.ndarray
    class_shifts: np.ndarray

    def __len__(self) -> int:
        return len(self.region)

    def rows(self, chosen: np.ndarray) -> PatchTable:
        """Return the table of some rows, in the order of `chosen`."""
        return PatchTable(
            region=self.region[chosen],
            start=self.start[chosen],
            share=self.share[chosen],
            shifts=self.shifts[chosen],
            class_shifts=self.class_shifts[:, chosen],
        )

    @classmethod
    def concatenate(cls, tables: Sequence[PatchTable], ndim: int, num_classes: int) -> PatchTable:
        """Join tables row by row; without tables the result is empty."""
        empty = cls(
            region=np.zeros(0, np.int32),
            start=np.zeros((0, ndim), np.int32),
            share=np.zeros(0, np.float32),
            shifts=np.zeros(0, np.uint64),
            class_shifts=np.zeros((num_classes, 0), np.uint64),
        )
        every = [empty, *tables]
        return cls(
            region=np.concatenate([t.region for t in every]),
            start=np.concatenate([t.start for t in every]),
            share=np.concatenate([t.share for t in every]),
            shifts=np.concatenate([t.shifts for t in every]),
            class_shifts=np.concatenate([t.class_shifts for t in every], axis=1),
        )


@dataclass(frozen=True)
class PatchIndex:
    """All patches that may be drawn.

    Args:
        patch_size: voxels per axis.
        stride: of the grid, voxels per axis.
        regions: (case index, box) of every searched region.
        shifts: displacements from the grid, voxels per axis; the bits of a patch state which are allowed; the first is
            zero. Empty: any displacement up to half a stride inside the region is allowed.
        classes: (target, label value) pairs whose presence was recorded.
        foreground: the valid patches; with background sampling, only those that contain a labelled object.
        background: known patches without any object; empty unless they were requested.
    """

    patch_size: tuple[int, ...]
    stride: tuple[int, ...]
    regions: tuple[tuple[int, Box], ...]
    shifts: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[str, int], ...]
    foreground: PatchTable
    background: PatchTable

    def __len__(self) -> int:
        """Return the number of foreground patches."""
        return len(self.foreground)

    def grid_location(self, row: int, *, background: bool = False) -> PatchLocation:
        """Return the location of a patch on the grid."""
        table = self.background if background else self.foreground
        return self._location(table, row, (0,) * len(self.patch_size))

    def random_location(
        self,
        row: int,
        rng: np.random.Generator,
        *,
        background: bool = False,
        class_row: int | None = None,
    ) -> PatchLocation:
        """Return a patch moved at random by up to half a stride, so that it stays valid and inside its region.

        Along an axis on which the region is smaller than the patch, the region lies anywhere inside the patch.

        Args:
            row: row of the table.
            rng: random number generator; equal states return equal locations.
            background: use the background table.
            class_row: row of `classes`; this class stays in the central part of the patch.
        """
        table = self.background if background else self.foreground
        if self.shifts:
            bits = int((table.shifts if class_row is None else table.class_shifts[class_row])[row])
            allowed = [shift for i, shift in enumerate(self.shifts) if bits >> i & 1]
            shift = allowed[int(rng.integers(len(allowed)))] if allowed else self.shifts[0]
        else:
            shift = self._free_shift(table, row, rng)
        location = self._location(table, row, shift)
        start = list(location.start)
        for axis, ((low, high), size) in enumerate(zip(location.bounds, self.patch_size)):
            if high - low < size:
                start[axis] = int(rng.integers(high - size, low + 1))
        return PatchLocation(location.case, tuple(start), location.size, location.bounds)

    def _free_shift(self, table: PatchTable, row: int, rng: np.random.Generator) -> tuple[int, ...]:
        _, box = self.regions[int(table.region[row])]
        shift = []
        for start, (low, high), size, stride in zip(
            table.start[row].tolist(), box, self.patch_size, self.stride
        ):
            reach = stride // 2
            first, last = max(low, start - reach), min(high - size, start + reach)
            shift.append(int(rng.integers(first, last + 1)) - start if last > first else 0)
        return tuple(shift)

    def _location(self, table: PatchTable, row: int, shift: Sequence[int]) -> PatchLocation:
        case, box = self.regions[int(table.region[row])]
        start = tuple(int(s) + int(d) for s, d in zip(table.start[row], shift))
        return PatchLocation(case, start, self.patch_size, box)
