"""The dock widget: trains on the open layers, shows the loss, stops a job, predicts into new layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from napari.qt.threading import thread_worker
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QFormLayout,
    QGroupBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from volumen.napari_plugin.chart import Chart
from volumen.napari_plugin.jobs import Event, Job, free_name
from volumen.napari_plugin.layers import describe, is_prediction, layer_kind, take, trainable_layers
from volumen.napari_plugin.results import read_prediction
from volumen.napari_plugin.session import (
    ALSO,
    FINETUNE,
    NEW,
    RESUME,
    Progress,
    TrainingForm,
    fields_of,
)
from volumen.utils.errors import VolumenError

_STARTS = {
    NEW: "a new model",
    RESUME: "go on with the run of this name",
    FINETUNE: "the weights of the model below",
}
_SAVED_AS = {"labels": "labels", "uint8": "probabilities"}


class TrainAndPredict(QScrollArea):
    """Trains on Image layers and Labels layers named `<image>_<target>`, and predicts Image layers.

    Args:
        napari_viewer: the viewer; napari passes it by this name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.progress = Progress()
        self._worker: Any = None
        self._image: Any = None
        inside = QWidget()
        column = QVBoxLayout(inside)
        column.setContentsMargins(8, 8, 8, 8)
        column.addWidget(self._training_box())
        column.addWidget(self._progress_box(), 1)
        column.addWidget(self._prediction_box())
        self.setWidget(inside)
        self.setWidgetResizable(True)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setMinimumWidth(340)
        self._current = _Current()
        for event in (self.viewer.layers.events.inserted, self.viewer.layers.events.removed):
            event.connect(self._watch_layers)
        # A method of this object would no longer be called.
        self.destroyed.connect(self._current.stop)
        self._watch_layers()

    # -- building ----------------------------------------------------------------------------------------------

    def _training_box(self) -> QGroupBox:
        box = QGroupBox("Train")
        form = _form(box)
        self.data = QLabel()
        self.data.setWordWrap(True)
        self.data.setTextFormat(Qt.TextFormat.PlainText)
        form.addRow(self.data)
        self.output = QLineEdit(str(Path.home() / "volumen"))
        form.addRow("output folder", self._with_button(self.output, self._browse_output))
        self.model_name = QLineEdit("model")
        form.addRow("name", self.model_name)
        self.start = QComboBox()
        for key, text in _STARTS.items():
            self.start.addItem(text, key)
        form.addRow("start from", self.start)
        self.epochs = _spin(1, 100_000, 100)
        self.steps = _spin(1, 100_000, 50)
        form.addRow("epochs", self.epochs)
        form.addRow("steps per epoch", self.steps)
        self.batch_size = _spin(1, 1024, 2)
        form.addRow("patches per step", self.batch_size)
        self.patch_size = QLineEdit()
        self.patch_size.setPlaceholderText("Z,Y,X in voxels, or 20um; empty: by the data")
        form.addRow("patch size", self.patch_size)
        ticks = QHBoxLayout()
        self.also = {key: QCheckBox(key) for key in ALSO}
        for tick in self.also.values():
            tick.setToolTip("Learned beside every labelled target, and derived from it.")
            ticks.addWidget(tick)
        ticks.addStretch()
        form.addRow("learn also", ticks)
        self.experiment = QLineEdit()
        self.experiment.setPlaceholderText("YAML; optional")
        self.experiment.editingFinished.connect(self._read_experiment)
        form.addRow("experiment file", self._with_button(self.experiment, self._browse_experiment))
        self.device = QComboBox()
        self.device.setEditable(True)
        self.device.addItems(["auto", "cpu", "cuda"])
        form.addRow("device", self.device)
        self.train_button = QPushButton("Train")
        self.train_button.clicked.connect(self.train)
        form.addRow(self.train_button)
        return box

    def _progress_box(self) -> QGroupBox:
        box = QGroupBox("Progress")
        column = QVBoxLayout(box)
        self.chart = Chart()
        column.addWidget(self.chart, 1)
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(8)
        column.addWidget(self.bar)
        self.status = QLabel("Nothing is running.")
        self.status.setWordWrap(True)
        self.status.setTextFormat(Qt.TextFormat.PlainText)
        self.status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        column.addWidget(self.status)
        self.stop_button = QPushButton("Stop and save")
        self.stop_button.setEnabled(False)
        self.stop_button.clicked.connect(self.stop)
        column.addWidget(self.stop_button)
        return box

    def _prediction_box(self) -> QGroupBox:
        box = QGroupBox("Predict")
        form = _form(box)
        self.checkpoint = QLineEdit()
        self.checkpoint.setPlaceholderText(".pth file; a training fills it in")
        form.addRow("model", self._with_button(self.checkpoint, self._browse_checkpoint))
        self.image = QComboBox()
        form.addRow("image layer", self.image)
        self.targets = QLineEdit()
        self.targets.setPlaceholderText("by commas; empty: all")
        form.addRow("targets", self.targets)
        self.saved_as = QComboBox()
        for key, text in _SAVED_AS.items():
            self.saved_as.addItem(text, key)
        form.addRow("classes as", self.saved_as)
        self.instances = QLineEdit()
        self.instances.setPlaceholderText("such as membrane, or foreground=cell; empty: none")
        self.instances.setToolTip(
            "As volumen predict --instances; the widget Tune instances finds the settings."
        )
        form.addRow("instances", self.instances)
        self.overlap = QDoubleSpinBox()
        self.overlap.setRange(0, 0.9)
        self.overlap.setSingleStep(0.05)
        self.overlap.setValue(0.25)
        self.overlap.setToolTip("Share of a window that the next one covers: more is smoother and slower.")
        form.addRow("overlap", self.overlap)
        self.predict_button = QPushButton("Predict")
        self.predict_button.clicked.connect(self.predict)
        form.addRow(self.predict_button)
        return box

    def _with_button(self, line: QLineEdit, browse: Callable[[], None]) -> QHBoxLayout:
        row = QHBoxLayout()
        button = QPushButton("…")
        button.setFixedWidth(28)
        button.clicked.connect(browse)
        row.addWidget(line)
        row.addWidget(button)
        return row

    def _browse_output(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Folder for runs", self.output.text())
        if folder:
            self.output.setText(folder)

    def _browse_experiment(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Experiment file", "", "YAML (*.yaml *.yml)")
        if path:
            self.experiment.setText(path)
            self._read_experiment()

    def _browse_checkpoint(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Trained model", self.output.text(), "Model (*.pth *.pt)")
        if path:
            self.checkpoint.setText(path)

    # -- reading -----------------------------------------------------------------------------------------------

    def _watch_layers(self, _event: Any = None) -> None:
        for layer in self.viewer.layers:
            layer.events.name.disconnect(self._show_layers)
            layer.events.name.connect(self._show_layers)
        self._show_layers()

    def _show_layers(self, _event: Any = None) -> None:
        try:
            lines = [
                f"{name} → {', '.join(targets) or 'no label'}{', within its mask' if masked else ''}"
                for name, targets, masked in describe(self.viewer)
            ]
        except VolumenError as error:
            lines = [str(error).removeprefix("napari: ")]
        self.data.setText("\n".join(lines))
        chosen = self.image.currentText()
        self.image.clear()
        self.image.addItems(
            [
                layer.name
                for layer in self.viewer.layers
                if layer_kind(layer) == "image" and not is_prediction(layer)
            ]
        )
        self.image.setCurrentIndex(max(0, self.image.findText(chosen)))

    def _read_experiment(self) -> None:
        if not self.experiment.text().strip():
            return
        from volumen.config.experiment_file import read_experiment

        try:
            found = fields_of(read_experiment(self.experiment.text().strip()))
        except (VolumenError, OSError) as error:
            self.status.setText(str(error))
            return
        for name, value in found.items():
            field = getattr(self, name)
            if isinstance(field, QSpinBox):
                field.setValue(int(value))
            else:
                field.setText(str(value))

    def form(self) -> TrainingForm:
        """Return the content of the fields of the training part."""
        return TrainingForm(
            output=self.output.text().strip(),
            model_name=self.model_name.text(),
            start=self.start.currentData(),
            checkpoint=self.checkpoint.text().strip(),
            epochs=self.epochs.value(),
            steps=self.steps.value(),
            batch_size=self.batch_size.value(),
            patch_size=self.patch_size.text(),
            also=tuple(key for key, tick in self.also.items() if tick.isChecked()),
            experiment=self.experiment.text(),
            device=self.device.currentText().strip() or "auto",
        )

    # -- running -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Start training on the open layers."""
        form = self.form()
        try:
            labelled = sorted({target for _, targets, _ in describe(self.viewer) for target in targets})
            settings = form.settings(labelled)
        except (VolumenError, OSError) as error:
            self.status.setText(str(error))
            return
        layers = take(trainable_layers(self.viewer))
        job = Job("train", layers, form.output, {"settings": settings, "device": form.device})
        self._begin(job, self._trained)

    def predict(self) -> None:
        """Start the prediction of the chosen image layer."""
        checkpoint, name = self.checkpoint.text().strip(), self.image.currentText()
        if not Path(checkpoint).is_file() or name not in self.viewer.layers:
            what = "Choose a model (.pth) to predict with." if name else "Open an image to predict."
            self.status.setText(what)
            return
        self._image = self.viewer.layers[name]
        (layer,) = take([self._image])
        folder = Path(self.output.text().strip() or tempfile.gettempdir()) / "predictions"
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
        options = {
            "checkpoint": checkpoint,
            "target": str(folder / f"{free_name(folder, safe, suffix='.zarr')}.zarr"),
            "axes": layer.axes,
            "targets": [part.strip() for part in self.targets.text().split(",") if part.strip()],
            "overlap": self.overlap.value(),
            "dtype": self.saved_as.currentData(),
            "instances": self.instances.text().strip(),
            "device": self.device.currentText().strip() or "auto",
        }
        self._begin(Job("predict", [layer], folder, options), self._predicted)

    def stop(self) -> None:
        """Stop the running job: the first press saves, the second does not wait."""
        if self._current.job is not None:
            self._current.stop()
            self.status.setText("Finishing this step and saving; press again to leave at once.")
            self.stop_button.setText("Stop at once")

    def _begin(self, job: Job, then: Callable[[], None]) -> None:
        self._current.job, self.progress = job, Progress()
        self._running(True)
        if job.task == "train":
            self.chart.show_curves([], [], "")
        worker = thread_worker(job.events)()
        worker.yielded.connect(self._take)
        worker.finished.connect(lambda: self._end(then))
        worker.errored.connect(lambda error: self.progress.take({"event": "failed", "message": repr(error)}))
        worker.start()
        self._worker = worker

    def _take(self, event: Event) -> None:
        self.progress.take(event)
        self.bar.setValue(round(1000 * self.progress.share))
        self.status.setText(self.progress.text)
        if event["event"] in ("step", "epoch"):
            self.chart.show_curves(self.progress.losses, self.progress.scores, self.progress.score_name)

    def _end(self, then: Callable[[], None]) -> None:
        self._current.job = self._worker = None
        self._running(False)
        then()

    def _running(self, running: bool) -> None:
        self.train_button.setEnabled(not running)
        self.predict_button.setEnabled(not running)
        self.stop_button.setEnabled(running)
        self.stop_button.setText("Stop and save")
        self.bar.setValue(0)

    def _trained(self) -> None:
        progress = self.progress
        if progress.checkpoint:
            self.checkpoint.setText(progress.checkpoint)
        if progress.state == "failed":
            self.status.setText(progress.text)
        elif progress.state == "stopped":
            self.status.setText(
                f"Stopped. The run is in {progress.run}." if progress.checkpoint else "Stopped."
            )
        else:
            self.status.setText(f"Trained. The model is {progress.checkpoint}.")

    def _predicted(self) -> None:
        progress = self.progress
        if progress.state != "done":
            self.status.setText(progress.text if progress.state == "failed" else "Stopped.")
            return
        image = self._image
        spatial = 2 if len(take([image])[0].axes.replace("c", "")) == 2 else 3
        layers = read_prediction(
            progress.path,
            image.name,
            progress.kinds,
            scale=list(image.scale[-spatial:]),
            translate=list(image.translate[-spatial:]),
            units=list(image.units[-spatial:]) if getattr(image, "units", None) is not None else None,
        )
        for data, options, kind in layers:
            getattr(self.viewer, f"add_{kind}")(data, **options)
        notes = "".join(f"\n{line}" for line in progress.warnings[:3])
        self.status.setText(f"Predicted: {progress.path}{notes}")

    def closeEvent(self, event: Any) -> None:
        """Qt event: the running job is stopped and saved."""
        self._current.stop()
        super().closeEvent(event)


class _Current:
    """The running job, if any; it outlives the widget."""

    def __init__(self) -> None:
        self.job: Job | None = None

    def stop(self) -> None:
        """Stop the running job."""
        if self.job is not None:
            self.job.stop()


def _form(box: QGroupBox) -> QFormLayout:
    form = QFormLayout(box)
    form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
    form.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
    form.setContentsMargins(8, 8, 8, 8)
    form.setVerticalSpacing(4)
    return form


def _spin(low: int, high: int, value: int) -> QSpinBox:
    spin = QSpinBox()
    spin.setRange(low, high)
    spin.setValue(value)
    spin.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
    return spin
