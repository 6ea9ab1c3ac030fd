"""The dock widget that tunes the settings of instances live on a part of a prediction."""

from __future__ import annotations

from typing import Any

from napari.qt.threading import thread_worker
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSpinBox,
    QWidget,
)

from volumen.napari_plugin.crops import Crop, CropSettings, as_flags, segment_crop
from volumen.napari_plugin.layers import PREDICTION, layer_kind
from volumen.utils.errors import VolumenError

_NONE = "(none)"
_LAYER = "instances of a part"
_PAUSE_MS = 150
"""Time without a change after which the part is segmented."""


class TuneInstances(QWidget):
    """Shows the instances of the part around the viewer's position, anew after every change of a setting.

    Args:
        napari_viewer: the viewer; napari passes it by this name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self._worker: Any = None
        self._again = False
        form = QFormLayout(self)
        self.walls, self.foreground = QComboBox(), QComboBox()
        form.addRow("walls", self.walls)
        form.addRow("foreground", self.foreground)
        self.threshold = _share(0.5, "Probability from which a voxel is wall, or foreground.")
        self.merge_threshold = _share(
            0.5, "Fragments merge while the mean wall probability between them is below this."
        )
        self.min_size, self.side = QSpinBox(), QSpinBox()
        self.min_size.setRange(0, 10**9)
        self.min_size.setToolTip("Instances of fewer voxels are removed.")
        self.side.setRange(16, 512)
        self.side.setValue(CropSettings().side)
        self.side.setToolTip("Voxels of the part per axis.")
        form.addRow("threshold", self.threshold)
        form.addRow("merge threshold", self.merge_threshold)
        form.addRow("smallest size", self.min_size)
        form.addRow("part", self.side)
        here = QPushButton("Part around the present position")
        here.clicked.connect(self.move_here)
        form.addRow(here)
        self.flags = QLineEdit()
        self.flags.setReadOnly(True)
        form.addRow("--instances", self.flags)
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.status.setTextFormat(Qt.TextFormat.PlainText)
        form.addRow(self.status)
        self._point: tuple[float, ...] | None = None
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(_PAUSE_MS)
        self._timer.timeout.connect(self.segment)
        for box in (self.threshold, self.merge_threshold, self.min_size, self.side):
            box.valueChanged.connect(self._changed)
        for choice in (self.walls, self.foreground):
            choice.currentTextChanged.connect(self._changed)
        for event in (self.viewer.layers.events.inserted, self.viewer.layers.events.removed):
            event.connect(self._show_layers)
        self._show_layers()

    def settings(self) -> CropSettings:
        """Return the content of the fields."""
        return CropSettings(
            self.threshold.value(), self.merge_threshold.value(), self.min_size.value(), self.side.value()
        )

    def move_here(self) -> None:
        """Segment the part around the viewer's present position."""
        self._point = None
        self._changed()

    def segment(self) -> None:
        """Segment the part with the present settings; while another one is being segmented, after it."""
        if self._worker is not None:
            self._again = True
            return
        walls, foreground = self._layer(self.walls), self._layer(self.foreground)
        first = walls if walls is not None else foreground
        names = [self._head(layer) for layer in (walls, foreground)]
        self.flags.setText(as_flags(self.settings(), *names) if first is not None else "")
        if first is None:
            self.status.setText("Choose a layer of walls, of foreground, or both.")
            return
        if self._point is None:
            self._point = tuple(first.world_to_data(self.viewer.dims.point)[-first.ndim :])
        arrays = [None if layer is None else _finest(layer) for layer in (walls, foreground)]
        worker = thread_worker(segment_crop)(
            *arrays, self._point, [float(size) for size in first.scale], self.settings()
        )
        worker.returned.connect(lambda crop: self._show(crop, first))
        worker.errored.connect(self._failed)
        worker.finished.connect(self._finished)
        self._worker = worker
        self.status.setText("segmenting …")
        worker.start()

    def _show(self, crop: Crop, like: Any) -> None:
        place = [t + at * s for t, at, s in zip(like.translate, crop.start, like.scale, strict=True)]
        if _LAYER in self.viewer.layers:
            layer = self.viewer.layers[_LAYER]
            layer.data = crop.labels
            layer.scale, layer.translate = like.scale, place
        else:
            options = {"units": like.units} if getattr(like, "units", None) is not None else {}
            self.viewer.add_labels(
                crop.labels,
                name=_LAYER,
                scale=like.scale,
                translate=place,
                metadata={PREDICTION: _LAYER},
                **options,
            )
        sizes = " x ".join(map(str, crop.labels.shape))
        self.status.setText(f"{crop.count} instances in {sizes} voxels from {crop.start}")

    def _failed(self, error: Exception) -> None:
        self.status.setText(str(error) if isinstance(error, VolumenError) else repr(error))

    def _finished(self) -> None:
        self._worker = None
        if self._again:
            self._again = False
            self._timer.start()

    def _changed(self, _value: Any = None) -> None:
        self._timer.start()

    def _layer(self, choice: QComboBox) -> Any | None:
        name = choice.currentText()
        return next((layer for layer in self.viewer.layers if layer.name == name), None)

    def _head(self, layer: Any | None) -> str | None:
        """Return the head that a layer shows: predicted layers are called "<image> <head>"."""
        return None if layer is None else str(layer.name).rsplit(" ", 1)[-1]

    def _show_layers(self, _event: Any = None) -> None:
        names = [
            layer.name
            for layer in self.viewer.layers
            if layer_kind(layer) == "image" and not getattr(layer, "rgb", False)
        ]
        for choice in (self.walls, self.foreground):
            chosen = choice.currentText()
            choice.blockSignals(True)
            choice.clear()
            choice.addItems([_NONE, *names])
            choice.setCurrentIndex(max(0, choice.findText(chosen)))
            choice.blockSignals(False)

    def closeEvent(self, event: Any) -> None:
        """Qt event: nothing is segmented any more."""
        self._timer.stop()
        self._again = False
        super().closeEvent(event)


def _finest(layer: Any) -> Any:
    return layer.data[0] if getattr(layer, "multiscale", False) else layer.data


def _share(value: float, tip: str) -> QDoubleSpinBox:
    box = QDoubleSpinBox()
    box.setRange(0.01, 0.99)
    box.setSingleStep(0.05)
    box.setValue(value)
    box.setToolTip(tip)
    return box
