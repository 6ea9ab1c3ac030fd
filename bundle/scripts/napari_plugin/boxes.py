"""Suggested boxes for the viewer: napari --plugin volumen SUGGESTIONS/suggestions.csv. Without Qt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Volume
from volumen.data.space.geometry import Geometry
from volumen.napari_plugin.results import read_prediction
from volumen.suggestion.crops import crop_geometry, write_volume
from volumen.suggestion.record import (
    BOXES,
    DONE,
    IMAGE,
    PREDICTIONS,
    TABLE,
    UNCERTAINTY,
    SuggestedBox,
    read_record,
)
from volumen.suggestion.to_paint import label_name
from volumen.utils.errors import VolumenError

LayerData = tuple[Any, dict[str, Any], str]

FOLDER, RANK, TARGET = "volumen_suggestions", "volumen_box", "volumen_target"
"""Keys of a layer's metadata: the folder of the suggestions, the rank of the box, the target of a label to paint."""
_OPEN, _PAINTED = "#e69f00", "#009e73"


def suggestions_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """Return what reads a `suggestions.csv` that `volumen suggest` wrote, None for any other path.

    Args:
        path: a file, or several, as napari gives them.
    """
    given = Path(path if isinstance(path, str) else path[0])
    ours = given.name == TABLE and (isinstance(path, str) or len(path) == 1)
    return (lambda _: BoxSession(given.parent).opening_layers()) if ours and given.is_file() else None


class BoxSession:
    """The boxes of a folder of suggestions: their layers, and the labels that are painted in them.

    Args:
        folder: the folder that `volumen suggest` wrote.

    Raises:
        VolumenError: it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = read_record(folder)

    @property
    def boxes(self) -> tuple[SuggestedBox, ...]:
        """The boxes in the order of their ranks."""
        return self.found.boxes

    @property
    def data(self) -> str:
        """The data folder that the suggestions are of."""
        return str(self.found.asked["data"])

    def is_done(self, box: SuggestedBox) -> bool:
        """Whether a box is marked as painted."""
        return (self._place(box) / DONE).exists()

    def mark(self, box: SuggestedBox, done: bool) -> None:
        """Mark a box as painted, or remove the mark."""
        path = self._place(box) / DONE
        if done:
            path.touch()
        else:
            path.unlink(missing_ok=True)

    def opening_layers(self) -> list[LayerData]:
        """Return the layers of the first box, below a frame around each box of its volume."""
        if not self.boxes:
            return []
        first = self.boxes[0]
        return [*self.prediction_layers(first.volume), *self.layers_of(first), self.frames(first.volume)]

    def layers_of(self, box: SuggestedBox) -> list[LayerData]:
        """Return image and uncertainty around a box, and its label of each target, in their places."""
        layers = []
        for name, options in (
            (IMAGE, {"colormap": "gray"}),
            (UNCERTAINTY, {"colormap": "inferno", "blending": "additive", "opacity": 0.5, "visible": False}),
        ):
            volume = open_volume(self._place(box) / f"{name}.zarr", ndim=len(box.box))
            layers += _image_layers(volume, f"{box.rank} {name}", options, self._metadata(box))
        for target in self.found.targets:
            label = self.label(box, target)
            shown = label if len(label) > 1 else label[0]
            options = {
                "name": f"{box.rank} {target}",
                "opacity": 0.5,
                **placed(self._geometry(box), len(box.box), len(label) > 1),
                "metadata": {**self._metadata(box), TARGET: target},
            }
            layers.append((shown, options, "labels"))
        return layers

    def prediction_layers(self, volume: str) -> list[LayerData]:
        """Return the probabilities of a whole volume, read from disk when they are displayed; hidden at first."""
        shape = self._shape(volume)
        geometry = crop_geometry(Geometry.from_plain(self.found.geometry[volume]), [0] * len(shape))
        place = placed(geometry, len(shape))
        kinds = {target: str(entry["kind"]) for target, entry in self.found.targets.items()}
        layers = read_prediction(
            self.folder / PREDICTIONS / f"{volume}.zarr",
            volume,
            kinds,
            scale=place["scale"],
            translate=place["translate"],
            units=place.get("units"),
        )
        for _, options, _ in layers:
            options["visible"] = False
            options["metadata"] = {**options["metadata"], FOLDER: str(self.folder)}
        return layers

    def frames(self, volume: str) -> LayerData:
        """Return a frame around each box of a volume, in its first, middle and last plane, with its rank."""
        boxes = [box for box in self.boxes if box.volume == volume]
        frames = [(box, frame) for box in boxes for frame in _frames(box)]
        colours = [_PAINTED if self.is_done(box) else _OPEN for box, _ in frames]
        geometry = crop_geometry(
            Geometry.from_plain(self.found.geometry[volume]), [0] * len(self._shape(volume))
        )
        options = {
            "name": f"{volume} suggested boxes",
            "shape_type": "polygon",
            "edge_color": colours,
            "face_color": "transparent",
            "edge_width": 0.5,
            "features": {
                "rank": [box.rank for box, _ in frames],
                "reason": [box.reason for box, _ in frames],
            },
            "text": "rank",
            **placed(geometry, len(self._shape(volume))),
            "metadata": {FOLDER: str(self.folder)},
        }
        return [frame for _, frame in frames], options, "shapes"

    def label(self, box: SuggestedBox, target: str) -> np.ndarray:
        """Return the label of a box as it is stored, (channels, *box)."""
        volume = open_volume(self._place(box) / f"{label_name(target)}.zarr", ndim=len(box.box), labels=True)
        return volume.read(tuple(slice(0, n) for n in volume.shape))

    def save(self, box: SuggestedBox, target: str, painted: np.ndarray) -> bool:
        """Store the painted label of a box, in the type and at the place that it had; return whether it changed.

        Args:
            box: the box.
            target: the target.
            painted: the layer's array.

        Raises:
            VolumenError: values that the target does not have, or another shape.
        """
        earlier = self.label(box, target)
        label = np.asarray(painted).reshape((-1, *np.shape(painted)[-len(box.box) :]))
        values = self.found.targets[target]["values"]
        foreign = np.setdiff1d(np.unique(label), values)
        if label.shape != earlier.shape or foreign.size:
            raise VolumenError(
                f"box {box.rank}, {target}",
                expected=f"shape {earlier.shape} and the values {', '.join(map(str, values))}",
                found=f"shape {label.shape}" if label.shape != earlier.shape else f"the value {foreign[0]}",
                remedy="paint with these values only",
            )
        if np.array_equal(label, earlier):
            return False
        geometry = Geometry.from_plain(self.found.geometry[box.volume])
        start = [first for first, _ in box.box]
        dtype = np.result_type(earlier.dtype, np.min_scalar_type(int(label.max(initial=0))))
        write_volume(self._place(box) / f"{label_name(target)}.zarr", label.astype(dtype), geometry, start)
        return True

    def _place(self, box: SuggestedBox) -> Path:
        return self.folder / BOXES / box.folder

    def _shape(self, volume: str) -> Sequence[int]:
        return self.found.shapes[volume]

    def _geometry(self, box: SuggestedBox) -> Geometry:
        return crop_geometry(Geometry.from_plain(self.found.geometry[box.volume]), [a for a, _ in box.box])

    def _metadata(self, box: SuggestedBox) -> dict[str, Any]:
        return {FOLDER: str(self.folder), RANK: box.rank}


def placed(geometry: Geometry, ndim: int, channels: bool = False) -> dict[str, Any]:
    """Return scale, translation and units of a layer with this geometry, with a channel axis before if there is one."""
    lead = int(channels)
    found: dict[str, Any] = {
        "scale": [1.0] * lead + list(geometry.spacing or (1.0,) * ndim),
        "translate": [0.0] * lead + list(geometry.origin or (0.0,) * ndim),
    }
    if geometry.unit is not None:
        # A channel has no unit; napari requires units of all axes or none.
        found["units"] = ["pixel"] * lead + [geometry.unit] * ndim
    return found


def _image_layers(
    volume: Volume, name: str, options: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[LayerData]:
    values = volume.read(tuple(slice(0, n) for n in volume.shape))
    place = {**placed(volume.geometry, len(volume.shape)), "metadata": dict(metadata)}
    names = [name] if len(values) == 1 else [f"{name} {number}" for number in range(len(values))]
    return [
        (channel, {"name": own, **options, **place}, "image")
        for own, channel in zip(names, values, strict=True)
    ]


def _frames(box: SuggestedBox) -> list[np.ndarray]:
    """Return the corners of rectangles around a box: one in 2D, three in 3D."""
    (top, bottom), (left, right) = box.box[-2:]
    corners = np.array([(top, left), (top, right), (bottom, right), (bottom, left)], float) - 0.5
    if len(box.box) == 2:
        return [corners]
    first, stop = box.box[0]
    planes = dict.fromkeys((first, (first + stop) // 2, stop - 1))
    return [np.column_stack([np.full(4, float(plane)), corners]) for plane in planes]
