"""Evaluation: pairing, scores against hand counts, intervals, the report."""

from __future__ import annotations

import argparse
import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from prediction import save_checkpoint

from volumen.cli.evaluate import add_evaluate_arguments, run_evaluate
from volumen.cli.main import main
from volumen.evaluation import cases as cases_module
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import bootstrap, evaluate
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest
from volumen.utils.errors import VolumenError


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, metadata={"axes": "ZYX"[-values.ndim :]})


@pytest.fixture
def files(tmp_path):
    """Return a folder with three cases of known Dice: 1, 2/3 and 0."""
    truth = np.zeros((6, 12, 10), np.uint8)
    truth[2:4, 4:8, 2:6] = 1
    half = truth.copy()
    half[2] = 0
    wrong = np.roll(truth, 5, axis=1)
    for name, found in (("a", truth), ("b", half), ("c", wrong)):
        write(tmp_path / "found" / f"{name}_ink.tif", found)
        write(tmp_path / "data" / "labels" / f"{name}_ink.tif", truth)
    return tmp_path


def test_scores_intervals_and_files(files):
    evaluation = evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out")))
    dices = {name: row["ink/dice"] for name, row in evaluation.cases.items()}
    assert dices == pytest.approx({"a": 1, "b": 2 / 3, "c": 0.0})
    assert evaluation.mean["ink/dice"] == pytest.approx(5 / 9)
    low, high = evaluation.interval["ink/dice"]
    assert 0 <= low < 5 / 9 < high <= 1
    told = json.loads((files / "out" / "metrics.json").read_text())
    assert told["mean"]["ink/dice"] == pytest.approx(5 / 9)
    rows = list(csv.reader((files / "out" / "metrics.csv").open()))
    assert [row[0] for row in rows] == ["case", "a", "b", "c", "mean", "low_95", "high_95"]
    column = rows[0].index("ink/dice")
    assert float(rows[2][column]) == pytest.approx(2 / 3, rel=1e-5)


def test_the_report_stands_alone_and_shows_the_worst_first(files):
    evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out"), worst=2))
    page = (files / "out" / "report.html").read_text()
    assert "http" not in page
    sources = []

    class Pictures(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "img":
                sources.append(dict(attrs))

    Pictures().feed(page)
    named = [source["alt"] for source in sources if source["alt"]]
    # The overview shows the first plane of the worst case, then come three planes of every place.
    assert named[0] == named[1]
    assert all(name.startswith("c, ink: Dice 0.0000; z = ") for name in named[:2])
    assert named[-1].startswith("b, ink: Dice 0.6667; x = ")
    assert len({name for name in named if name.startswith("b")}) >= 3
    assert not any(name.startswith("a") for name in named)
    assert all(s["src"].startswith("data:image/png;base64,") for s in sources)


def test_a_case_in_pieces_has_the_scores_of_the_whole(files, monkeypatch):
    request = EvaluateRequest(
        str(files / "found"), str(files / "data"), str(files / "out"), metrics=("dice", "iou")
    )
    whole = evaluate(request)
    monkeypatch.setattr(cases_module, "PIECE_VOXELS", 200)
    monkeypatch.setattr(cases_module, "DERIVED_SIDE", 5)
    pieces = evaluate(request)
    assert pieces.cases == whole.cases


def mask_of_b():
    """Without the plane in which the prediction of b is wrong."""
    mask = np.ones((6, 12, 10), np.uint8)
    mask[2] = 0
    return mask


@pytest.mark.parametrize("name", ["b", "b_ink", "b_mask"])
def test_masks_are_respected(files, name):
    write(files / "data" / "masks" / f"{name}.tif", mask_of_b())
    evaluation = evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out")))
    assert {case: row["ink/dice"] for case, row in evaluation.cases.items()} == {"a": 1, "b": 1, "c": 0}


@pytest.mark.parametrize("form", ["file", "folder", "slices"])
def test_a_mask_of_one_image_may_have_any_name(files, form):
    where = files / "anything"
    if form == "slices":
        for number, plane in enumerate(mask_of_b()):
            write(where / f"plane_{number:03}.tif", plane)
    else:
        write(where / "roi.tif", mask_of_b())
    found, label = files / "found" / "b_ink.tif", files / "data" / "labels" / "b_ink.tif"
    masks = where / "roi.tif" if form == "file" else where
    request = EvaluateRequest(str(found), str(label), str(files / "out"), masks=str(masks))
    assert evaluate(request).cases["b"]["ink/dice"] == 1


def test_masks_that_were_asked_for_and_are_not_there_are_told(files, caplog):
    write(files / "other" / "b.tif", mask_of_b())
    request = EvaluateRequest(
        str(files / "found"), str(files / "data"), str(files / "out"), masks=str(files / "other")
    )
    assert evaluate(request).cases["b"]["ink/dice"] == 1
    assert "no mask for a_ink, c_ink, scored everywhere" in caplog.text
    (files / "other" / "b.tif").rename(files / "other" / "d.tif")
    with pytest.raises(VolumenError, match="other: expected masks named like a_ink, a_mask or a, found d"):
        evaluate(request)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "labels"])
@pytest.mark.parametrize("form", ["zarr", "tif"])
def test_predictions_are_read_as_they_were_stored(tmp_path, dtype, form):
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    array = zarr.create_array(
        tmp_path / "images" / "s.zarr", shape=image.shape, chunks=image.shape, dtype="uint8"
    )
    array[...] = image
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    region = ((2, 12), (0, 16), (3, 16))
    predict(
        PredictRequest(
            str(tmp_path / "images" / "s.zarr"), str(checkpoint), str(tmp_path / "found"),
            amp="off", dtype=dtype, format=form, region=region,
        )
    )  # fmt: skip
    labels = predict(
        PredictRequest(
            str(tmp_path / "images" / "s.zarr"), str(checkpoint), str(tmp_path / "truth.zarr"),
            amp="off", dtype="labels",
        )
    )  # fmt: skip
    assert labels.volumes
    root = zarr.open_group(tmp_path / "truth.zarr", mode="r")
    for target in ("ink", "tissue"):
        write(tmp_path / "labels" / f"s_{target}.tif", root[f"labels/{target}/0"][...])
    evaluation = evaluate(
        EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "labels"), str(tmp_path / "out"))
    )
    assert set(evaluation.cases) == {"s"}
    assert evaluation.mean["tissue/dice"] > 0.99 or dtype != "float32"
    assert evaluation.mean["mean_dice"] > 0.95
    assert "tissue/dice/2" in evaluation.mean


def write_slices(folder, values, name):
    folder.mkdir(parents=True)
    for number, plane in enumerate(values, start=8):
        path = folder / name.format(number)
        Image.fromarray(plane).save(path) if path.suffix == ".png" else tifffile.imwrite(path, plane)


@pytest.mark.parametrize("labels", ["whole", "truth/a_ink.tif", "truth_slices"])
@pytest.mark.parametrize("predictions", ["half", "half/a_ink.tif", "half_slices"])
@pytest.mark.parametrize("name", ["{}.png", "plane_{:03}.tif"])
def test_a_folder_of_slices_is_scored_as_the_volume_that_it_is(tmp_path, name, predictions, labels):
    truth = np.zeros((6, 12, 10), np.uint8)
    truth[2:4, 4:8, 2:6] = 1
    half = truth.copy()
    half[2] = 0
    for part, values in (("truth", truth), ("half", half)):
        write(tmp_path / part / "a_ink.tif", values)
        write_slices(tmp_path / f"{part}_slices", values, name)
    write(tmp_path / "whole" / "labels" / "a_ink.tif", truth)

    def scores(found, right):
        request = EvaluateRequest(str(tmp_path / found), str(tmp_path / right), str(tmp_path / "out"))
        (row,) = evaluate(request).cases.values()
        return {key.partition("/")[2]: value for key, value in row.items()}

    found = scores(predictions, labels)
    assert found == scores("half/a_ink.tif", "truth/a_ink.tif")
    assert found["dice"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "cases", "targets"),
    [
        ("image{}_ink.png", {"image8", "image9", "image10"}, {"ink"}),
        ("image_class{}.png", {"image"}, {"class8", "class9", "class10"}),
    ],
)
def test_numbered_images_with_labels_of_their_names_stay_cases(tmp_path, name, cases, targets):
    planes = np.zeros((3, 12, 10), np.uint8)
    planes[:, 4:8, 2:6] = 1
    for part in ("found", "right"):
        write_slices(tmp_path / part, planes, name)
    request = EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "right"), str(tmp_path / "out"))
    evaluation = evaluate(request)
    assert set(evaluation.cases) == cases
    assert {case.target for case in evaluation.scored} == targets


def test_predictions_of_slices_in_2d_are_no_volume(tmp_path):
    """Their record says how values are stored, which a volume made of them would lack."""
    planes = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    write_slices(tmp_path / "scan", planes, "scan{}.png")
    checkpoint = save_checkpoint(tmp_path / "m.pth", 2, (8, 8))
    predict(PredictRequest(str(tmp_path / "scan"), str(checkpoint), str(tmp_path / "found"), format="tif"))
    write(tmp_path / "truth" / "scan_ink.tif", planes)
    with pytest.raises(VolumenError, match="expected labels named like scan10_ink"):
        evaluate(EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "truth"), str(tmp_path / "out")))


def test_the_command_takes_slices_in_black_and_white(tmp_path):
    truth = np.zeros((6, 12, 10), np.uint8)
    truth[2:4, 4:8, 2:6] = 255
    half = truth.copy()
    half[2] = 0
    for part, values in (("found", half), ("right", truth)):
        write_slices(tmp_path / part, values, "{}.png")
    command = f"evaluate -p {tmp_path}/found -l {tmp_path}/right -o {tmp_path}/out --metrics dice --quiet"
    assert main(command.split()) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["mean"] == {
        "label/dice": pytest.approx(2 / 3),
        "mean_dice": pytest.approx(2 / 3),
    }


def test_a_label_of_another_shape_is_refused(files):
    write(files / "data" / "labels" / "b_ink.tif", np.zeros((6, 12, 11), np.uint8))
    with pytest.raises(VolumenError, match=r"b_ink\.tif: expected shape \(6, 12, 10\).*found \(6, 12, 11\)"):
        evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out")))
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threshold": 2.0}, "--threshold: expected a probability above 0, at most 1, found 2.0"),
        ({"threshold": 0.0}, "--threshold: expected a probability above 0, at most 1, found 0.0"),
        ({"tolerance": -1.0}, "--tolerance: expected a length of at least 0"),
        ({"tolerance": float("nan")}, "--tolerance: expected a length"),
        ({"spacing": (1.0, 1.0)}, "--spacing: expected 3 sizes, one per axis, found 1.0, 1.0"),
        ({"spacing": (1.0, 0.0, 1.0)}, "--spacing: expected sizes above 0"),
        ({"metrics": ("dic",)}, "found dic; did you mean dice?"),
    ],
)
def test_numbers_out_of_range_are_told(files, wrong, said):
    with pytest.raises(VolumenError) as caught:
        evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out"), **wrong))
    assert said in str(caught.value)
    assert not (files / "out").exists()


def test_a_file_in_place_of_the_report_is_kept(files):
    (files / "out").write_text("mine")
    with pytest.raises(VolumenError, match="expected a folder for the report, found a file"):
        evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out")))
    assert (files / "out").read_text() == "mine"


def test_labels_of_other_names_are_told(files):
    with pytest.raises(VolumenError, match="nothing: no such file or folder"):
        evaluate(EvaluateRequest(str(files / "found"), str(files / "found" / "nothing"), str(files / "out")))


def test_the_interval_covers_the_mean_and_shrinks_with_cases():
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.7, 0.1, 8), rng.normal(0.7, 0.1, 200)
    narrow, wide = bootstrap(list(many)), bootstrap(list(few))
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * many.std() / np.sqrt(200), rel=0.15)
    assert bootstrap([0.5]) is None
    assert bootstrap([0.5, float("nan")]) is None


def test_the_command(files):
    parser = argparse.ArgumentParser()
    parser.set_defaults(quiet=False)
    add_evaluate_arguments(parser)
    arguments = parser.parse_args(
        [
            "-p",
            str(files / "found"),
            "-l",
            str(files / "data"),
            "-o",
            str(files / "out"),
            "--metrics",
            "dice,hd95",
        ]
    )
    assert run_evaluate(arguments) == 0
    assert set(json.loads((files / "out" / "metrics.json").read_text())["mean"]) == {
        "ink/dice", "ink/hd95", "mean_dice",
    }  # fmt: skip


def test_an_unfinished_prediction_is_not_scored(files):
    (files / "half" / "a.zarr" / ".volumen").mkdir(parents=True)
    (files / "half" / "a.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(VolumenError, match="is not finished; give the same volumen predict command again"):
        evaluate(EvaluateRequest(str(files / "half"), str(files / "data"), str(files / "out")))


def test_a_label_map_without_the_other_cases_classes_is_read_like_them(tmp_path):
    truth = np.zeros((4, 10, 10), np.uint8)
    truth[:, 2:5, 2:8], truth[:, 5:8, 2:8] = 1, 2
    for name, found in (("a", truth), ("b", truth), ("z", np.zeros_like(truth))):
        write(tmp_path / "found" / f"{name}_part.tif", found)
        write(tmp_path / "labels" / f"{name}_part.tif", truth)
    write(tmp_path / "found" / "extra_part.tif", truth)
    evaluation = evaluate(
        EvaluateRequest(str(tmp_path / "found"), str(tmp_path), str(tmp_path / "out"), metrics=("dice",))
    )
    assert set(evaluation.cases) == {"a", "b", "z"}
    assert evaluation.mean["part/dice/2"] == pytest.approx(2 / 3)
    assert evaluation.cases["z"]["part/dice/1"] == 0


def test_labels_without_a_prediction_and_predictions_without_a_label_are_told(files, caplog, capsys):
    (files / "found" / "b_ink.tif").unlink()
    truth = tifffile.imread(files / "found" / "a_ink.tif")
    write(files / "found" / "d_ink.tif", truth)
    write(files / "data" / "labels" / "a_other.tif", truth)  # of a target that nobody predicted
    command = ["evaluate", "-p", str(files / "found"), "-l", str(files / "data"), "-o", str(files / "out")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "means over 2 of 3 cases" in printed.out
    assert "labels without a prediction: b_ink; scored: 2 of 3 cases" in printed.err
    assert "predictions without a label: d_ink" in printed.err
    told = json.loads((files / "out" / "metrics.json").read_text())
    assert told["labels_without_prediction"] == ["b_ink"]
    assert told["predictions_without_label"] == ["d_ink"]
    assert told["scored"] == "2 of 3 cases"
    assert told["mean"]["ink/dice"] == pytest.approx(0.5)
    page = (files / "out" / "report.html").read_text()
    assert "b_ink" in page
    assert "2 of 3 cases" in page
    assert main([*command, "--require-all", "--quiet"]) == 1
    (files / "data" / "labels" / "b_ink.tif").unlink()
    (files / "found" / "d_ink.tif").unlink()
    assert main([*command, "--require-all", "--quiet"]) == 0
    assert json.loads((files / "out" / "metrics.json").read_text())["scored"] == "2 cases"


def test_many_missing_labels_are_counted(files, caplog):
    truth = tifffile.imread(files / "found" / "a_ink.tif")
    for number in range(14):
        write(files / "data" / "labels" / f"x{number:02}_ink.tif", truth)
    evaluation = evaluate(EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out")))
    assert "x09_ink and 4 more; scored: 3 of 17 cases" in caplog.text
    assert len(evaluation.unpredicted) == 14


def scored(tmp_path, found, truth, **options):
    write(tmp_path / "found" / "a_ink.tif", found)
    write(tmp_path / "labels" / "a_ink.tif", truth)
    request = EvaluateRequest(
        str(tmp_path / "found"), str(tmp_path / "labels"), str(tmp_path / "out"), metrics=("dice",), **options
    )
    return evaluate(request).mean


def test_a_class_that_no_prediction_has_is_missed(tmp_path):
    found = np.repeat(np.arange(3, dtype=np.uint8), 16).reshape(6, 8)
    truth = found.copy()
    truth[:1] = 3
    mean = scored(tmp_path, found, truth)
    assert mean["ink/dice/3"] == 0
    assert mean["ink/dice"] == pytest.approx((1 + 1 + 0) / 3)


def test_a_negative_label_is_refused_unless_it_is_ignored(tmp_path):
    truth = np.zeros((6, 8), np.int16)
    truth[:2], truth[4:] = 1, -1
    found = (truth != 0).astype(np.uint8)
    with pytest.raises(VolumenError, match=r"expected 0 for background .* found -1; .*--ignore-label"):
        scored(tmp_path, found, truth)
    assert scored(tmp_path, found, truth, ignore_label=-1)["ink/dice"] == 1


def test_a_value_that_is_no_class_is_refused_unless_it_is_ignored(tmp_path):
    found = np.repeat(np.arange(3, dtype=np.uint8), 16).reshape(6, 8)
    truth = found.copy()
    truth[4:] = 255
    with pytest.raises(VolumenError, match=r"expected classes 0 to 2, found 255; .*--ignore-label"):
        scored(tmp_path, found, truth)
    assert scored(tmp_path, found, truth, ignore_label=255)["ink/dice/1"] == 1


def test_a_mask_of_negative_values_and_nan_counts_nowhere(files):
    mask = np.where(mask_of_b(), 2.0, -1.0).astype(np.int16)
    write(files / "data" / "masks" / "b.tif", mask)
    request = EvaluateRequest(str(files / "found"), str(files / "data"), str(files / "out"))
    assert evaluate(request).cases["b"]["ink/dice"] == 1
    write(files / "data" / "masks" / "b.tif", mask[:, :5])
    with pytest.raises(VolumenError, match=r"b\.tif: expected shape"):
        evaluate(request)
