"""Suggested boxes in the viewer: their layers without Qt, and the dock widget offscreen."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from suggestion_case import TRUTH, request_of, train_sparsely

from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.napari_plugin.boxes import RANK, TARGET, BoxSession, suggestions_reader
from volumen.suggestion.suggest import suggest
from volumen.utils.errors import VolumenError


@pytest.fixture(scope="module")
def suggested(tmp_path_factory):
    folder = train_sparsely(tmp_path_factory.mktemp("boxes"))
    suggest(request_of(folder, folder / "suggestions"))
    return folder


@pytest.fixture
def folder(suggested, tmp_path):
    """A copy of the suggestions that a test may paint."""
    shutil.copytree(suggested / "suggestions", tmp_path / "suggestions")
    return tmp_path / "suggestions"


def truth_of(box):
    return TRUTH[box.volume][tuple(slice(*side) for side in box.box)]


def test_the_reader_takes_a_table_of_suggestions_only(folder):
    assert suggestions_reader(str(folder / "overview.png")) is None
    assert suggestions_reader(str(folder / "missing" / "suggestions.csv")) is None
    layers = suggestions_reader(str(folder / "suggestions.csv"))(None)
    assert [kind for *_, kind in layers] == ["image", "image", "image", "labels", "shapes"]


def test_layers_lie_over_each_other(folder):
    session = BoxSession(folder)
    for box in session.boxes:
        image, uncertainty, label = session.layers_of(box)
        frames = session.frames(box.volume)
        start = np.array([a for a, _ in box.box], float)
        assert label[1]["translate"] == start.tolist()
        assert label[0].shape == tuple(b - a for a, b in box.box)
        offset = (start - image[1]["translate"]).astype(int)
        inside = tuple(slice(a, a + n) for a, n in zip(offset, label[0].shape, strict=True))
        whole = open_volume(folder / "predictions" / f"{box.volume}.zarr" / "ink").read(
            tuple(slice(*side) for side in box.box)
        )[0]
        p = np.clip(whole / 255, 1e-9, 1 - 1e-9)
        entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        assert np.abs(uncertainty[0][inside] / 255 - entropy).max() < 0.01
        own = [
            f for f, rank in zip(frames[0], frames[1]["features"]["rank"], strict=True) if rank == box.rank
        ]
        corners = np.concatenate(own)
        assert corners[:, 1:].min(axis=0).tolist() == (start[1:] - 0.5).tolist()
        assert corners[:, 0].tolist()[0::4] == [start[0], start[0] + 4, start[0] + 7]


def test_a_painted_label_is_saved_as_it_was_stored(folder):
    session = BoxSession(folder)
    box = session.boxes[0]
    before = open_volume(folder / "boxes" / box.folder / "ink.zarr")
    assert session.save(box, "ink", truth_of(box).astype(np.int64))
    after = open_volume(folder / "boxes" / box.folder / "ink.zarr")
    assert (after.dtype, after.geometry, after.shape) == (before.dtype, before.geometry, before.shape)
    assert np.array_equal(session.label(box, "ink")[0], truth_of(box))
    assert not session.save(box, "ink", truth_of(box)), "nothing changed"
    with pytest.raises(VolumenError, match="found the value 2"):
        session.save(box, "ink", truth_of(box) * 2)
    with pytest.raises(VolumenError, match="found shape"):
        session.save(box, "ink", truth_of(box)[:4])
    assert np.array_equal(session.label(box, "ink")[0], truth_of(box))
    session.mark(box, True)
    assert [session.is_done(one) for one in session.boxes] == [True, False, False, False]
    session.mark(box, False)
    assert not session.is_done(box)


# -- the widget, in a real Qt --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def application():
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    pytest.importorskip("napari")
    widgets = pytest.importorskip("qtpy.QtWidgets")
    return widgets.QApplication.instance() or widgets.QApplication([])


@pytest.fixture
def viewer(application):
    from napari.components import ViewerModel

    return ViewerModel()


@pytest.mark.slow
def test_the_widget_steps_saves_marks_and_takes_back(viewer, folder, suggested, tmp_path):
    from volumen.napari_plugin.review import LabelNext

    for data, options, kind in suggestions_reader(str(folder / "suggestions.csv"))(None):
        getattr(viewer, f"add_{kind}")(data, **options)
    widget = LabelNext(viewer)
    boxes = widget.session.boxes
    assert widget.folder.text() == str(folder)
    assert widget.text.text().startswith(f"Box 1 of 4, {boxes[0].volume}: ")
    for number, box in enumerate(boxes):
        assert widget.number == number
        (label,) = [layer for layer in viewer.layers if TARGET in layer.metadata]
        assert label.metadata[RANK] == box.rank
        assert viewer.layers.selection.active is label
        low, high = np.array(box.box).T
        assert (low <= viewer.dims.point).all()
        assert (viewer.dims.point < high).all()
        label.data = truth_of(box)
        if number < 2:
            widget.painted.click()
        widget.next.click()
    assert not widget.next.isEnabled()
    widget.back.click()
    assert widget.number == 2
    assert not widget.painted.isChecked()
    session = BoxSession(folder)
    assert [session.is_done(box) for box in boxes] == [True, True, False, False]
    # The last box was left by `back`, so all labels are stored.
    assert all(np.array_equal(session.label(box, "ink")[0], truth_of(box)) for box in boxes)
    (label,) = [layer for layer in viewer.layers if TARGET in layer.metadata]
    label.data = np.full_like(label.data, 9)
    widget.back.click()
    assert widget.number == 2, "a label that cannot be saved is not left"
    assert "found the value 9" in widget.status.text()
    label.data = truth_of(boxes[2])
    widget.output.setText(str(tmp_path / "new"))
    widget.take_back.click()
    assert "newly labelled, from 2 boxes" in widget.status.text()
    cases = {case.name: case for case in open_cases(discover(tmp_path / "new", allow_unlabeled=True))}
    for box in boxes[:2]:
        inside = tuple(slice(*side) for side in box.box)
        assert (cases[box.volume].masks["ink"].read(inside) > 0).all()
        assert np.array_equal(cases[box.volume].labels["ink"].read(inside)[0], truth_of(box))
    widget.folder.setText(str(tmp_path))
    widget.open()
    assert "expected a folder of volumen suggest" in widget.status.text()
