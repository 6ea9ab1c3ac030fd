"""The dock widget that steps through suggested boxes, saves the corrected labels and takes them back into the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QCheckBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from volumen.napari_plugin.boxes import FOLDER, RANK, TARGET, BoxSession, LayerData
from volumen.suggestion.record import SuggestedBox
from volumen.suggestion.request import AcceptRequest
from volumen.utils.errors import VolumenError


class LabelNext(QWidget):
    """Steps through the boxes of a folder of suggestions.

    The label of a box is saved when another box is shown. A box counts as painted once *painted* is ticked.

    Args:
        napari_viewer: the viewer; napari passes it by this name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.session: BoxSession | None = None
        self.number = 0
        column = QVBoxLayout(self)
        form = QFormLayout()
        self.folder = QLineEdit()
        self.folder.setPlaceholderText("-o of volumen suggest")
        self.folder.returnPressed.connect(self.open)
        form.addRow("suggestions", self._beside(self.folder, "…", self._browse))
        column.addLayout(form)
        self.text = QLabel("Open suggestions.csv, or choose the folder.")
        self.text.setWordWrap(True)
        self.text.setTextFormat(Qt.TextFormat.PlainText)
        column.addWidget(self.text)
        self.painted = QCheckBox("painted: its label is correct everywhere in the box")
        self.painted.clicked.connect(self._mark)
        column.addWidget(self.painted)
        steps = QHBoxLayout()
        self.back, self.next = QPushButton("Previous"), QPushButton("Next")
        self.back.clicked.connect(lambda: self.show_box(self.number - 1))
        self.next.clicked.connect(lambda: self.show_box(self.number + 1))
        steps.addWidget(self.back)
        steps.addWidget(self.next)
        column.addLayout(steps)
        self.output = QLineEdit()
        self.output.setPlaceholderText("new data folder; empty: beside the images")
        self.take_back = QPushButton("Take painted boxes back")
        self.take_back.clicked.connect(self.accept_painted)
        column.addWidget(self.output)
        column.addWidget(self.take_back)
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.status.setTextFormat(Qt.TextFormat.PlainText)
        column.addWidget(self.status)
        column.addStretch()
        self.setMinimumWidth(300)
        self._enable()
        self._find_folder()

    def _beside(self, line: QLineEdit, text: str, press: Any) -> QHBoxLayout:
        row = QHBoxLayout()
        button = QPushButton(text)
        button.setFixedWidth(28)
        button.clicked.connect(press)
        row.addWidget(line)
        row.addWidget(button)
        return row

    def _browse(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Folder of suggestions", self.folder.text())
        if folder:
            self.folder.setText(folder)
            self.open()

    def _find_folder(self) -> None:
        """Open the folder of the suggestions that the viewer shows already."""
        found = [layer.metadata[FOLDER] for layer in self.viewer.layers if FOLDER in layer.metadata]
        if found:
            self.folder.setText(found[0])
            self.open()

    def open(self) -> None:
        """Open the folder in the field and show the first box that is not painted."""
        try:
            self.session = BoxSession(Path(self.folder.text().strip()))
        except VolumenError as error:
            self.session = None
            self.status.setText(str(error))
            self._enable()
            return
        boxes = self.session.boxes
        first = next((n for n, box in enumerate(boxes) if not self.session.is_done(box)), 0)
        self.status.setText("")
        if boxes:
            self.show_box(first, save=self._shown() is not None)

    def show_box(self, number: int, *, save: bool = True) -> None:
        """Show a box by its place in the ranking; the label of the box before is saved first."""
        if self.session is None or not 0 <= number < len(self.session.boxes):
            return
        if save and not self.save():
            return
        for layer in [layer for layer in self.viewer.layers if FOLDER in layer.metadata]:
            self.viewer.layers.remove(layer)
        self.number = number
        box = self.session.boxes[number]
        layers = [*self.session.layers_of(box), self.session.frames(box.volume)]
        added = [self._add(layer) for layer in layers]
        labels = [layer for layer in added if TARGET in layer.metadata]
        if labels:
            self.viewer.layers.selection.active = labels[0]
        self._look_at(box)
        self.text.setText(f"Box {box.rank} of {len(self.session.boxes)}, {box.volume}: {box.reason}.")
        self.painted.setChecked(self.session.is_done(box))
        self._enable()

    def save(self) -> bool:
        """Store the labels of the shown box; return whether that was possible."""
        shown = self._shown()
        if self.session is None or shown is None:
            return True
        try:
            for layer in self.viewer.layers:
                target = layer.metadata.get(TARGET)
                if target is not None and layer.metadata[RANK] == shown.rank:
                    self.session.save(shown, target, np.asarray(layer.data))
        except (VolumenError, OSError) as error:
            self.status.setText(str(error))
            return False
        self.status.setText("")
        return True

    def accept_painted(self) -> None:
        """Take the painted boxes back into the data, as `volumen suggest --accept` does."""
        from volumen.suggestion.accept import accept

        if self.session is None or not self.save():
            return
        output = self.output.text().strip() or None
        try:
            report = accept(AcceptRequest(str(self.session.folder), self.session.data, output))
        except (VolumenError, OSError) as error:
            self.status.setText(str(error))
            return
        self.status.setText("\n".join(report.lines()))

    def _mark(self, done: bool) -> None:
        if self.session is None:
            return
        if done and not self.save():
            self.painted.setChecked(False)
            return
        self.session.mark(self.session.boxes[self.number], done)

    def _shown(self) -> SuggestedBox | None:
        """Return the box whose layers the viewer shows, if they belong to the open folder."""
        if self.session is None:
            return None
        ranks = [
            layer.metadata[RANK]
            for layer in self.viewer.layers
            if RANK in layer.metadata and layer.metadata.get(FOLDER) == str(self.session.folder)
        ]
        return next((box for box in self.session.boxes if box.rank in ranks), None)

    def _add(self, layer: LayerData) -> Any:
        data, options, kind = layer
        return getattr(self.viewer, f"add_{kind}")(data, **options)

    def _look_at(self, box: SuggestedBox) -> None:
        """Move the viewer to the middle of a box."""
        assert self.session is not None
        label = next(layer for layer in self.viewer.layers if TARGET in layer.metadata)
        middle = np.asarray(label.data_to_world([(n - 1) // 2 for n in label.data.shape]))
        self.viewer.dims.set_point(range(self.viewer.dims.ndim - len(middle), self.viewer.dims.ndim), middle)
        self.viewer.camera.center = tuple(middle[-len(box.box) :])

    def _enable(self) -> None:
        count = 0 if self.session is None else len(self.session.boxes)
        self.back.setEnabled(self.number > 0 and count > 0)
        self.next.setEnabled(self.number < count - 1)
        self.painted.setEnabled(count > 0)
        self.take_back.setEnabled(count > 0)
