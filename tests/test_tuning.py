"""Choice of settings by a score: against direct loops over stored probabilities, and what predict then does."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
import tifffile
import torch
from prediction import save_checkpoint
from scipy import ndimage

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import instances_of
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest
from volumen.inference.rules import InstanceRules
from volumen.tuning import label_maps
from volumen.tuning.grid import Trial, candidates, choose, make_grid
from volumen.tuning.instance_maps import InstanceMaps
from volumen.tuning.label_maps import LabelMaps
from volumen.tuning.tune import TuneRequest, tune
from volumen.utils.errors import VolumenError

VAL = {"a": [[[0, 24], [0, 32], [16, 40]]], "b": [[[0, 20], [0, 24], [0, 24]]]}
VALUES = ["--thresholds", "0.3,0.5,0.55,0.7", "--fill-holes", "0,6", "--min-sizes", "0,9,60"]


def smooth(shape, seed, sigma=1.5):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (noise - noise.min()) / (noise.max() - noise.min())


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, metadata={"axes": "ZYX"[-values.ndim :]})


def write_split(folder, val, train=None):
    split = {"train": train or {}, "val": val, "fraction": 0.8, "seed": 0, "fingerprint": ""}
    (folder / "m_split.json").write_text(json.dumps(split))


@pytest.fixture
def run(tmp_path):
    """A run of a random network with data: `a` is partly its validation part, `b` wholly, `c` is trained on."""
    for number, (name, shape) in enumerate((("a", (24, 32, 40)), ("b", (20, 24, 24)), ("c", (16, 16, 16)))):
        image = smooth(shape, number)
        write(tmp_path / "data" / "images" / f"{name}.tif", (255 * image).astype(np.uint8))
        write(tmp_path / "data" / "labels" / f"{name}_ink.tif", (image > 0.55).astype(np.uint8))
        write(tmp_path / "data" / "labels" / f"{name}_tissue.tif", (3 * image * 0.999).astype(np.uint8))
    (tmp_path / "run").mkdir()
    checkpoint = save_checkpoint(tmp_path / "run" / "m_3.pth", patch=(16, 16, 16), seed=2)
    # Fewer outputs: with a class map beside it, holes could not be filled.
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["inference_config"] = {"output_targets": ["ink", "normals"], "overlap": 0.25}
    torch.save(content, checkpoint)
    write_split(tmp_path / "run", VAL, {"a": [[[0, 24], [0, 32], [0, 16]]], "c": [[[0, 16]] * 3]})
    return tmp_path


def probabilities(run, name, checkpoint="m_3.pth", **more):
    """Return float16 probabilities of the region of an image, predicted by itself."""
    box = tuple(tuple(span) for span in VAL[name][0])
    settings = {"targets": ("ink",), "overlap": 0.25, "dtype": "float16", "region": box, "pyramid": False}
    output = run / "own" / f"{checkpoint}_{name}.zarr"
    image, model = run / "data" / "images" / f"{name}.tif", run / "run" / checkpoint
    predict(PredictRequest(str(image), str(model), str(output), **{**settings, **more}))
    volume = open_volume(str(find_target(output, "ink")))
    return volume.read(tuple(slice(0, n) for n in volume.shape))[0].astype(np.float32)


def truth(run, name, target="ink"):
    box = tuple(slice(*span) for span in VAL[name][0])
    return tifffile.imread(run / "data" / "labels" / f"{name}_{target}.tif")[box]


def cleaned(mask, fill, least):
    """Clean by the rules of the documentation, with SciPy on the whole array."""
    if fill:
        holes, _ = ndimage.label(~mask)
        sizes = np.bincount(holes.ravel())
        outer = set()
        for axis in range(mask.ndim):
            for end in (0, -1):
                outer |= set(np.unique(np.take(holes, end, axis)))
        inner = [n for n in range(1, len(sizes)) if n not in outer and sizes[n] <= fill]
        mask = mask | np.isin(holes, inner)
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    return mask & (sizes[parts] >= least)


def plain_dice(found, true):
    total = found.sum() + true.sum()
    return 2 * (found & true).sum() / total if total else math.nan


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_the_best_is_that_of_a_direct_loop_and_predict_takes_it(run, capsys):
    checkpoint, data = run / "run" / "m_3.pth", run / "data"
    before = checkpoint.read_bytes()
    line = ["tune", "-m", str(checkpoint), "-i", str(data), "--score", "dice", "--target", "ink", *VALUES]
    assert main(line) == 0
    found = {name: probabilities(run, name) for name in VAL}
    direct = {}
    for threshold in (0.3, 0.5, 0.55, 0.7):
        for fill in (0, 6):
            for least in (0, 9, 60):
                scores = [
                    plain_dice(cleaned(found[name] >= threshold, fill, least), truth(run, name) > 0)
                    for name in VAL
                ]
                direct[threshold, fill, least] = np.nanmean(scores)
    table = rows_of(run / "run" / "m_tuning.csv")
    tried = {
        (float(r["threshold"]), int(r["fill_holes"]), int(r["min_size"])): float(r["ink/dice"]) for r in table
    }
    assert tried == pytest.approx(direct, abs=1e-8)
    assert len(set(np.round(list(direct.values()), 6))) > 6  # the settings matter
    content = load_checkpoint(run / "run" / "m_tuned.pth")
    section = content["config"]["inference_config"]
    best = max(direct, key=direct.__getitem__)
    chosen = section["threshold"], section["fill_holes"], section["min_size"]
    assert direct[chosen] == pytest.approx(direct[best], abs=1e-12)
    assert direct[chosen] > direct[0.5, 0, 0]
    assert section["overlap"] == 0.25
    assert content["tuning"]["value"] == pytest.approx(direct[best])
    assert content["tuning"]["default"] == pytest.approx(direct[0.5, 0, 0])
    assert checkpoint.read_bytes() == before
    assert {path.name for path in (run / "run").iterdir()} == {
        "m_3.pth", "m_split.json", "m_tuned.pth", "m_tuning.csv",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "ink/dice" in shown
    assert f"{direct[best]:.4f}" in shown
    assert f"{direct[0.5, 0, 0]:.4f}" in shown
    # The command of a user, on the same regions, has the score that was promised.
    for name, boxes in VAL.items():
        region = ",".join(f"{a}:{b}" for a, b in boxes[0])
        output = ["-o", str(run / "after" / f"{name}.zarr"), "--region", region]
        image = str(data / "images" / f"{name}.tif")
        assert main(["predict", "-i", image, "-m", str(run / "run" / "m_tuned.pth"), *output]) == 0
    scored = evaluate(EvaluateRequest(str(run / "after"), str(data), str(run / "report"), targets=("ink",)))
    assert scored.mean["ink/dice"] == pytest.approx(direct[best], abs=2e-3)


def test_only_the_validation_part_counts(run):
    request = TuneRequest(
        str(run / "run" / "m_3.pth"), str(run / "data"), "voi_split", "ink", overwrite=True,
        thresholds=(0.4, 0.6), min_sizes=(0, 9), fill_holes=(0,),
    )  # fmt: skip
    first = tune(request)
    label = tifffile.imread(run / "data" / "labels" / "a_ink.tif")
    label[:, :, :16] = 1 - label[:, :, :16]
    write(run / "data" / "labels" / "a_ink.tif", label)
    (run / "data" / "labels" / "c_ink.tif").unlink()
    assert tune(request).trials == first.trials
    label[:, :, 16:] = 1 - label[:, :, 16:]
    write(run / "data" / "labels" / "a_ink.tif", label)
    assert tune(request).trials != first.trials


def test_regions_of_one_image_are_scored_each(run):
    parts = {"a": [[[0, 24], [0, 32], [16, 28]], [[0, 24], [0, 32], [28, 40]]]}
    write_split(run / "run", parts)
    found = tune(
        TuneRequest(
            str(run / "run" / "m_3.pth"),
            str(run / "data"),
            "objects_missed",
            "ink",
            thresholds=(0.5,),
            min_sizes=(0,),
            fill_holes=(0,),
        )
    )
    total = []
    for box in parts["a"]:
        write_split(run / "run", {"a": [box]})
        one = tune(
            TuneRequest(
                str(run / "run" / "m_3.pth"),
                str(run / "data"),
                "objects_missed",
                "ink",
                thresholds=(0.5,),
                min_sizes=(0,),
                fill_holes=(0,),
                overwrite=True,
            )
        )
        total.append(one.best.value)
    assert found.best.value == pytest.approx(np.mean(total))


def test_masks_count(run):
    for name in VAL:
        shape = tifffile.imread(run / "data" / "images" / f"{name}.tif").shape
        write(run / "data" / "masks" / f"{name}.tif", np.zeros(shape, np.uint8))
    with pytest.raises(VolumenError, match="undefined for every setting on the validation part of ink"):
        tune(TuneRequest(str(run / "run" / "m_3.pth"), str(run / "data"), "dice", "ink", thresholds=(0.5,)))
    assert {path.name for path in (run / "run").iterdir()} == {"m_3.pth", "m_split.json"}


def test_classes_have_sizes_alone(run):
    found = tune(
        TuneRequest(
            str(run / "run" / "m_3.pth"), str(run / "data"), "b0_error", "tissue", min_sizes=(0, 30, 500)
        )
    )
    assert [trial.settings for trial in found.trials] == [{"min_size": n} for n in (0, 30, 500)]
    assert found.best.value == min(trial.value for trial in found.trials)
    section = load_checkpoint(found.checkpoint)["config"]["inference_config"]
    assert section["dtype"] == "labels"
    assert section["min_size"] == found.best.settings["min_size"]
    assert "threshold" not in section


def test_the_better_epoch_is_taken(run):
    save_checkpoint(run / "run" / "m_7.pth", patch=(16, 16, 16), seed=0)
    save_checkpoint(run / "run" / "m_best.pth", patch=(16, 16, 16), seed=2)
    request = TuneRequest(
        str(run / "run" / "m_best.pth"), str(run / "data"), "dice", "ink", epochs=True, fill_holes=(0,),
        min_sizes=(0,),
    )  # fmt: skip
    found = tune(request)
    names = {trial.checkpoint.rpartition("/")[2] for trial in found.trials}
    assert names == {"m_best.pth", "m_3.pth", "m_7.pth"}
    assert found.best.value == max(trial.value for trial in found.trials)
    weights = load_checkpoint(found.checkpoint)["model"]
    expected = torch.load(found.best.checkpoint, weights_only=True)["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # m_3 has the weights of m_best: of equal ones that which was given.
    assert not found.best.checkpoint.endswith("m_3.pth")


def test_in_place(run):
    path = run / "run" / "m_3.pth"
    old = torch.load(path, weights_only=True)
    found = tune(
        TuneRequest(str(path), str(run / "data"), "dice", "ink", in_place=True, thresholds=(0.3, 0.6))
    )
    assert found.checkpoint == path
    assert not (run / "run" / "m_tuned.pth").exists()
    content = load_checkpoint(path)
    assert content["config"]["inference_config"]["threshold"] == found.best.settings["threshold"]
    assert all(torch.equal(content["model"][name], value) for name, value in old["model"].items())


def test_instances_are_tuned_as_predict_makes_them(run):
    pytest.importorskip("bioimage_cpp")
    for name in VAL:
        label = tifffile.imread(run / "data" / "labels" / f"{name}_ink.tif")
        write(
            run / "data" / "labels" / f"{name}_ink.tif", ndimage.label(label == 0)[0].astype(np.uint16) * 300
        )
    line = ["tune", "-m", str(run / "run" / "m_3.pth"), "-i", str(run / "data"), "--score", "voi_split"]
    values = ["--thresholds", "0.45,0.55", "--merge-thresholds", "0.4,0.6", "--min-sizes", "0,20"]
    assert main([*line, "--instances", "ink", *values]) == 0
    table = rows_of(run / "run" / "m_tuning.csv")
    assert len(table) == 3 * 3 * 2
    content = load_checkpoint(run / "run" / "m_tuned.pth")
    for name, boxes in VAL.items():
        predict_line = ["predict", "-i", str(run / "data" / "images" / f"{name}.tif")]
        predict_line += ["-m", str(run / "run" / "m_tuned.pth"), "-o", str(run / "after" / f"{name}.zarr")]
        assert main([*predict_line, "--region", ",".join(f"{a}:{b}" for a, b in boxes[0])]) == 0
    scored = evaluate(
        EvaluateRequest(
            str(run / "after"), str(run / "data"), str(run / "report"), targets=("ink_instances",)
        )
    )
    assert scored.mean["ink_instances/voi_split"] == pytest.approx(content["tuning"]["value"], abs=1e-12)
    values = [float(row["ink_instances/voi_split"]) for row in table]
    assert content["tuning"]["value"] == pytest.approx(min(values))
    assert len(set(values)) > 3  # the settings matter


def test_instances_need_a_truth_that_numbers_them(run, capsys):
    pytest.importorskip("bioimage_cpp")
    line = ["tune", "-m", str(run / "run" / "m_3.pth"), "-i", str(run / "data"), "--score", "voi_merge"]
    line += ["--instances", "ink", "--thresholds", "0.5", "--merge-thresholds", "0.5", "--min-sizes", "0,20"]
    assert main(line) == 2
    assert "a_ink.tif: expected numbers of instances, found the value 1 alone" in capsys.readouterr().err
    assert main([*line, "--truth", "cell"]) == 2
    assert "expected labels of the validation part, such as a_cell" in capsys.readouterr().err
    for name in VAL:
        label = tifffile.imread(run / "data" / "labels" / f"{name}_ink.tif")
        write(run / "data" / "labels" / f"{name}_cell.tif", ndimage.label(label == 0)[0].astype(np.uint16))
    assert main([*line, "--truth", "cell"]) == 0
    with_truth = [row["ink_instances/voi_merge"] for row in rows_of(run / "run" / "m_tuning.csv")]
    for name in VAL:
        (run / "data" / "labels" / f"{name}_cell.tif").replace(run / "data" / "labels" / f"{name}_ink.tif")
    assert main([*line, "--overwrite"]) == 0
    assert with_truth == [row["ink_instances/voi_merge"] for row in rows_of(run / "run" / "m_tuning.csv")]


@pytest.mark.parametrize("shape", [(9, 17, 13), (23, 31)])
@pytest.mark.parametrize(
    ("channels", "softmax", "largest"), [(1, False, None), (2, False, 3), (3, True, None)]
)
def test_label_maps_are_those_of_whole_arrays(tmp_path, monkeypatch, shape, channels, softmax, largest):
    monkeypatch.setattr(label_maps, "BLOCK_VOXELS", 6 ** len(shape))
    rng = np.random.default_rng(1)
    values = np.stack([smooth(shape, seed, 1.0) for seed in range(channels)]).astype(np.float16)
    volume = ArrayVolume(values, axes="c" + "zyx"[-len(shape) :])
    maps = LabelMaps(volume, softmax=softmax, keep_largest=largest, folder=tmp_path / "maps")
    for _ in range(40):
        settings = {"min_size": int(rng.choice([0, 5, 30]))}
        if not softmax:
            settings |= {
                "threshold": float(rng.choice([0.4, 0.5])),
                "fill_holes": int(rng.choice([0, 3, 40])),
            }
        found = maps(settings)
        if softmax:
            raw = values.astype(np.float32).argmax(axis=0)
            expected = np.zeros(shape, np.uint8)
            for label in (1, 2):
                expected[cleaned(raw == label, 0, settings["min_size"])] = label
            np.testing.assert_array_equal(found, expected[None])
            continue
        for channel in range(channels):
            mask = values[channel].astype(np.float32) >= settings["threshold"]
            mask = cleaned(mask, settings["fill_holes"], settings["min_size"])
            if largest is not None:
                parts, _ = ndimage.label(mask)
                order = np.argsort(-np.bincount(parts.ravel())[1:], kind="stable") + 1
                mask = np.isin(parts, order[:largest])
            np.testing.assert_array_equal(found[channel], mask)


def test_instance_maps_are_those_of_whole_arrays(tmp_path):
    pytest.importorskip("bioimage_cpp")
    rng = np.random.default_rng(0)
    walls = np.rint(255 * smooth((20, 24, 28), 5)).astype(np.uint8)
    mask = np.ones((1, 25, 24, 28), np.uint8)
    mask[:, :9] = 0
    maps = InstanceMaps(
        {"wall": ArrayVolume(walls[None], axes="czyx")}, InstanceRules("wall"), (2.0, 1.0, 1.0), (), (8, 8, 8),
        tmp_path / "maps", ArrayVolume(mask, axes="czyx"), (5, 0, 0),
    )  # fmt: skip
    for _ in range(8):
        threshold, merge, least = rng.choice([0.4, 0.6]), rng.choice([0.3, 0.7]), int(rng.choice([0, 50]))
        rules = InstanceRules("wall", threshold=float(threshold), merge_threshold=float(merge))
        allowed = mask[0, 5:] > 0
        expected = instances_of({"wall": walls[None]}, Source(rules, (2.0, 1.0, 1.0)), allowed)
        sizes = np.bincount(expected.ravel())
        expected[sizes[expected] < least] = 0
        settings = {"threshold": threshold, "merge_threshold": merge, "min_size": least}
        found = maps(settings)[0]
        np.testing.assert_array_equal(found > 0, expected > 0)
        pairs = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1)
        assert len(pairs[0]) == len(set(pairs[0])) == len(set(pairs[1]))


def test_the_choice_is_the_argmax_of_a_direct_loop():
    default = {"threshold": 0.5, "min_size": 0}
    grid = make_grid({"threshold": (0.7, 0.3, 0.6), "min_size": (10,)}, default)
    assert grid == {"threshold": (0.3, 0.5, 0.6, 0.7), "min_size": (0, 10)}
    rng = np.random.default_rng(0)
    for smaller in (False, True):
        for _ in range(100):
            values = rng.integers(0, 4, 8) / 3
            values = np.where(rng.random(8) < 0.2, np.nan, values)
            trials = [Trial("m", s, float(v)) for s, v in zip(candidates(grid), values, strict=True)]
            start = next(trial for trial in trials if trial.settings == default)
            best = choose(trials, start, grid, smaller=smaller)
            if np.isnan(values).all():
                assert best is start
                continue
            top = (np.nanmin if smaller else np.nanmax)(values)
            assert best.value == top
            if start.value == top:
                assert best is start  # of equal scores the default
            fewest = min(
                sum(t.settings[name] != default[name] for name in default) for t in trials if t.value == top
            )
            assert sum(best.settings[name] != default[name] for name in default) == fewest


def test_rounding_is_no_gain():
    grid = {"threshold": (0.4, 0.5)}
    trials = [Trial("m", {"threshold": 0.4}, 0.3 + 1e-13), Trial("m", {"threshold": 0.5}, 0.3)]
    assert choose(trials, trials[1], grid, smaller=False) is trials[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--score dize", "--score: expected some of"),
        ("--score angular_error", r"--score: expected a score of ink \(labels\): dice, iou"),
        ("--score objects_true", "ink/objects_true: is no score by which"),
        ("--score ece", "--score: ece follows from the probabilities"),
        ("--score dice --target normals", "--target: expected a target of probabilities: ink, tissue, found"),
        ("--score dice --target none", "--target: expected a target of probabilities: ink, tissue, found none"),
        ("--score dice --merge-thresholds 0.5", "--merge-thresholds: expected settings of ink: threshold"),
        ("--score dice --thresholds 0,0.5", "--thresholds: expected probabilities above 0 and below 1"),
        ("--score dice --thresholds 0.5,nan", "--thresholds: expected probabilities above 0 and below 1"),
        ("--score dice --thresholds a", "--thresholds: expected numbers by commas"),
        ("--score dice --min-sizes -1", "--min-sizes: expected sizes of at least 0"),
        ("--score dice --fill-holes 0.5", "--fill-holes: expected whole numbers by commas"),
        ("--score dice --in-place --epochs", "--in-place: the settings may be best for the weights of another"),
        ("--score dice --truth ink", "--truth: belongs to instances"),
        ("--score dice --instances ink", r"--score: expected a score of ink_instances \(instances\)"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(run, capsys, flags, message):
    pytest.importorskip("bioimage_cpp")
    words = flags.replace("--min-sizes -1", "--min-sizes=-1").split()
    if "--target" not in words and "--instances" not in words:
        words += ["--target", "ink"]
    assert main(["tune", "-m", str(run / "run" / "m_3.pth"), "-i", str(run / "data"), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert {path.name for path in (run / "run").iterdir()} == {"m_3.pth", "m_split.json"}


def fails(run, capsys, *more):
    line = ["tune", "-m", str(run / "run" / "m_3.pth"), "-i", str(run / "data"), "--score", "dice"]
    assert main([*line, "--target", "ink", *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_no_validation_part(run, capsys):
    write_split(run / "run", {"a": []})
    assert "the run has no validation part" in fails(run, capsys)
    (run / "run" / "m_split.json").write_text("{}")
    assert "is not a split" in fails(run, capsys)
    (run / "run" / "m_split.json").unlink()
    assert "expected m_split.json beside it" in fails(run, capsys)


def test_other_data(run, capsys):
    write(run / "data" / "images" / "b.tif", np.zeros((20, 20, 24), np.uint8))
    assert "expected the image as it was when the run began" in fails(run, capsys)
    (run / "data" / "images" / "b.tif").unlink()
    assert "expected the images of the validation part, such as b" in fails(run, capsys)


def test_unlabelled_data(run, capsys):
    for name in VAL:
        (run / "data" / "labels" / f"{name}_ink.tif").unlink()
    assert "expected labels of the validation part, such as a_ink" in fails(run, capsys)


def test_an_earlier_result_is_not_replaced_unasked(run, capsys):
    (run / "run" / "m_tuned.pth").write_text("of a user")
    assert "m_tuned.pth: exists already" in fails(run, capsys)
    assert (run / "run" / "m_tuned.pth").read_text() == "of a user"


def test_a_head_that_instances_are_made_from(run, capsys):
    pytest.importorskip("bioimage_cpp")
    content = torch.load(run / "run" / "m_3.pth", weights_only=True)
    content["config"]["inference_config"]["instances"] = {"boundary": "ink"}
    torch.save(content, run / "run" / "m_3.pth")
    assert "the checkpoint makes instances from ink, so a prediction stores" in fails(run, capsys)


def test_an_output_that_is_a_file(run, capsys):
    (run / "file").write_text("")
    assert "file: expected a folder that can be written to" in fails(run, capsys, "-o", str(run / "file"))


def test_images_in_2d_thinner_than_a_patch(tmp_path):
    image = smooth((11, 50), 1)
    write(tmp_path / "data" / "images" / "p.tif", (255 * image).astype(np.uint8))
    write(tmp_path / "data" / "labels" / "p_ink.tif", (image > 0.5).astype(np.uint8))
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "m_best.pth", ndim=2, patch=(16, 16), tasks=False, seed=1)
    write_split(tmp_path / "run", {"p": [[[0, 11], [30, 50]]]})
    found = tune(
        TuneRequest(
            str(tmp_path / "run" / "m_best.pth"), str(tmp_path / "data"), "objects_broken", "ink",
            output=str(tmp_path / "new" / "folder"),
        )
    )  # fmt: skip
    assert len(found.trials) == 9 * 3  # no holes beside the classes of the other head
    assert found.best.value == min(trial.value for trial in found.trials)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        "m_tuned.pth", "m_tuning.csv",
    }  # fmt: skip


def test_holes_are_not_filled_beside_classes(run, capsys):
    save_checkpoint(run / "run" / "m_3.pth", patch=(16, 16, 16))
    assert "tissue, which is predicted too, has several classes" in fails(run, capsys, "--fill-holes", "9")
    found = tune(TuneRequest(str(run / "run" / "m_3.pth"), str(run / "data"), "dice", "ink", min_sizes=(0,)))
    assert {trial.settings["fill_holes"] for trial in found.trials} == {0}
    output = str(run / "whole.zarr")
    image = str(run / "data" / "images" / "c.tif")
    assert main(["predict", "-i", image, "-m", str(found.checkpoint), "-o", output]) == 0
