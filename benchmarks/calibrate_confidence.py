# ruff: noqa: E402
"""Fit the errors that the confidence of derived targets states, on labels that are known everywhere.

    python benchmarks/calibrate_confidence.py [--labels LABELS.tif ...] [--size 112] [--types TYPE ...]

Labels are hidden except in slabs of 5 slices in 16, 8 in 16 and 12 in 32, straight and oblique to the axes, and in
boxes; the estimates there are compared with the targets of the whole labels. The labels are three synthetic ones,
rolled sheets, smooth blobs and the walls of cells, and those of `--labels`, each with the same weight. For every type
it prints the constants of `volumen/derived/confidence.py` that fit best, and for the constants there, the error that
confidences state beside the one that was found. Single slices give the error within a plane (`in_plane`).
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.derived.derivation import derive_from, derive_informed_from
from volumen.derived.estimated import LEAST_PART
from volumen.derived.registry import complete_params, get_task
from volumen.derived.source_fields import SourceFields

TYPES = (
    "surface_normals",
    "structure_tensor",
    "inplane_direction",
    "nearest_component",
    "skeleton",
    "local_shape_descriptors",
)
EDGE = 10
"""Voxels at the border of the volume are left out, where targets of the whole labels are less certain themselves."""
DISTANCES = (0, 0.6, 1.6, 2.6, 4, 6, 9, 17)
CLEARANCES = (0, 0.6, 1.6, 2.6, 3.6, 4.6, 6.6, 17)
CONFIDENCES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 1.0)
TWICE = np.array([1, 2, 2, 1, 2, 1.0])[:, None]
"""How often the entries of the upper triangle occur in a symmetric 3 x 3 matrix."""
LEAST = 200
"""Voxels in a bin below which it is left out."""


def rolled_sheets(size: int) -> np.ndarray:
    """Return sheets 4 voxels thick and 14 apart, rolled about an axis that is oblique to those of the array."""
    rng = np.random.default_rng(1)
    z, y, x = np.meshgrid(*[np.arange(size, dtype=np.float32) - size / 2] * 3, indexing="ij")
    wave = gaussian_filter(rng.normal(size=(size,) * 3).astype(np.float32), 8) * 50
    y, x = y + 0.35 * z, x - 0.2 * z + size / 8
    turn = np.arctan2(y, x) / (2 * np.pi)
    return np.mod((np.hypot(y, x) + wave) / 14 - turn, 1) < 0.28


def blobs(size: int) -> np.ndarray:
    """Return the inside of a smooth random surface."""
    return gaussian_filter(np.random.default_rng(2).normal(size=(size,) * 3), 6, mode="wrap") > 0


def cell_walls(size: int) -> np.ndarray:
    """Return walls about 2 voxels thick between warped Voronoi cells."""
    rng = np.random.default_rng(3)
    places = np.stack(np.meshgrid(*[np.arange(size, dtype=float)] * 3, indexing="ij"), axis=-1)
    warp = [gaussian_filter(rng.normal(size=(size,) * 3), 5, mode="wrap") for _ in range(3)]
    places += np.stack([4 * field / field.std() for field in warp], axis=-1)
    centres = rng.uniform(-10, size + 10, size=(max(8, (size // 20) ** 3 * 2), 3))
    near, _ = cKDTree(centres).query(places.reshape(-1, 3), k=2)
    return (near[:, 1] - near[:, 0]).reshape((size,) * 3) < 2.2


def masks(shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what is labelled, by name."""
    grid = np.meshgrid(*[np.arange(size) for size in shape], indexing="ij")
    for thick, period in ((5, 16), (8, 16), (12, 32)):
        yield f"slabs {thick} of {period}", (grid[0] % period) < thick
        yield f"slabs {thick} of {period}, across x", (grid[2] % period) < thick
        slope = 0.8 * grid[0] + 0.5 * grid[1] + 0.33 * grid[2]
        yield f"slabs {thick} of {period}, oblique", (slope % period) < thick
    box = np.zeros(shape, bool)
    for start in (shape[0] // 8, shape[0] // 2):
        box[tuple(slice(start, start + size // 3) for size in shape)] = True
    yield "two boxes", box


def slices(shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield single slices in 8 along each axis, and three orthogonal planes."""
    planes = np.zeros(shape, bool)
    for axis in range(3):
        known = np.zeros(shape, bool)
        np.moveaxis(known, axis, 0)[4::8] = True
        yield f"every 8th slice, axis {axis}", known
        np.moveaxis(planes, axis, 0)[shape[axis] // 2] = True
    yield "three planes", planes


def fields_of(label: np.ndarray, known: np.ndarray | None, type_name: str, params: Mapping) -> SourceFields:
    """Return the fields of a whole label for one type."""
    task = get_task(type_name)
    return SourceFields(
        label[None].astype(np.int32),
        known=None if known is None else known[None],
        reach=params.get("reach"),
        margin=task.margin(params, (1.0, 1.0, 1.0)),
    )


def errors(type_name: str, found: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the error of each valid voxel: an angle in degrees, a relative norm, or 0 and 1."""
    found, truth = found[:, valid].astype(float), truth[:, valid].astype(float)
    if type_name in ("surface_normals", "inplane_direction", "nearest_component"):
        cosine = (found[:3] * truth[:3]).sum(axis=0) / np.maximum(np.linalg.norm(found[:3], axis=0), 1e-9)
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        return np.minimum(angle, 180 - angle) if type_name == "inplane_direction" else angle
    if type_name == "structure_tensor":
        size = (TWICE * truth**2).sum(axis=0)
        return np.sqrt((TWICE * (found - truth) ** 2).sum(axis=0) / np.maximum(size, 1e-6)).clip(0, 2)
    if type_name == "skeleton":
        return abs(found[0] - truth[0])
    spread = truth.std(axis=1, keepdims=True)
    return np.sqrt((((found - truth) / np.maximum(spread, 1e-6)) ** 2).mean(axis=0))


def plane_errors(type_name: str, found: np.ndarray, truth: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return the error of the part across the free direction: an angle, or a relative norm after the best scaling."""
    if type_name == "surface_normals":
        inside = truth - (truth * free).sum(axis=0) * free
        length = np.linalg.norm(inside, axis=0)
        cosine = (found * inside).sum(axis=0) / np.maximum(length, 1e-9)
        return np.degrees(np.arccos(np.clip(cosine, -1, 1)))[length > LEAST_PART]
    rows, columns = np.triu_indices(3)
    matrix = np.zeros((truth.shape[1], 3, 3))
    matrix[:, rows, columns] = matrix[:, columns, rows] = truth.T
    across = np.eye(3) - np.einsum("in,jn->nij", free[::-1], free[::-1])
    inside = (across @ matrix @ across)[:, rows, columns].T
    scale = (TWICE * inside * found).sum(axis=0) / np.maximum((TWICE * found**2).sum(axis=0), 1e-9)
    rest = (TWICE * (inside - scale.clip(0, 1) * found) ** 2).sum(axis=0)
    return np.sqrt(rest / np.maximum((TWICE * truth**2).sum(axis=0), 1e-6))


class Samples:
    """Distances, clearances, errors and confidences of one type, by label."""

    def __init__(self, type_name: str, labels: Mapping[str, np.ndarray]) -> None:
        self.type_name = type_name
        self.task = get_task(type_name)
        self.params = complete_params(self.task, {"reach": 16.0} if "reach" in self.task.defaults else {})
        self.params["reach"] = 16.0
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.plane: list[np.ndarray] = []
        for label in labels.values():
            truth = derive_from(fields_of(label, None, type_name, self.params), type_name, self.params)
            self._add(label, *truth)

    def _add(self, label: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> None:
        inner = np.zeros(label.shape, bool)
        inner[(slice(EDGE, -EDGE),) * 3] = True
        rows: list[tuple[np.ndarray, ...]] = []
        for _, known in masks(label.shape):
            source = fields_of(label, known, self.type_name, self.params)
            found = derive_informed_from(source, self.type_name, self.params)
            chosen = inner & known & valid[0] & (found.confidence[0] > 0) & ~found.valid[0]
            fields, classes = self.task.fields(source, None)
            distance = self.task.distance(fields, {**self.params, "classes": classes})
            clearance = self.task.clearance(source, self.params)
            wrong = errors(self.type_name, found.values, truth, chosen)
            rows.append((distance[chosen], clearance[chosen], wrong, found.confidence[0][chosen]))
        self.parts.append(tuple(np.concatenate(one) for one in zip(*rows)))
        if self.task.kind in ("vector", "tensor"):
            self._add_slices(label, truth, valid[0] & inner)

    def _add_slices(self, label: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> None:
        for _, known in slices(label.shape):
            source = fields_of(label, known, self.type_name, self.params)
            found = derive_informed_from(source, self.type_name, self.params)
            chosen = valid & (found.confidence[0] > 0) & (found.free != 0).any(axis=0)
            wrong = plane_errors(self.type_name, *(x[:, chosen] for x in (found.values, truth, found.free)))
            self.plane.append(wrong)

    def bins(self) -> Iterator[tuple[float, float, float]]:
        """Yield mean distance, mean clearance and the root mean square error of every bin, each label alike."""
        for low, high in itertools.pairwise(CLEARANCES):
            for near, far in itertools.pairwise(DISTANCES):
                cells = []
                for distance, clearance, wrong, _ in self.parts:
                    size = abs(distance)
                    chosen = (clearance >= low) & (clearance < high) & (size >= near) & (size < far)
                    if chosen.sum() >= LEAST:
                        cells.append(
                            (size[chosen].mean(), clearance[chosen].mean(), (wrong[chosen] ** 2).mean())
                        )
                if cells:
                    a, b, square = np.mean(cells, axis=0)
                    yield a, b, square**0.5

    def fit(self) -> tuple[float, float, float]:
        """Return worst, decay and margin that fit the errors of the bins best."""
        a, b, wrong = (np.array(one) for one in zip(*self.bins()))
        floor = 0.02 * wrong.max()

        def residuals(x: np.ndarray) -> np.ndarray:
            worst, decay, margin = np.exp(x)
            return np.log(worst * np.exp(-decay * b / (a + margin)) + floor) - np.log(wrong + floor)

        start = np.log([wrong.max(), 1.5, 2.0])
        return tuple(np.exp(least_squares(residuals, start, loss="soft_l1").x))

    def stated(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield per bin of confidence: its mean, the error it states, the error that was found, the share of voxels."""
        total = sum(len(part[3]) for part in self.parts)
        for low, high in itertools.pairwise(CONFIDENCES):
            cells = []
            for _, _, wrong, confidence in self.parts:
                chosen = (confidence >= low) & (confidence < high)
                if chosen.sum() >= LEAST:
                    cells.append((confidence[chosen].mean(), (wrong[chosen] ** 2).mean(), chosen.sum()))
            if cells:
                mean, square, _ = np.mean(cells, axis=0)
                count = sum(cell[2] for cell in cells)
                yield mean, self.task.calibration.stated_error(mean), square**0.5, count / total


def main() -> None:
    """Fit and compare every type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=Path, nargs="*", default=[], help="TIFF files of binary labels")
    parser.add_argument("--size", type=int, default=112, help="voxels per axis (default: 112)")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="default: all")
    options = parser.parse_args()
    labels = {make.__name__: make(options.size) for make in (rolled_sheets, blobs, cell_walls)}
    for path in options.labels:
        import tifffile

        whole = tifffile.imread(path) > 0
        labels[path.stem] = whole[tuple(slice(0, options.size) for _ in range(3))]
    for type_name in options.types:
        samples = Samples(type_name, labels)
        worst, decay, margin = samples.fit()
        plane = [(one**2).mean() for one in samples.plane if len(one)]
        print(f"{type_name}: worst {worst:.3g}, decay {decay:.3g}, margin {margin:.3g}", end="")
        print(f", in_plane {np.sqrt(np.mean(plane)):.3g}" if plane else "")
        print("  confidence  states   found   share")
        for mean, says, is_, share in samples.stated():
            print(f"  {mean:10.2f} {says:7.3g} {is_:7.3g} {share:7.1%}")


if __name__ == "__main__":
    main()
