"""Tuning instances on a part: the numbers without napari, the widget in napari without a screen."""

from __future__ import annotations

import numpy as np
import pytest

from volumen.inference.rules import read_rules
from volumen.napari_plugin.crops import CropSettings, as_flags, crop_around, segment_crop
from volumen.utils.errors import VolumenError

pytest.importorskip("bioimage_cpp")

SHAPE = (40, 44, 48)


def cells():
    """Return walls of two voxels between cubes, weaker between pairs of cubes along X, and foreground."""
    grids = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    walls = np.zeros(SHAPE, np.float32)
    for axis, grid in enumerate(grids):
        strength = np.where((grid + 1) // 10 % 2 == 0, 0.9, 0.6) if axis == 2 else 0.9
        walls = np.maximum(walls, np.where(np.isin(grid % 10, (0, 9)), strength, 0))
    return walls, np.ones(SHAPE, np.float32)


def test_a_part_lies_in_the_volume():
    assert crop_around((0, 20, 47), SHAPE, 16) == (slice(0, 16), slice(12, 28), slice(32, 48))
    assert crop_around((5, 5, 5), (8, 8, 8), 96) == (slice(0, 8),) * 3


def test_settings_change_what_a_part_shows():
    walls, inside = cells()
    fine = segment_crop(walls, None, (20, 20, 20), (1, 1, 1), CropSettings(side=40))
    merged = segment_crop(walls, None, (20, 20, 20), (1, 1, 1), CropSettings(merge_threshold=0.75, side=40))
    assert fine.count == 4 * 4 * 4
    assert merged.count == 4 * 4 * 2
    assert fine.start == (0, 0, 0)
    eight_bits = segment_crop(
        np.rint(walls * 255).astype(np.uint8), None, (20,) * 3, (1,) * 3, CropSettings(side=40)
    )
    np.testing.assert_array_equal(eight_bits.labels, fine.labels)
    both = segment_crop(walls, inside, (20,) * 3, (1,) * 3, CropSettings(side=40))
    assert both.count == fine.count
    with pytest.raises(VolumenError, match="layer of walls, of foreground, or both"):
        segment_crop(None, None, (0,) * 3, (1,) * 3, CropSettings())
    with pytest.raises(VolumenError, match="layers of one shape"):
        segment_crop(walls, inside[:9], (0,) * 3, (1,) * 3, CropSettings())


def test_a_part_of_the_whole_size_is_what_predict_writes():
    from volumen.inference.postprocess.graph.sources import Source
    from volumen.inference.postprocess.graph.volume import instances_of

    walls, _ = cells()
    text = as_flags(CropSettings(0.4, 0.7, 30), "membrane", None)
    rules = read_rules(text)
    assert (rules.threshold, rules.merge_threshold, rules.min_size) == (0.4, 0.7, 30)
    expected = instances_of({"membrane": walls[None]}, Source(rules, (2.0, 1.0, 1.0)))
    found = segment_crop(walls, None, (20,) * 3, (2.0, 1.0, 1.0), CropSettings(0.4, 0.7, 30, 512))
    assert found.count == expected.max() > 1
    np.testing.assert_array_equal(found.labels, expected)


def test_small_instances_are_removed():
    walls, _ = cells()
    every = segment_crop(walls, None, (20,) * 3, (1,) * 3, CropSettings(side=512))
    sizes = np.bincount(every.labels.reshape(-1))[1:]
    least = int(sizes.max())
    assert sizes.min() < least
    found = segment_crop(walls, None, (20,) * 3, (1,) * 3, CropSettings(min_size=least, side=512))
    assert 0 < found.count == (sizes >= least).sum() < every.count
    assert np.bincount(found.labels.reshape(-1))[1:].min() >= least


def test_the_widget_shows_the_part_and_follows_its_fields(monkeypatch):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    pytest.importorskip("napari")
    pytest.importorskip("qtpy.QtWidgets")
    from napari.components import ViewerModel
    from qtpy.QtWidgets import QApplication

    from volumen.napari_plugin import instances_widget

    application = QApplication.instance() or QApplication([])
    viewer = ViewerModel()
    walls, _ = cells()
    viewer.add_image(walls, name="em membrane", scale=(2, 1, 1), translate=(10, 0, 0))
    widget = instances_widget.TuneInstances(viewer)

    def wait(until):
        import time

        end = time.monotonic() + 60
        while not until():
            application.processEvents()
            time.sleep(0.01)
            assert time.monotonic() < end

    viewer.dims.point = (50, 20, 20)
    widget.side.setValue(40)
    widget.walls.setCurrentText("em membrane")
    wait(lambda: instances_widget._LAYER in viewer.layers and widget._worker is None)
    layer = viewer.layers[instances_widget._LAYER]
    assert layer.data.max() == 64
    assert tuple(layer.scale) == (2, 1, 1)
    assert tuple(layer.translate) == (10, 0, 0)
    assert widget.flags.text() == "boundary=membrane,threshold=0.5,merge_threshold=0.5,min_size=0"
    widget.merge_threshold.setValue(0.75)
    wait(lambda: layer.data.max() == 32)
    widget.min_size.setValue(10**6)
    wait(lambda: layer.data.max() == 0)
    assert "0 instances in 40 x 40 x 40 voxels" in widget.status.text()
    widget.walls.setCurrentText("(none)")
    wait(lambda: "Choose a layer" in widget.status.text())
    widget.close()


def test_the_widget_s_prediction_has_instances(tmp_path):
    pytest.importorskip("dask.array")
    import zarr
    from prediction import save_checkpoint

    from volumen.napari_plugin.results import read_prediction
    from volumen.napari_plugin.worker import predict

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 16), dtype=np.uint8)
    zarr.save_array(tmp_path / "a.zarr", image)
    events = []
    layer = {
        "path": str(tmp_path / "a.zarr"),
        "name": "a",
        "scale": (1.0,) * 3,
        "unit": None,
        "translate": (),
    }
    job = {
        "layers": [layer], "checkpoint": str(save_checkpoint(tmp_path / "m.pth")), "axes": "zyx", "targets": ["ink"],
        "target": str(tmp_path / "p.zarr"), "overlap": 0.25, "dtype": "uint8", "device": "cpu",
        "instances": "foreground=ink",
    }  # fmt: skip
    path = predict(job, lambda event, **values: events.append((event, values)))
    (kinds,) = [values["kinds"] for event, values in events if event == "heads"]
    assert kinds == {"ink": "binary", "ink_instances": "instances"}
    layers = read_prediction(path, "a", kinds, scale=(1, 1, 1), translate=(0, 0, 0))
    shown = {
        options["name"]: (kind, np.asarray(data[0] if isinstance(data, list) else data))
        for data, options, kind in layers
    }
    assert shown["a ink_instances"][0] == "labels"
    stored = zarr.open_array(tmp_path / "p.zarr" / "labels" / "ink_instances" / "0", mode="r")[...]
    np.testing.assert_array_equal(shown["a ink_instances"][1], stored)
