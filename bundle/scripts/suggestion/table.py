"""The table of candidate boxes of a volume: exact sums over the stored prediction, the image and the labels.

The entropy of a voxel is 0 where a network is certain, and 1 where all classes are equally probable: of a softmax
-sum p log p / log C, of a sigmoid the entropy of p and 1 - p in bits, of several sigmoids their mean. Probabilities are
those that were stored, in steps of 1/255, and all sums are sums of integers, so that a table does not depend on the
blocks in which it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.data.formats.volumes import Volume
from volumen.data.index.cells import cell_totals
from volumen.suggestion.grid import BoxGrid
from volumen.suggestion.labelled import LabelledImage
from volumen.suggestion.subject import FULL, Subject
from volumen.transforms.normalize import Normalizer

UNIT = 1 << 16
"""The integer that stands for an entropy of 1."""
_STEP = 1 << 14
"""Steps of a normalised intensity of 1."""
_LARGEST = 16
"""Normalised intensities beyond this are cut, so that sums of squares fit in 63 bits."""
BLOCK_VOXELS = 1 << 21

Tables = dict[str, np.ndarray]


@dataclass(frozen=True)
class BoxTable:
    """Sums over the candidate boxes of a volume.

    Args:
        corners: first voxel of each box, (N, D).
        extent: voxels of a box per axis.
        known: labelled voxels by target, (N,).
        constant: voxels in cells where the image is constant, (N,).
        entropy: by target, sum of entropies in `UNIT`, (N,).
        class_entropy: by target and channel, sum of entropy times probability, (channels, N).
        probability: by target and channel, sum of probabilities, of which 255 is 1, (channels, N).
        intensity: per image channel, sums of normalised intensities and of their squares, (2, channels, N).
    """

    corners: np.ndarray
    extent: tuple[int, ...]
    known: Tables
    constant: np.ndarray
    entropy: Tables
    class_entropy: Tables
    probability: Tables
    intensity: np.ndarray

    @property
    def voxels(self) -> int:
        """Voxels of a box."""
        return int(np.prod(self.extent))

    def share_known(self, target: str) -> np.ndarray:
        """Return the labelled share of each box."""
        return self.known[target] / self.voxels

    def mean_entropy(self, target: str) -> np.ndarray:
        """Return the mean entropy of each box, 0 to 1."""
        return self.entropy[target] / (UNIT * self.voxels)

    def mean_class_entropy(self, target: str) -> np.ndarray:
        """Return the mean of entropy times probability of each channel, (channels, N)."""
        return self.class_entropy[target] / (UNIT * FULL * self.voxels)

    def share(self, target: str) -> np.ndarray:
        """Return the mean probability of each channel, (channels, N)."""
        return self.probability[target] / (FULL * self.voxels)

    def image_features(self) -> np.ndarray:
        """Return mean and standard deviation of the normalised image per channel, (2 channels, N)."""
        mean = self.intensity[0] / (_STEP * self.voxels)
        square = self.intensity[1] / (_STEP * _STEP * self.voxels)
        return np.concatenate([mean, np.sqrt(np.maximum(square - mean * mean, 0))])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the table as named arrays, for `from_arrays`."""
        named = {"corners": self.corners, "constant": self.constant, "intensity": self.intensity}
        for kind in ("known", "entropy", "class_entropy", "probability"):
            named.update({f"{kind}/{target}": array for target, array in getattr(self, kind).items()})
        return named

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], extent: tuple[int, ...]) -> BoxTable:
        """Return the table of named arrays."""
        by_kind: dict[str, Tables] = {"known": {}, "entropy": {}, "class_entropy": {}, "probability": {}}
        for key, array in arrays.items():
            kind, separator, target = key.partition("/")
            if separator:
                by_kind[kind][target] = array
        return cls(
            arrays["corners"], extent, by_kind["known"], arrays["constant"], by_kind["entropy"],
            by_kind["class_entropy"], by_kind["probability"], arrays["intensity"],
        )  # fmt: skip


def measure(
    volume: LabelledImage,
    predicted: Mapping[str, Volume],
    subjects: Sequence[Subject],
    normalizer: Normalizer,
    size: tuple[int, ...],
    *,
    block_voxels: int = BLOCK_VOXELS,
    progress: Callable[[int, int], None] | None = None,
) -> BoxTable:
    """Stream the prediction of a volume, its image and its labels into the table of its boxes.

    The table has about 100 bytes per cell, of which there are eight per box in 3D: 30 MB for 2000^3 voxels and boxes
    of 64^3. All else is a few blocks of `block_voxels`.

    Args:
        volume: image and labels.
        predicted: probabilities by target as stored, uint8 (channels of the head, *space).
        subjects: the targets.
        normalizer: of the network.
        size: voxels of a box per axis.
        block_voxels: voxels that are read at once, at least a cell.
        progress: called with the blocks done and all blocks.
    """
    grid = BoxGrid(volume.image.shape, size)
    cells: dict[str, Any] = {}
    blocks = list(grid.blocks(block_voxels))
    to_network = _features_normalizer(normalizer, volume.image)
    for number, block in enumerate(blocks):
        region = grid.region(block)
        cuts = grid.cuts(region)
        for key, sums in _measured(volume, predicted, subjects, to_network, region, cuts):
            if key not in cells:
                cells[key] = np.zeros((*sums.shape[: sums.ndim - len(cuts)], *grid.cells), np.int64)
            cells[key][(..., *block)] = sums
        if progress is not None:
            progress(number + 1, len(blocks))
    boxes = {key: grid.box_sums(array) for key, array in cells.items()}
    return BoxTable.from_arrays({**boxes, "corners": grid.corners()}, grid.extent)


def _measured(
    volume: LabelledImage,
    predicted: Mapping[str, Volume],
    subjects: Sequence[Subject],
    normalize: Callable[[np.ndarray], np.ndarray],
    region: tuple[slice, ...],
    cuts: list[Any],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the sums of a block by name, (..., *cells of the block)."""
    image = volume.image.read(region)
    extent = [np.diff(cut.bounds) for cut in cuts]
    voxels = _outer(extent)
    yield "constant", np.where(_is_constant(image, cuts), voxels, 0)
    steps = np.clip(np.nan_to_num(normalize(image)), -_LARGEST, _LARGEST)
    # A float32 holds these integers exactly.
    whole = np.rint(steps * np.float32(_STEP)).astype(np.int64)
    yield "intensity", np.stack([_per_channel(whole, cuts), _per_channel(whole * whole, cuts)])
    for subject in subjects:
        _, known = volume.labels[subject.name].read(region)
        yield f"known/{subject.name}", cell_totals(known.view(np.uint8), cuts)
        stored = predicted[subject.name].read(region)
        total, of_class = entropies(stored, subject)
        yield f"entropy/{subject.name}", cell_totals(total, cuts)
        yield f"class_entropy/{subject.name}", _per_channel(of_class, cuts)
        yield f"probability/{subject.name}", _per_channel(stored, cuts)


def entropies(stored: np.ndarray, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Return the entropy of each voxel, and for each channel an entropy times its probability.

    Args:
        stored: probabilities uint8 (channels, *space), 255 is 1.
        subject: the target.

    Returns:
        int64 (*space) in `UNIT`, and int64 (channels, *space) in `UNIT` times 255. For a softmax the latter multiplies
        the voxel's entropy, for sigmoids that of the channel itself.
    """
    if subject.head.activation == "softmax":
        total = _SOFTMAX[stored].sum(axis=0)
        entropy = np.rint(total * (UNIT / (_FINE * np.log(len(stored))))).astype(np.int64)
        return entropy, entropy * stored.astype(np.int64)
    own = _SIGMOID[stored]
    return own.sum(axis=0) // len(own), own * stored.astype(np.int64)


def _p_log_p() -> np.ndarray:
    p = np.arange(FULL + 1) / FULL
    return -p * np.log(np.where(p > 0, p, 1.0))


_FINE = 1 << 32
_SOFTMAX = np.rint(_p_log_p() * _FINE).astype(np.int64)
_SIGMOID = np.rint((_p_log_p() + _p_log_p()[::-1]) / np.log(2) * UNIT).astype(np.int64)


def _per_channel(values: np.ndarray, cuts: list[Any]) -> np.ndarray:
    return np.stack([cell_totals(channel, cuts) for channel in values])


def _is_constant(image: np.ndarray, cuts: list[Any]) -> np.ndarray:
    """Return the cells in which every channel has a single value, as a volume's padding has."""
    same = [
        cell_totals(channel, cuts, np.minimum) == cell_totals(channel, cuts, np.maximum)
        for channel in np.nan_to_num(image)
    ]
    return np.asarray(np.all(same, axis=0))


def _outer(widths: Sequence[np.ndarray]) -> np.ndarray:
    """Return the voxels of each cell from the widths of the cells per axis."""
    product = np.ones((), np.int64)
    for width in widths:
        product = product[..., None] * width
    return product


def _features_normalizer(normalizer: Normalizer, image: Volume) -> Callable[[np.ndarray], np.ndarray]:
    """Return the normaliser of the network, or, where that leaves integers as they are, one by their type."""
    if normalizer.scheme == "none" and np.dtype(image.dtype).kind in "iu":
        return Normalizer("unit")
    return normalizer.for_volume(image)
