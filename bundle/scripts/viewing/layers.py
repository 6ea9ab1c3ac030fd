"""What is shown: layers of lazy volumes, and where to look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.data.formats.label_view import LabelView
from volumen.data.formats.volumes import HasGeometry, Region, SingleLevelError, Volume
from volumen.evaluation.cases import ScoredCase
from volumen.inference.output.file_formats.neuroglancer_state import LayerContent
from volumen.utils.errors import VolumenError

MISSED, ADDED, CONFUSED = 1, 2, 3
"""Values of a layer of errors: foreground that was not predicted, that is none, and one class for another."""
_MOST_LEVELS = 24


@dataclass(frozen=True)
class ViewLayer:
    """A layer.

    Args:
        name: its name.
        levels: the volume, the finest level first.
        content: what it shows.
        start: voxel of the first layer at which it starts, per axis.
        visible: whether it is shown at first.
    """

    name: str
    levels: tuple[Volume, ...]
    content: LayerContent
    start: tuple[int, ...]
    visible: bool = True

    @property
    def is_labels(self) -> bool:
        return self.content.kind in ("labels", "instances", "errors")


@dataclass(frozen=True)
class View:
    """Layers and the voxel of the first one in the middle of the window.

    Args:
        layers: the lowest first.
        position: voxel of the first layer, or None.
        title: a line that says what is shown.
    """

    layers: tuple[ViewLayer, ...]
    position: tuple[int, ...] | None = None
    title: str = ""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size of the first layer; 1 where it is not known."""
        first = self.layers[0].levels[0]
        return first.spacing or (1.0,) * len(first.shape)

    @property
    def unit(self) -> str | None:
        return self.layers[0].levels[0].unit


class ErrorVolume(HasGeometry):
    """The errors of a case, computed region by region: `MISSED`, `ADDED`, `CONFUSED`, else 0.

    Args:
        case: a prediction of labels, and its truth.
        threshold: foreground from this probability on.
    """

    def __init__(self, case: ScoredCase, threshold: float) -> None:
        prediction = case.prediction
        self._case, self._threshold = case, threshold
        self.path = self.source = f"{prediction.path} errors"
        self.shape, self.channels, self.dtype = prediction.shape, 1, np.dtype(np.uint8)
        self.geometry, self.chunks, self.affine = prediction.geometry, prediction.chunks, prediction.affine

    def fingerprint(self) -> str:
        """Return a hash of the prediction and of the label."""
        return f"{self._case.prediction.fingerprint()} {self._case.label.fingerprint()}"

    def read(self, region: Region) -> np.ndarray:
        """Return (1, *region shape)."""
        found, truth, known = self._case.read(region)
        if self._case.kind == "multiclass":
            predicted = found.argmax(0) if len(found) > 1 else found[0]
            true = truth.argmax(0) if len(truth) > 1 else truth[0]
            differs = true != predicted
        else:
            level = self._threshold if self._case.scale else 0.5
            # Where channels overlap, such as a tumour in an organ, one of them may be wrong within the other.
            differs = ((found >= level) != (truth > 0)).any(0)
            predicted, true = (found >= level).any(0), (truth > 0).any(0)
        errors = np.zeros(known.shape, np.uint8)
        errors[(true != 0) & (predicted == 0)] = MISSED
        errors[(true == 0) & (predicted != 0)] = ADDED
        errors[(true != 0) & (predicted != 0) & differs] = CONFUSED
        errors[~known] = 0
        return errors[None]


class ClassMap(LabelView):
    """A label of overlapping channels, such as regions, as one label map: 1, 2, ... by channel, later ones on top.

    Args:
        volume: a label of several channels, each 0 or 1; other values are unknown and shown as 0.
    """

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume, 1)
        self.dtype = np.dtype(np.uint16)

    def read(self, region: Region) -> np.ndarray:
        """Return (1, *region shape)."""
        stored = self.volume.read(region)
        found = np.zeros((1, *stored.shape[1:]), np.uint16)
        for number, channel in enumerate(stored, 1):
            found[0][channel == 1] = number
        return found


def levels_of(volume: Volume) -> tuple[Volume, ...]:
    """Return a volume with its coarser levels, as far as its format has them."""
    from volumen.data.formats.opening import open_volume

    levels = [volume]
    try:
        while len(levels) < _MOST_LEVELS:
            coarser = open_volume(volume.source, level=len(levels), ndim=len(volume.shape))
            if coarser.channels != volume.channels or coarser.shape == levels[-1].shape:
                break
            levels.append(coarser)
    except (SingleLevelError, VolumenError):
        pass
    return tuple(levels)


def start_of(volume: Volume, first: Volume) -> tuple[int, ...]:
    """Return the voxel of another volume at which a volume starts; 0 where a place is not known."""
    one, other = first.geometry, volume.geometry
    if not (one.is_placed and other.is_placed) or one.frame != other.frame or not one.same_spacing(other):
        return (0,) * len(first.shape)
    return tuple(round(value) for value in one.shift(other))


def layer_of(
    name: str,
    volume: Volume,
    kind: str,
    first: Volume | None = None,
    *,
    visible: bool = True,
    coarser: Sequence[Volume] | None = None,
) -> ViewLayer:
    """Return the layer of a volume.

    Args:
        name: its name.
        volume: the volume.
        kind: see `LayerContent`.
        first: the volume of the first layer; None: this one.
        visible: whether it is shown at first.
        coarser: its coarser levels; None: those in its file.
    """
    if kind == "labels" and volume.channels > 1:
        volume, coarser = ClassMap(volume), ()
    levels = levels_of(volume) if coarser is None else (volume, *coarser)
    largest = 255.0 if volume.dtype == np.uint8 else 1.0
    start = (0,) * len(volume.shape) if first is None else start_of(volume, first)
    return ViewLayer(name, levels, LayerContent(kind, volume.channels, largest), start, visible)
