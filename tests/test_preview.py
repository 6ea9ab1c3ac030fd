"""Previews: the drawn frames, their size, and the files that they are written to."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image

from volumen.handlers.preview import colours
from volumen.handlers.preview.handler import (
    PreviewHandler,
    encode,
    most_foreground,
    shown_voxels,
    write_preview,
)
from volumen.handlers.preview.render import HEADER, KEY, MARGIN, probabilities, render_preview
from volumen.handlers.records.logs import TensorBoardLog
from volumen.handlers.records.run_directory import RunDirectory
from volumen.utils.picture_text import drawable

KINDS = {
    "surface": "binary",
    "parts": "multiclass",
    "layers": "multilabel",
    "distance": "distance",
    "normals": "vector",
    "tensor": "tensor",
    "direction": "axis",
    "height": "field",
}


def sample(shape, seed=0):
    """Return arrays for every kind of target: image, truths, predictions, masks."""
    generator = np.random.default_rng(seed)
    ndim = len(shape)

    def noise(channels):
        return generator.standard_normal((channels, *shape)).astype(np.float32)

    channels = {
        "surface": 1,
        "parts": 3,
        "layers": 2,
        "distance": 1,
        "normals": ndim,
        "tensor": 3 if ndim == 2 else 6,
        "direction": ndim,
        "height": 1,
    }
    predictions = {name: noise(count) for name, count in channels.items()}
    truths = {name: noise(count) for name, count in channels.items()}
    truths["surface"] = (truths["surface"] > 0).astype(np.uint8)
    truths["layers"] = (truths["layers"] > 0).astype(np.uint8)
    truths["parts"] = generator.integers(0, 3, (1, *shape))
    masks = {name: generator.random((1, *shape)) > 0.3 for name in channels}
    return noise(1), truths, predictions, masks


@pytest.mark.parametrize("shape", [(64, 64, 64), (8, 256, 256), (16, 20, 12), (1, 9, 9), (40, 40), (3, 500)])
def test_every_kind_of_target_is_drawn_at_any_size(shape):
    frames = render_preview(*sample(shape), KINDS, title="a model")
    assert len(frames) == (1 if len(shape) == 2 else min(24, shape[0]))
    assert {frame.size for frame in frames} == {frames[0].size}
    assert frames[0].width <= 1600
    assert frames[0].mode == "RGB"


@pytest.mark.parametrize(
    ("spacing", "unit", "pixels"),
    # A cell of 32 voxels is 224 pixels wide, and a bar at most 0.4 of it: 12.8 voxels.
    [
        (None, None, 70),
        ((9, 9, 0.5), "micrometer", 70),
        ((1, 1, 0.3), "mm", round(2 / 0.3 * 7)),
        ((1, 1, 90), "nm", 78),
    ],
)
def test_the_scale_bar_is_as_long_as_it_says(spacing, unit, pixels):
    image, truths, predictions, _ = sample((2, 32, 32))
    kinds = {"surface": "binary"}
    frame = np.asarray(render_preview(image, truths, predictions, {}, kinds, spacing=spacing, unit=unit)[0])
    row = frame[58 + 224 - 11, 36 : 36 + 224]  # through the bar, in the lower left corner of the first cell
    white = np.flatnonzero((row == 255).all(axis=-1))
    assert white[0] == 8
    assert len(white) == pixels == white[-1] - white[0] + 1


def test_the_slices_move():
    frames = render_preview(*sample((12, 16, 16)), KINDS)
    assert len({frame.tobytes() for frame in frames}) == 12


def test_a_perfect_prediction_looks_like_the_truth():
    shape = (2, 32, 32)
    image, truths, predictions, _ = sample(shape)
    for name in ("distance", "normals", "tensor", "direction", "height"):
        predictions[name] = truths[name]
    predictions["surface"] = np.where(truths["surface"] > 0, 50.0, -50.0)
    # cells are 7 x 32 pixels; the first stands at 36 pixels from the left and 58 from above
    cell, gap, left, top = 224, 10, 36, 58
    for name in ("surface", "distance", "normals", "tensor", "direction", "height"):
        frame = np.asarray(render_preview(image, truths, predictions, {}, {name: KINDS[name]})[0])
        x = left + cell + gap
        above = frame[top : top + cell, x : x + cell]
        below = frame[top + cell + gap : top + 2 * cell + gap, x : x + cell]
        assert np.abs(above.astype(int) - below).max() <= 1


def test_invalid_voxels_do_not_show_their_truth():
    image, truths, predictions, masks = sample((2, 16, 16))
    other = {name: np.roll(value, 3, axis=-1) for name, value in truths.items()}
    hidden = {name: np.zeros_like(mask) for name, mask in masks.items()}
    kinds = {name: kind for name, kind in KINDS.items() if kind in ("binary", "vector", "axis")}
    first = render_preview(image, truths, predictions, hidden, kinds)[0]
    assert first.tobytes() == render_preview(image, other, predictions, hidden, kinds)[0].tobytes()


def test_values_that_are_not_finite_do_not_stop_a_preview():
    image, truths, predictions, masks = sample((2, 16, 16))
    for value in predictions.values():
        value[..., 0] = np.nan
        value[..., 1] = np.inf
        value[..., 2] = -np.inf
    image[..., 0] = np.nan
    assert render_preview(image, truths, predictions, masks, KINDS)


def test_a_prediction_without_a_truth_is_drawn():
    image, _, predictions, _ = sample((2, 16, 16))
    assert render_preview(image, {}, predictions, {}, KINDS)


def test_probabilities_are_those_of_the_logits():
    logits = np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float32)
    tensor = torch.from_numpy(logits)
    assert np.allclose(probabilities(logits, "multiclass"), tensor.softmax(0)[1:], atol=1e-6)
    assert np.allclose(probabilities(logits, "multilabel"), tensor.sigmoid(), atol=1e-6)


def test_colours_mean_what_the_keys_say():
    across = np.array([1.0, 0.0, 0.0])[:, None, None]
    assert colours.directions(across, signed=True)[0, 0] == pytest.approx([255, 127.5, 127.5])
    assert colours.directions(-across, signed=True)[0, 0] == pytest.approx([0, 127.5, 127.5])
    # without a sign both ends look the same
    assert np.array_equal(colours.directions(across, signed=False), colours.directions(-across, signed=False))
    assert colours.directions(5 * across, signed=False)[0, 0] == pytest.approx([255, 0, 0])
    inside, border, outside = colours.diverging(np.array([-1.0, 0.0, 3.0]), 1, 3)
    assert inside[2] > inside[0]
    assert outside[0] > outside[2]
    assert border.min() > 240
    xx = np.zeros((6, 1))
    xx[5] = 1
    assert colours.tensor_diagonal(xx, 1.0)[0] == pytest.approx([255, 0, 0])
    zz = np.zeros((6, 1))
    zz[0] = 1
    assert colours.tensor_diagonal(zz, 1.0)[0] == pytest.approx([0, 0, 255])


def test_a_gif_stays_below_its_limit():
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 255, (300, 500, 3), dtype=np.uint8)) for _ in range(24)]
    suffix, data = encode(frames, max_bytes=700_000)
    assert suffix == "gif"
    assert len(data) <= 700_000
    assert Image.open(io.BytesIO(data)).n_frames >= 8


def evaluator(shape=(8, 16, 16), batch=2):
    """Return an engine that has the state of the bundle's evaluator after a batch."""
    image, truths, predictions, masks = sample(shape)

    def twice(array):
        return torch.from_numpy(np.stack([array] * batch))

    labels = {name: twice(value) for name, value in truths.items()}
    labels |= {f"{name}_mask": twice(mask) for name, mask in masks.items()}
    output = {
        "image": twice(image),
        "label": labels,
        "pred": {name: twice(value) for name, value in predictions.items()},
    }
    engine = Engine(lambda engine, _: output)
    engine.state.epoch = 0
    return engine, [{"volume_name": ["scroll"] * batch}] * 2


def directory(tmp_path):
    run = RunDirectory(tmp_path, "a.model")
    run.path.mkdir(parents=True)
    return run


@pytest.mark.parametrize(("shape", "suffix"), [((8, 16, 16), "gif"), ((16, 16), "png")])
def test_the_handler_draws_the_first_batch_of_each_validation(tmp_path, shape, suffix):
    run = directory(tmp_path)
    engine, data = evaluator(shape)
    handler = PreviewHandler(run, KINDS)
    handler.attach(engine)
    drawn = []
    original = handler.frames
    handler.frames = lambda engine: drawn.append(engine.state.iteration) or original(engine)
    engine.run(data)
    assert drawn == [1]
    assert [path.name for path in run.path.iterdir()] == [f"a.model_debug.{suffix}"]
    assert Image.open(run.file(f"debug.{suffix}")).format == suffix.upper()


def test_the_handler_takes_the_voxel_size_from_the_batch(tmp_path):
    engine, (batch, *_) = evaluator()
    engine.state.output, engine.state.batch = engine._process_function(engine, None), batch
    drawn = [np.asarray(PreviewHandler(directory(tmp_path), KINDS, length="nm").frames(engine)[0])]
    for x in (2.0, 8.0):
        batch["spacing"] = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([x, x])]
        drawn.append(
            np.asarray(
                PreviewHandler(RunDirectory(tmp_path, "a.model"), KINDS, length="nm").frames(engine)[0]
            )
        )
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])


def test_every_letter_of_a_picture_is_one_that_the_font_has():
    assert drawable("5 µm, 5 μm, 20 Å, 3×4") == "5 um, 5 um, 20 angstrom, 3x4"
    assert drawable("Müller, façade, 膜 ·") == "Muller, facade, ? ·"
    frames = [
        render_preview(*sample((8, 9)), KINDS, title=title)[0]
        for title in ("größe é", "grosse e", "grosse f")
    ]
    assert frames[0].tobytes() == frames[1].tobytes() != frames[2].tobytes()


def test_history_keeps_the_newest(tmp_path):
    run = directory(tmp_path)
    frames = render_preview(*sample((16, 16)), KINDS)
    for epoch in (1, 2, 9, 10):
        write_preview(run, frames, epoch, history=2)
    names = sorted(path.name for path in run.path.iterdir())
    assert names == ["a.model_debug.png", "a.model_debug_10.png", "a.model_debug_9.png"]


def test_a_preview_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    engine, data = evaluator()
    run = directory(tmp_path)
    PreviewHandler(run, KINDS).attach(engine)
    for suffix in ("gif", "png"):
        run.file(f"debug.{suffix}").mkdir()
    engine.run(data)
    assert "no preview" in caplog.text


def test_without_a_run_s_folder_nothing_is_drawn(tmp_path, caplog):
    """An evaluator may run before any training, as in federated learning."""
    engine, data = evaluator()
    PreviewHandler(RunDirectory(tmp_path / "missing", "model"), KINDS).attach(engine)
    engine.run(data)
    assert not caplog.text
    assert not (tmp_path / "missing").exists()


def test_tensorboard_gets_a_panel_where_the_curves_of_that_epoch_are(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = directory(tmp_path)
    log = TensorBoardLog(run, torch.optim.SGD([torch.zeros(1)], lr=0.1))
    engine, data = evaluator()
    PreviewHandler(run, KINDS, tensorboard=log).attach(engine)
    engine.run(data)
    assert log.writer is None  # without a trainer there is no iteration to log the image at

    trainer = Engine(lambda engine, batch: None)
    log.attach(trainer)
    trainer.state.iteration = 7
    engine.run(data)
    log.writer.close()
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    (panel,) = events.Images("preview")
    assert panel.step == 7
    assert panel.width > panel.height > 0


def test_the_sample_with_the_most_valid_foreground_is_drawn():
    labels = {"a": torch.zeros(3, 1, 4, 4), "a_mask": torch.ones(3, 1, 4, 4, dtype=torch.bool)}
    labels["a"][1, :, :2] = 1
    labels["a"][2] = 1
    labels["a_mask"][2] = False
    assert most_foreground(labels, ["a"], 3) == 1


def test_a_negative_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="history must be at least 0, got -1"):
        PreviewHandler(directory(tmp_path), KINDS, history=-1)


def test_every_target_is_named_in_the_key_of_a_narrow_preview():
    """The colours of the first column's prediction appear in its key, on two lines if one is too narrow."""
    names, shape = ["membrane", "mito", "synapse"], (2, 40, 44)
    rng = np.random.default_rng(0)
    truths = {name: (rng.random((1, *shape)) > 0.8).astype(np.uint8) for name in names}
    logits = {name: rng.normal(size=(1, *shape)).astype(np.float32) for name in names}
    known = {name: np.ones((1, *shape), bool) for name in names}
    image = rng.random((1, *shape)).astype(np.float32)
    frame = np.asarray(render_preview(image, truths, logits, known, dict.fromkeys(names, "binary"))[0])
    key = frame[-(KEY + MARGIN) :].reshape(-1, 3).astype(int)
    for number in range(3):
        same = np.abs(key - np.asarray(colours.PALETTE[number], float).astype(int)).max(1) <= 1
        assert same.sum() >= 80, names[number]


@pytest.mark.parametrize("shape", [(8, 40, 40), (40, 40)])
def test_stripes_are_explained_where_there_are_any(shape):
    rng = np.random.default_rng(0)
    image, truth = rng.random((1, *shape)), (rng.random((1, *shape)) > 0.5).astype(np.uint8)
    given = (image, {"ink": truth}, {"ink": rng.normal(size=(1, *shape))})
    known = np.ones((1, *shape), bool)
    plain = render_preview(*given, {"ink": known}, {"ink": "binary"}, title="m")
    known[..., :20] = False
    striped = render_preview(*given, {"ink": known}, {"ink": "binary"}, title="m")
    heads = [np.asarray(frames[0])[:HEADER].astype(int) for frames in (plain, striped)]
    assert heads[0].shape == heads[1].shape
    added = np.abs(heads[1] - heads[0]).sum(axis=-1) > 0
    assert added.sum() > 100
    # The title on the left and the slice's number on the right stay as they are.
    assert not added[:, :30].any()
    assert not added[:, -40 if len(shape) == 3 else -14 :].any()
    tones = {tuple(colour) for colour in heads[1].reshape(-1, 3)}
    assert {(int(colours.INVALID),) * 3, (int(colours.INVALID_STRIPE),) * 3} <= tones


def test_estimates_are_shown_and_bounds_are_not():
    mask, confidence = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.full((1, 1, 4, 4), 0.5)
    labels = {"n_mask": mask, "n_confidence": confidence, "d_mask": mask, "d_confidence": confidence}
    labels |= {"d_upper": confidence, "m_mask": mask}
    assert shown_voxels(labels, "n").all()
    assert not shown_voxels(labels, "d").any()
    assert not shown_voxels(labels, "m").any()
