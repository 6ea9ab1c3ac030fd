"""The dock widget in a real Qt, offscreen; the jobs it starts are played."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from conftest import ROOT
from data_folders import image_of, shells

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
pytest.importorskip("napari")
pytest.importorskip("qtpy.QtWidgets")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def application():
    from qtpy.QtWidgets import QApplication

    return QApplication.instance() or QApplication([])


@pytest.fixture
def viewer():
    """napari's own model of a viewer: layers, names and events, without a canvas, which needs OpenGL."""
    from napari.components import ViewerModel

    label = shells((24, 24, 64))
    viewer = ViewerModel()
    viewer.add_image(image_of(label), name="scroll", scale=(2, 1, 1), translate=(0, 5, 0), units=("um",) * 3)
    viewer.add_labels(label, name="scroll_surface", scale=(2, 1, 1))
    return viewer


@pytest.fixture
def widget(application, viewer, tmp_path):
    from volumen.napari_plugin.widget import TrainAndPredict

    widget = TrainAndPredict(viewer)
    widget.output.setText(str(tmp_path / "out"))
    yield widget
    widget.close()


def wait(application, widget, seconds=60.0):
    end = time.monotonic() + seconds
    while not widget.train_button.isEnabled() and time.monotonic() < end:
        application.processEvents()
        time.sleep(0.01)
    application.processEvents()
    assert widget.train_button.isEnabled()


def play(monkeypatch, events, hold=None):
    """Have jobs tell these events instead of running; return the jobs."""
    from volumen.napari_plugin.jobs import Job

    played = []

    def tell(self):
        played.append(self)
        yield from events
        while hold is not None and not self._stopped:
            time.sleep(0.01)
        if hold is not None:
            yield hold

    monkeypatch.setattr(Job, "events", tell)
    return played


def test_what_the_manifest_names_is_there():
    npe2 = pytest.importorskip("npe2")
    manifest = npe2.PluginManifest.from_file(ROOT / "bundle" / "scripts" / "napari_plugin" / "napari.yaml")
    manifest.validate_imports()
    assert manifest.contributions.widgets[0].display_name == "Train and predict"


def test_layers_are_followed(widget, viewer):
    assert widget.data.text() == "scroll → surface"
    viewer.add_labels(np.ones((24, 24, 64), np.uint8), name="mask of it")
    viewer.layers["mask of it"].name = "scroll_mask"
    assert widget.data.text() == "scroll → surface, within its mask"
    del viewer.layers["scroll_surface"]
    assert "add one named, say, scroll_surface" in widget.data.text()
    assert [widget.image.itemText(number) for number in range(widget.image.count())] == ["scroll"]


def test_a_training_is_shown_and_its_model_filled_in(application, widget, tmp_path, monkeypatch):
    run = tmp_path / "out" / "model"
    run.mkdir(parents=True)
    (run / "model_best.pth").write_text("")
    step = {"event": "step", "epoch": 1, "epochs": 2, "step": 1, "steps": 1, "loss": 0.5}
    jobs = play(
        monkeypatch,
        [
            {"event": "started", "run": str(run)},
            step,
            {"event": "epoch", "epoch": 1, "epochs": 2, "numbers": {"val/mean_dice": 0.7}},
            {**step, "epoch": 2, "loss": 0.25},
            {"event": "done", "path": str(run)},
        ],
    )
    widget.also["normals"].setChecked(True)
    widget.epochs.setValue(2)
    widget.train()
    assert not widget.train_button.isEnabled()
    wait(application, widget)
    settings = jobs[0].options["settings"]
    assert settings["tr_config"]["max_epoch"] == 2
    assert settings["tr_setup"]["model_name"] == "model_2", "the earlier run of this name stays"
    assert set(settings["auxiliary_tasks"]) == {"surface_normals"}
    assert widget.chart.losses == [(1.0, 0.5), (2.0, 0.25)]
    assert widget.checkpoint.text() == str(run / "model_best.pth")
    assert widget.status.text().startswith("Trained.")
    widget.chart.resize(300, 200)
    assert not widget.chart.grab().isNull()


def test_stop_reaches_the_job(application, widget, monkeypatch):
    play(monkeypatch, [], hold={"event": "stopped"})
    widget.train()
    widget.stop()
    wait(application, widget)
    assert widget.status.text() == "Stopped."
    assert widget.stop_button.text() == "Stop and save"


def test_a_mistake_is_told_and_nothing_starts(widget, viewer, monkeypatch):
    jobs = play(monkeypatch, [])
    widget.patch_size.setText("large")
    widget.train()
    assert "--patch-size" in widget.status.text()
    widget.predict()
    assert widget.status.text() == "Choose a model (.pth) to predict with."
    assert jobs == []


def test_a_prediction_becomes_layers_in_place(application, widget, viewer, tmp_path, monkeypatch):
    import zarr

    checkpoint = tmp_path / "m.pth"
    checkpoint.write_text("")
    group = zarr.open_group(tmp_path / "p.zarr", mode="w")
    group.create_array("surface/0", data=shells((24, 24, 64)))
    group.create_array("normals/0", data=np.zeros((3, 24, 24, 64), np.float16))
    jobs = play(
        monkeypatch,
        [
            {"event": "heads", "kinds": {"surface": "binary", "normals": "vector"}},
            {"event": "progress", "done": 1, "total": 1},
            {"event": "done", "path": str(tmp_path / "p.zarr")},
        ],
    )
    widget.checkpoint.setText(str(checkpoint))
    widget.targets.setText("surface, normals")
    widget.predict()
    wait(application, widget)
    assert jobs[0].options["targets"] == ["surface", "normals"]
    assert jobs[0].options["axes"] == "zyx"
    shown = viewer.layers["scroll surface"]
    assert type(shown).__name__ == "Labels"
    for layer in list(viewer.layers)[2:]:
        assert tuple(layer.scale) == (2, 1, 1)
        assert tuple(layer.translate) == (0, 5, 0)
        assert [str(unit) for unit in layer.units] == ["micrometer"] * 3
    (sent,) = jobs[0].layers
    assert (sent.scale, sent.unit) == ((2.0, 1.0, 1.0), "micrometer")
    assert [layer.name for layer in viewer.layers][2:] == [
        "scroll surface", "scroll normals x", "scroll normals y", "scroll normals z",
    ]  # fmt: skip
    assert widget.data.text() == "scroll → surface", "a prediction is no label"
    assert widget.image.count() == 1


def test_closing_stops_what_runs(application, widget, monkeypatch):
    jobs = play(monkeypatch, [], hold={"event": "stopped"})
    widget.train()
    application.processEvents()
    widget.close()
    wait(application, widget)
    assert jobs[0]._stopped


def test_curves_of_any_kind_are_drawn(application):
    from volumen.napari_plugin.chart import Chart, smooth, thinned, ticks

    chart = Chart()
    for losses in ([], [(0.1, 1.0)], [(0.1, -1.0), (0.2, 3.0)], [(x / 10, 2.0**-x) for x in range(1, 40)]):
        chart.show_curves(losses, [(1.0, 0.5)] if losses else [], "dice")
        assert not chart.grab().isNull()
    constant = [(float(x), 3.0) for x in range(50)]
    assert [y for _, y in smooth(constant)] == pytest.approx([3.0] * 50)
    assert thinned(constant, 10)[-1] == constant[-1]
    for low, high in ((0.01, 5.0), (-3.0, 2.0), (0.5, 0.6)):
        assert 1 <= len(ticks(low, high)) <= 6
        assert all(low - 0.01 <= tick <= high + 0.01 for tick in ticks(low, high))
