"""The napari widget's work, without napari or Qt: layers, settings, the process, its events, its results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import yaml
import zarr
from conftest import ROOT
from data_folders import image_of, shells

from volumen.napari_plugin import jobs
from volumen.napari_plugin.jobs import Job, follow, free_name
from volumen.napari_plugin.layers import (
    PREDICTION,
    describe,
    store,
    take,
    trainable_layers,
    viewer_substitute,
)
from volumen.napari_plugin.session import Progress, TrainingForm, best_checkpoint, fields_of
from volumen.utils.errors import VolumenError


def layer(name, data, kind="image", **values):
    known = {"scale": (1.0,) * data.ndim, "metadata": {}, "rgb": False, "multiscale": False}
    return SimpleNamespace(name=name, data=data, _type_string=kind, **{**known, **values})


def test_the_manifest_is_one_that_napari_takes():
    npe2 = pytest.importorskip("npe2")
    manifest = npe2.PluginManifest.from_file(ROOT / "bundle" / "scripts" / "napari_plugin" / "napari.yaml")
    assert manifest.contributions.widgets[0].display_name == "Train and predict"
    for command in manifest.contributions.commands:
        module, name = command.python_name.split(":")
        source = (
            (ROOT / "bundle" / module.replace(".", "/").replace("volumen", "scripts", 1))
            .with_suffix(".py")
            .read_text()
        )
        assert f"class {name}" in source or f"def {name}" in source


@pytest.fixture
def viewer():
    label = shells((24, 24, 64))
    return SimpleNamespace(
        layers=[
            layer("scroll", image_of(label), scale=(2.0, 1.0, 1.0)),
            layer("scroll_surface", label, "labels"),
            layer("scroll_mask", np.ones_like(label), "labels"),
            layer("another", image_of(label)),
        ]
    )


def test_labelled_images_are_trained_on_and_others_left(viewer):
    assert describe(viewer) == [("scroll", ["surface"], True)]
    assert [one.name for one in trainable_layers(viewer)] == ["scroll", "scroll_surface", "scroll_mask"]


def test_a_prediction_is_no_label_until_it_is_renamed(viewer):
    label = viewer.layers[1].data
    viewer.layers.append(layer("another ink", label, "labels", metadata={PREDICTION: "another ink"}))
    assert describe(viewer) == [("scroll", ["surface"], True)]
    viewer.layers[-1].name = "another_surface"
    assert [name for name, _, _ in describe(viewer)] == ["scroll", "another"]


def test_what_is_missing_is_told(viewer):
    viewer.layers = viewer.layers[:1]
    with pytest.raises(VolumenError, match="add one named, say, scroll_surface"):
        describe(viewer)
    viewer.layers = []
    with pytest.raises(VolumenError, match="an Image layer"):
        describe(viewer)


@pytest.mark.parametrize(("shape", "dtype", "rgb"), [
    ((70, 65, 130), np.uint16, False),
    ((2, 5, 70, 9), np.float32, False),
    ((600, 3), np.uint8, False),
    ((40, 50, 3), np.uint8, True),
    ((9, 40, 50, 3), np.uint8, True),
    ((9, 40, 50), bool, False),
])  # fmt: skip
def test_layers_are_stored_as_they_are(tmp_path, shape, dtype, rgb):
    array = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, shape).astype(dtype)
    (one,) = take([layer("a", array, rgb=rgb)])
    shares = []
    (file,) = store([one], tmp_path, progress=lambda name, share: shares.append((name, share)))
    back = zarr.open_array(file.path, mode="r")
    np.testing.assert_array_equal(back[...], array)
    assert shares[-1] == ("a", 1.0)
    assert sorted(shares) == shares
    (again,) = viewer_substitute([json.loads(json.dumps(file.to_dict()))]).layers
    assert (again.name, again.scale, again.rgb) == ("a", one.scale, rgb)


def test_the_finest_level_is_taken(tmp_path):
    levels = [np.zeros((8, 8, 8), np.uint8), np.zeros((4, 4, 4), np.uint8)]
    whole = SimpleNamespace(
        name="a", data=levels, _type_string="image", scale=(1,) * 3, multiscale=True, rgb=False
    )
    assert take([whole])[0].array.shape == (8, 8, 8)


def test_a_zarr_array_on_disk_is_not_copied(tmp_path):
    array = zarr.create_array(tmp_path / "big.zarr", shape=(8, 8, 8), chunks=(4, 4, 4), dtype="uint8")
    (file,) = store(take([layer("a", array)]), tmp_path / "copies")
    assert file.path == str(tmp_path / "big.zarr")
    assert not list((tmp_path / "copies").iterdir())
    group = zarr.open_group(tmp_path / "group.zarr")
    inner = group.create_array("0", data=np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    (file,) = store(take([layer("b", inner)]), tmp_path / "copies")
    np.testing.assert_array_equal(zarr.open_array(file.path)[...], inner[...])


def test_what_cannot_be_stored_is_told(tmp_path, monkeypatch):
    with pytest.raises(VolumenError, match="a: expected real numbers, found complex64"):
        store(take([layer("a", np.zeros((4, 4), np.complex64))]), tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(free=100))
    with pytest.raises(VolumenError, match="GB of free space"):
        store(take([layer("a", np.zeros((40, 40), np.uint8))]), tmp_path)


# -- settings ----------------------------------------------------------------------------------------------------


def test_the_fields_are_settings_that_the_program_takes(tmp_path, viewer):
    from volumen.config.experiment_file import merge, shipped_sections
    from volumen.config.manager import ConfigManager
    from volumen.data.layout import Layout
    from volumen.data.napari_layers import cases_from_viewer

    form = TrainingForm(str(tmp_path), epochs=3, patch_size="16, 16,16", also=("distance", "normals"))
    config = ConfigManager(**merge(shipped_sections(), form.settings(["surface"])), output_dir=str(tmp_path))
    cases = cases_from_viewer(SimpleNamespace(layers=trainable_layers(viewer)))
    config = config.with_cases(cases, Layout(root="viewer", format="napari", cases=(), targets=("surface",)))
    assert set(config.targets) == {"surface", "surface_distance", "surface_normals"}
    assert config.tr_config.max_epoch == 3
    assert tuple(config.patch_size) == (16, 16, 16)


def test_a_new_run_gets_a_free_name_and_a_resumed_one_its_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model_2").mkdir()
    assert free_name(tmp_path, "model") == "model_3"

    def setup(start, checkpoint=""):
        form = TrainingForm(str(tmp_path), start=start, checkpoint=checkpoint)
        return form.settings([])["tr_setup"]

    assert setup("new") == {"model_name": "model_3"}
    assert setup("resume") == {"model_name": "model", "resume": True}
    assert setup("finetune", "a.pth") == {
        "model_name": "model_3",
        "checkpoint_path": "a.pth",
        "load_weights_only": True,
    }
    with pytest.raises(VolumenError, match=r"choose the \.pth file"):
        setup("finetune")


def test_an_experiment_file_fills_the_fields_and_goes_below_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "tr_config: {max_epoch: 7, initial_lr: 0.5, patch_size: [8, 16, 16]}\ntr_setup: {model_name: x}\n"
    )
    assert fields_of(yaml.safe_load(path.read_text())) == {
        "model_name": "x",
        "epochs": 7,
        "patch_size": "8,16,16",
    }
    settings = TrainingForm(str(tmp_path), epochs=9, experiment=str(path)).settings([])
    assert settings["tr_config"]["max_epoch"] == 9
    assert settings["tr_config"]["initial_lr"] == 0.5
    path.write_text("tr_config: {optimizer: $print(1)}\n")
    with pytest.raises(VolumenError, match="not evaluated"):
        TrainingForm(str(tmp_path), experiment=str(path)).settings([])


@pytest.mark.parametrize(("values", "message"), [
    ({"output": " "}, "choose where runs go"),
    ({"output": "x", "patch_size": "a,b"}, "--patch-size"),
])  # fmt: skip
def test_a_wrong_field_is_told(values, message):
    with pytest.raises(VolumenError, match=message):
        TrainingForm(**values).settings([])


# -- the process -------------------------------------------------------------------------------------------------


def job_of(code, tmp_path, monkeypatch):
    """A job whose process runs some code in place of the worker."""

    def start(folder, errors):
        return subprocess.Popen(
            [sys.executable, "-c", "import json, sys, time\n" + code, str(folder / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

    monkeypatch.setattr(jobs, "start", start)
    arrays = take([layer("a", np.arange(64, dtype=np.uint8).reshape(4, 4, 4))])
    return Job("train", arrays, tmp_path / "out", {"settings": {"a": 1}})


def test_the_process_gets_the_layers_and_its_events_arrive(tmp_path, monkeypatch):
    code = (
        "job = json.load(open(sys.argv[1]))\n"
        "import zarr\n"
        "total = int(zarr.open_array(job['layers'][0]['path'])[...].sum())\n"
        "print(json.dumps({'event': 'message', 'text': str(total)}), flush=True)\n"
        "print(json.dumps({'event': 'done', 'path': job['settings']['a']}), flush=True)\n"
    )
    events = list(job_of(code, tmp_path, monkeypatch).events())
    assert events[-2:] == [{"event": "message", "text": "2016"}, {"event": "done", "path": 1}]
    assert not list((tmp_path / "out").iterdir()), "the copies are removed"


def test_stop_closes_the_input_and_stop_again_kills(tmp_path, monkeypatch):
    started = "print(json.dumps({'event': 'started', 'run': ''}), flush=True)\n"
    polite = started + "sys.stdin.read(); print(json.dumps({'event': 'stopped'}))"
    job = job_of(polite, tmp_path, monkeypatch)
    last = follow(job.events(), lambda event: job.stop() if event["event"] == "started" else None)
    assert last == {"event": "stopped"}
    deaf = started + "time.sleep(600)"
    job = job_of(deaf, tmp_path, monkeypatch)
    last = follow(
        job.events(), lambda event: (job.stop(), job.stop()) if event["event"] == "started" else None
    )
    assert last == {"event": "stopped"}


def test_stop_before_the_process_has_begun(tmp_path, monkeypatch):
    job = job_of("raise SystemExit(1)", tmp_path, monkeypatch)
    assert follow(job.events(), lambda event: job.stop()) == {"event": "stopped"}


@pytest.mark.parametrize(("code", "message"), [
    ("raise MemoryError('all gone')", "code 1: MemoryError: all gone"),
    ("import os; os.kill(os.getpid(), 9)", "code -9: it was ended, perhaps for want of memory"),
])  # fmt: skip
def test_a_process_that_dies_is_told_of(tmp_path, monkeypatch, code, message):
    last = follow(job_of(code, tmp_path, monkeypatch).events(), lambda event: None)
    assert last["event"] == "failed"
    assert message in last["message"]


def test_an_output_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    (event,) = Job("train", [], tmp_path / "file" / "out", {}).events()
    assert event["event"] == "failed"


def test_a_mistake_in_the_worker_is_one_line(tmp_path, viewer):
    """The real worker: it loads, refuses, tells why, and leaves nothing."""
    options = {"checkpoint": str(tmp_path / "none.pth"), "target": str(tmp_path / "p.zarr"), "axes": "zyx",
               "overlap": 0.25, "dtype": "labels", "device": "cpu"}  # fmt: skip
    job = Job("predict", take(viewer.layers[:1]), tmp_path / "out", options)
    last = follow(job.events(), lambda event: None)
    assert last["event"] == "failed"
    assert "none.pth: no such checkpoint" in last["message"]
    assert not list((tmp_path / "out").iterdir())


# -- progress ----------------------------------------------------------------------------------------------------


def test_events_become_curves():
    told = Progress()
    step = {"event": "step", "epochs": 2, "steps": 2, "loss": 1.0}
    for epoch in (1, 2):
        for number in (1, 2):
            told.take({**step, "epoch": epoch, "step": number, "loss": None if epoch == number == 2 else 1.0})
        told.take(
            {
                "event": "epoch",
                "epoch": epoch,
                "epochs": 2,
                "numbers": {"loss": 1.0, "val/mean_dice": epoch / 4},
            }
        )
    assert told.losses == [(0.5, 1.0), (1.0, 1.0), (1.5, 1.0)]
    assert told.scores == [(1.0, 0.25), (2.0, 0.5)]
    assert (told.share, told.score_name, told.state) == (1.0, "mean dice", "running")
    told.take({"event": "message", "text": "one\ntwo", "level": "warning"})
    assert (told.text, told.warnings) == ("one", ["one\ntwo"])
    told.take({"event": "failed", "message": "why"})
    assert (told.state, told.text) == ("failed", "why")


def test_every_event_of_the_worker_is_understood():
    from volumen.napari_plugin import worker

    rows = [
        line.split("|")[1].strip() for line in (worker.__doc__ or "").splitlines() if line.startswith("| ")
    ]
    events = [name for name in rows if name not in ("event", "---")]
    assert len(events) >= 8
    assert all(hasattr(Progress, f"_{name}") for name in events)


def test_the_reporter_tells_of_steps_and_epochs():
    from ignite.engine import Engine

    from volumen.napari_plugin.worker import Reporter

    told = []
    engine = Engine(lambda engine, batch: {"losses": {"loss": float(batch)}})
    engine.state.metrics = {}
    Reporter(lambda event, **values: told.append((event, values))).attach(engine)
    engine.run([1.0, float("nan")], max_epochs=1)
    steps = [values for event, values in told if event == "step"]
    assert steps[-1] == {"epoch": 1, "epochs": 1, "step": 2, "steps": 2, "loss": None}
    assert [event for event, _ in told][-1] == "epoch"
    json.dumps(told)


def test_the_best_checkpoint_else_the_newest(tmp_path):
    run = tmp_path / "m"
    run.mkdir()
    assert best_checkpoint(run) == ""
    (run / "m_1.pth").write_text("")
    assert best_checkpoint(run).endswith("m_1.pth")
    (run / "m_best.pth").write_text("")
    assert best_checkpoint(run).endswith("m_best.pth")


# -- results and manifest ----------------------------------------------------------------------------------------


def test_a_prediction_becomes_layers(tmp_path):
    pytest.importorskip("dask.array")
    from volumen.napari_plugin.results import read_prediction

    group = zarr.open_group(tmp_path / "p.zarr", mode="w")
    surface = np.random.default_rng(0).integers(0, 2, (4, 6, 8)).astype(np.uint8)
    group.create_array("surface/0", data=surface)
    group.create_array("surface/1", data=surface[::2, ::2, ::2])
    normals = np.random.default_rng(1).normal(size=(3, 4, 6, 8)).astype(np.float16)
    group.create_array("normals/0", data=normals)
    layers = read_prediction(
        tmp_path / "p.zarr",
        "scroll",
        {"normals": "vector", "surface": "binary"},
        scale=(2.0, 1.0, 1.0),
        translate=(0.0, 5.0, 0.0),
    )
    assert [(options["name"], kind) for _, options, kind in layers] == [
        ("scroll surface", "labels"),
        ("scroll normals x", "image"),
        ("scroll normals y", "image"),
        ("scroll normals z", "image"),
    ]
    np.testing.assert_array_equal(layers[0][0], surface)
    np.testing.assert_array_equal(np.asarray(layers[2][0]), normals[1])
    assert [options["visible"] for _, options, _ in layers] == [True, False, False, False]
    assert all(options["scale"] == [2.0, 1.0, 1.0] for _, options, _ in layers)
    assert all(options["metadata"] == {PREDICTION: options["name"]} for _, options, _ in layers)


def test_the_manifest_is_found_and_names_what_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, resource = project["entry-points"]["napari.manifest"]["volumen"].partition(":")
    path = ROOT / "bundle" / module.replace(".", "/").replace("volumen", "scripts", 1) / resource
    manifest = yaml.safe_load(path.read_text())
    assert manifest["name"] == project["name"]
    for command in manifest["contributions"]["commands"]:
        module, _, name = command["python_name"].partition(":")
        source = (
            ROOT / "bundle" / f"{module.replace('.', '/').replace('volumen', 'scripts', 1)}.py"
        ).read_text()
        assert f"class {name}(" in source or f"def {name}(" in source


def test_the_sample_can_be_trained_on():
    from volumen.napari_plugin.samples import phantom

    layers = [layer(options["name"], data, kind) for data, options, kind in phantom(48)]
    assert describe(SimpleNamespace(layers=layers)) == [("scroll", ["surface"], True)]
    assert import_module("volumen.napari_plugin").__doc__


def test_a_prediction_has_the_voxel_size_of_its_layer(tmp_path):
    from prediction import save_checkpoint

    from volumen.napari_plugin import worker

    checkpoint = save_checkpoint(tmp_path / "m.pth", 3, (8, 8, 8), tasks=False)
    values = np.random.default_rng(0).integers(0, 256, (8, 9, 10), dtype=np.uint8)
    image = layer(
        "scroll", values, scale=(4.0, 0.5, 0.5), units=("micrometer",) * 3, translate=(0.0, 5.0, 0.0)
    )
    (file,) = store(take([image]), tmp_path / "layers")
    told = []
    job = {"layers": [file.to_dict()], "checkpoint": str(checkpoint), "target": str(tmp_path / "p.zarr"), "axes": "zyx",
           "targets": ["ink"], "overlap": 0.0, "dtype": "labels", "device": "cpu"}  # fmt: skip
    group = zarr.open_group(worker.predict(job, lambda event, **rest: told.append((event, rest))), mode="r")
    (multiscale,) = group["labels/ink"].attrs["ome"]["multiscales"]
    assert [axis["unit"] for axis in multiscale["axes"]] == ["micrometer"] * 3
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]
    assert scale == {"type": "scale", "scale": [4.0, 0.5, 0.5]}
    moved = multiscale["datasets"][0]["coordinateTransformations"][1]
    assert moved == {"type": "translation", "translation": [0.0, 5.0, 0.0]}
    assert told[-1][0] == "progress"
    assert told[-1][1]["done"] == told[-1][1]["total"]


@pytest.mark.parametrize(("dtype", "kind"), [("uint8", "image"), ("float16", "image"), ("labels", "labels")])
def test_stored_probabilities_are_shown_as_an_image(tmp_path, dtype, kind):
    from prediction import save_checkpoint

    from volumen.inference.predict import predict
    from volumen.inference.request import PredictRequest
    from volumen.napari_plugin.results import read_prediction

    checkpoint = save_checkpoint(tmp_path / "m.pth", 3, (8, 8, 8), tasks=False)
    values = np.random.default_rng(0).integers(0, 256, (8, 9, 10), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values)
    output = str(tmp_path / "a.zarr")
    predict(
        PredictRequest(str(tmp_path / "a.tif"), str(checkpoint), output, ("ink",), dtype=dtype, device="cpu")
    )
    ((_, options, found),) = read_prediction(
        output, "a", {"ink": "binary"}, scale=(1,) * 3, translate=(0,) * 3
    )
    assert found == kind
    limits = {"uint8": (0, 255), "float16": (0, 1), "labels": None}
    assert options.get("contrast_limits") == limits[dtype]


@pytest.mark.slow
def test_train_stop_go_on_and_predict(tmp_path, viewer):
    """The real worker, with a forked data loader worker, stopped in the middle and resumed."""
    experiment = tmp_path / "small.yaml"
    experiment.write_text(
        "model_config: {features_per_stage: [4, 8]}\n"
        "tr_config: {num_dataloader_workers: 1, max_val_steps_per_epoch: 1}\n"
    )

    def train(start, epochs, stop_at=None):
        form = TrainingForm(
            str(tmp_path / "out"), start=start, epochs=epochs, steps=4, patch_size="16,16,16",
            experiment=str(experiment), device="cpu",
        )  # fmt: skip
        options = {"settings": form.settings(["surface"]), "device": "cpu"}
        job = Job("train", take(trainable_layers(viewer)), form.output, options)
        told = Progress()

        def hear(event):
            told.take(event)
            if event["event"] == "step" and event["epoch"] == stop_at:
                job.stop()

        follow(job.events(), hear)
        return told

    stopped = train("new", 1000, stop_at=2)
    assert stopped.state == "stopped", stopped.text
    assert len(stopped.scores) == 1
    resumed = train("resume", 2)
    assert resumed.state == "done", resumed.text
    assert resumed.losses[0][0] > 1.0, "it went on where it was"
    options = {"checkpoint": resumed.checkpoint, "target": str(tmp_path / "p.zarr"), "axes": "zyx",
               "overlap": 0.0, "dtype": "labels", "device": "cpu"}  # fmt: skip
    predicted = Progress()
    follow(Job("predict", take(viewer.layers[:1]), tmp_path / "out", options).events(), predicted.take)
    assert predicted.state == "done", predicted.text
    assert zarr.open_group(predicted.path)["labels/surface/0"].shape == (24, 24, 64)
    assert predicted.kinds == {"surface": "binary"}
    assert not list((tmp_path / "out").glob(".layers-*"))


WORKER = """
import multiprocessing, sys, time
import volumen.napari_plugin.worker as worker

def train(job, tell):
    # As a data loader does; a forked process closes standard input before anything else.
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    process.start()
    process.join(60)
    print("not an event")
    try:
        tell("message", text=f"worker ended with {process.exitcode}")
        time.sleep(600)
    except KeyboardInterrupt:
        tell("message", text="saving")
        raise SystemExit(130)

worker.train = train
sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_the_end_of_standard_input_stops_the_worker_which_saves(tmp_path, monkeypatch):
    """Also when the viewer is killed: then the system closes the pipe."""
    monkeypatch.setattr(jobs, "start", lambda folder, errors: start_code(folder, errors))

    def start_code(folder, errors):
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            # As in a viewer that a shell started in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )

    job = Job("train", [], tmp_path / "out", {})
    told = []

    def hear(event):
        told.append(event)
        if event.get("text", "").startswith("worker ended"):
            job.stop()

    assert follow(job.events(), hear) == {"event": "stopped"}
    assert [event["text"] for event in told if event["event"] == "message"] == [
        "worker ended with 0",
        "saving",
    ]
    assert not list((tmp_path / "out").iterdir())
