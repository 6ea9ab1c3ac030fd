"""`volumen suggest`: boxes to paint, what is taken back of them, and the training that starts from them."""

from __future__ import annotations

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from data_folders import image_of, write_tiff_folder
from suggestion_case import SHAPE, TRAIN, TRUTH, paint, request_of, train_sparsely

from volumen.cli.main import main
from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.inference.predictor import load_predictor
from volumen.suggestion.accept import accept
from volumen.suggestion.record import read_record
from volumen.suggestion.request import AcceptRequest, SuggestRequest
from volumen.suggestion.suggest import suggest
from volumen.utils.errors import VolumenError


def snapshot(folder):
    """Return the bytes of every file below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_sparsely(tmp_path_factory.mktemp("suggest"))


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def suggested(trained):
    output = trained / "suggestions"
    suggest(request_of(trained, output))
    return output


@pytest.fixture
def painted(suggested, tmp_path):
    """A copy of the suggestions, every box painted with the truth and marked as done."""
    folder = tmp_path / "painted"
    shutil.copytree(suggested, folder)
    for box in read_record(folder).boxes:
        paint(folder, box, TRUTH[box.volume][tuple(slice(*side) for side in box.box)])
        (folder / "boxes" / box.folder / "done").touch()
    return folder


def test_what_is_written_lies_where_the_box_lies(suggested, trained):
    record = read_record(suggested)
    rows = list(csv.DictReader((suggested / "suggestions.csv").open()))
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4]
    assert (suggested / "overview.png").read_bytes()[:4] == b"\x89PNG"
    known = {"a": np.s_[:8, :12, :16], "b": np.s_[:8, :12, :16], "c": np.s_[:0]}
    for box, row in zip(record.boxes, rows, strict=True):
        inside = tuple(slice(*side) for side in box.box)
        label = open_volume(suggested / "boxes" / box.folder / "ink.zarr")
        assert label.shape == (8, 8, 8)
        assert label.geometry.origin == tuple(float(start) for start, _ in box.box)
        image = open_volume(suggested / "boxes" / box.folder / "image.zarr")
        start = [int(value) for value in image.geometry.origin]
        there = tuple(slice(s, s + n) for s, n in zip(start, image.shape, strict=True))
        around = image_of(TRUTH[box.volume])
        assert np.array_equal(image.read(tuple(slice(0, n) for n in image.shape))[0], around[there])
        probability = zarr.open_array(
            suggested / "predictions" / f"{box.volume}.zarr" / "ink" / "0", mode="r"
        )
        expected = (np.asarray(probability[inside]) >= 128).astype(np.uint8)
        truth, mask = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, bool)
        mask[known[box.volume]] = True
        truth[mask] = TRUTH[box.volume][mask]
        expected = np.where(mask[inside], truth[inside], expected)
        found = label.read(tuple(slice(0, n) for n in label.shape))[0]
        assert np.array_equal(found, expected), "earlier labels where known, the prediction elsewhere"
        assert mask[inside].mean() <= 0.1
        assert [int(row[f"first_{axis}"]) for axis in "zyx"] == [start for start, _ in box.box]
        assert float(row["share ink"]) == pytest.approx(
            np.asarray(probability[inside]).mean() / 255, abs=1e-4
        )


def test_a_second_call_changes_nothing_and_another_request_is_refused(suggested, trained):
    before = snapshot(suggested)
    found = suggest(request_of(trained, suggested))
    assert found == read_record(suggested)
    with pytest.raises(VolumenError, match=r"another request \(number, seed\), perhaps painted"):
        suggest(request_of(trained, suggested, number=3, seed=1))
    assert snapshot(suggested) == before


def test_an_interrupted_call_goes_on(trained, suggested, tmp_path, monkeypatch):
    import volumen.suggestion.suggest as module

    output = tmp_path / "s"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_overview", stop)
        with pytest.raises(KeyboardInterrupt):
            suggest(request_of(trained, output))
    assert not (output / "suggestions.json").exists()
    with monkeypatch.context() as patch:
        # Neither windows nor tables are computed again.
        patch.setattr(module, "measure", stop)
        patch.setattr(module.Progress, "__call__", stop)
        found = suggest(request_of(trained, output), progress=lambda *_: None)
    assert found.boxes == read_record(suggested).boxes


def test_the_loop_from_a_network_to_a_finer_one(painted, trained, tmp_path):
    data, new = trained / "data", tmp_path / "new"
    before = snapshot(data)
    report = accept(AcceptRequest(str(painted), str(data), str(new)))
    assert snapshot(data) == before
    record = read_record(painted)
    cases = {case.name: case for case in open_cases(discover(new, allow_unlabeled=True))}
    total = 0
    whole = tuple(slice(0, n) for n in SHAPE)
    for name, case in cases.items():
        earlier = np.zeros(SHAPE, bool)
        if name != "c":
            earlier[:8, :12, :16] = True
        mask = earlier.copy()
        for box in record.boxes:
            if box.volume == name:
                mask[tuple(slice(*side) for side in box.box)] = True
        total += int((mask & ~earlier).sum())
        if not mask.any():
            assert not case.labels
            continue
        assert np.array_equal(case.masks["ink"].read(whole)[0] > 0, mask)
        assert np.array_equal(case.labels["ink"].read(whole)[0], TRUTH[name] * mask)
        assert np.array_equal(case.image.read(whole)[0], image_of(TRUTH[name]))
    assert report.new == {"ink": total}
    assert total == 4 * 8**3 - sum(int(np.prod(overlap_with_known(box))) for box in record.boxes)
    words = [
        "train",
        "-i",
        str(new),
        "-o",
        str(tmp_path),
        "--finetune",
        str(trained / "model" / "model_best.pth"),
    ]
    assert main([*words, *TRAIN]) == 0
    # The next round writes into the folder that the first one made.
    again = tmp_path / "again"
    found = suggest(SuggestRequest(str(tmp_path / "model"), str(new), str(again), 2, (8, 8, 8), device="cpu"))
    for box in found.boxes:
        paint(again, box, TRUTH[box.volume][tuple(slice(*side) for side in box.box)])
    assert accept(AcceptRequest(str(again), str(new), boxes=(1,))).new["ink"] > 0
    box = found.boxes[0]
    inside = tuple(slice(*side) for side in box.box)
    (case,) = [case for case in open_cases(discover(new, allow_unlabeled=True)) if case.name == box.volume]
    assert (case.masks["ink"].read(inside) > 0).all()
    assert np.array_equal(case.labels["ink"].read(inside)[0], TRUTH[box.volume][inside])
    assert accept(AcceptRequest(str(again), str(new), boxes=(1,))).new["ink"] == 0, "all of it is there"


def overlap_with_known(box):
    if box.volume == "c":
        return (0,)
    return [max(0, min(stop, n) - start) for (start, stop), n in zip(box.box, (8, 12, 16), strict=True)]


def test_only_boxes_marked_as_done_are_taken(suggested, painted, trained, tmp_path):
    with pytest.raises(VolumenError, match="marked as painted"):
        accept(AcceptRequest(str(suggested), str(trained / "data"), str(tmp_path / "new")))
    record = read_record(painted)
    for box in record.boxes[1:]:
        (painted / "boxes" / box.folder / "done").unlink()
    assert accept(AcceptRequest(str(painted), str(trained / "data"), str(tmp_path / "new"))).boxes == (1,)
    with pytest.raises(VolumenError, match="ranks 1 to 4, found 7"):
        accept(AcceptRequest(str(painted), str(trained / "data"), str(tmp_path / "n"), boxes=(7,)))


def test_files_of_the_user_are_never_changed(painted, trained, tmp_path):
    data = trained / "data"
    before = snapshot(data)
    with pytest.raises(VolumenError, match="is a file of yours"):
        accept(AcceptRequest(str(painted), str(data), boxes=ranks_in(painted, "ab")))
    assert snapshot(data) == before
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    with pytest.raises(VolumenError, match="a new or empty folder"):
        accept(AcceptRequest(str(painted), str(data), str(full)))


def ranks_in(folder, names):
    return tuple(box.rank for box in read_record(folder).boxes if box.volume in names)


def test_new_labels_may_lie_beside_the_images(painted, trained, tmp_path):
    ranks = ranks_in(painted, "c")
    assert ranks, "the seed suggests a box in the volume without labels"
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    before = snapshot(data)
    accept(AcceptRequest(str(painted), str(data), boxes=ranks))
    after = snapshot(data)
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(data).parts[:2] for path in set(after) - set(before)} == {
        ("labels", "c_ink.zarr"), ("masks", "c_ink.zarr")
    }  # fmt: skip


@pytest.mark.parametrize("flag", [False, True])
def test_earlier_labels_stay_unless_a_flag_says_otherwise(trained, tmp_path, caplog, flag):
    folder = tmp_path / "s"
    suggest(request_of(trained, folder, max_labelled=0.9, strategy="random", number=12))
    record = read_record(folder)
    box = max(record.boxes, key=lambda box: np.prod(overlap_with_known(box)))
    count = int(np.prod(overlap_with_known(box)))
    assert count > 0
    inside = tuple(slice(*side) for side in box.box)
    opposite = 1 - TRUTH[box.volume][inside]
    paint(folder, box, opposite)
    new = tmp_path / "new"
    request = AcceptRequest(str(folder), str(trained / "data"), str(new), (box.rank,), overwrite_labels=flag)
    report = accept(request)
    assert report.kept.get("ink", 0) == (0 if flag else count)
    assert report.replaced.get("ink", 0) == (count if flag else 0)
    assert (f"{count} earlier label" in caplog.text) == (not flag)
    (case,) = [c for c in open_cases(discover(new, allow_unlabeled=True)) if c.name == box.volume]
    known = np.zeros(SHAPE, bool)
    known[:8, :12, :16] = True
    expected = np.where(known[inside] & (not flag), TRUTH[box.volume][inside], opposite)
    assert np.array_equal(case.labels["ink"].read(inside)[0], expected)


def spoil_shape(folder, box):
    path = folder / "boxes" / box.folder / "ink.zarr"
    shutil.rmtree(path)
    tifffile.imwrite(path.with_suffix(".tif"), np.ones((8, 8, 7), np.uint8))


def spoil_values(folder, box):
    paint(folder, box, np.full((8, 8, 8), 3))


def spoil_place(folder, box):
    path = folder / "boxes" / box.folder / "ink.zarr" / "zarr.json"
    content = json.loads(path.read_text())
    steps = content["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    steps[1]["translation"] = [start + 2.0 for start, _ in box.box]
    path.write_text(json.dumps(content))


def spoil_by_another(folder, box):
    tifffile.imwrite(folder / "boxes" / box.folder / "ink.tif", np.ones((8, 8, 8), np.uint8))


def spoil_by_absence(folder, box):
    shutil.rmtree(folder / "boxes" / box.folder / "ink.zarr")


def spoil_fractions(folder, box):
    path = folder / "boxes" / box.folder / "ink.zarr"
    shutil.rmtree(path)
    tifffile.imwrite(path.with_suffix(".tif"), np.full((8, 8, 8), 0.5, np.float32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shape, r"expected shape \(8, 8, 8\) of the box"),
        (spoil_values, "expected the values 0, 1 of ink, found 3"),
        (spoil_place, "expected the place of the box"),
        (spoil_by_another, "expected one painted label"),
        (spoil_by_absence, "expected one painted label"),
        (spoil_fractions, "whole numbers"),
    ],
)
def test_a_label_that_is_not_that_of_its_box_is_refused_before_anything_is_written(
    painted, trained, tmp_path, spoil, message
):
    spoil(painted, read_record(painted).boxes[-1])
    with pytest.raises(VolumenError, match=message):
        accept(AcceptRequest(str(painted), str(trained / "data"), str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*tmp"))


def test_a_label_painted_in_another_program_is_taken_from_its_file(painted, trained, tmp_path):
    box = read_record(painted).boxes[0]
    path = painted / "boxes" / box.folder / "ink.zarr"
    shutil.rmtree(path)
    truth = TRUTH[box.volume][tuple(slice(*side) for side in box.box)]
    tifffile.imwrite(path.with_suffix(".tif"), truth.astype(np.int32))
    accept(AcceptRequest(str(painted), str(trained / "data"), str(tmp_path / "new"), (1,)))


def test_other_data_are_refused(painted, trained, tmp_path):
    other = write_tiff_folder(
        tmp_path / "other", {"a": {"ink": TRUTH["a"][:8]}, "b": {"ink": TRUTH["b"][:8]}}
    )
    with pytest.raises(
        VolumenError, match=r"as when the boxes were suggested|the image c of the suggestions"
    ):
        accept(AcceptRequest(str(painted), str(other), str(tmp_path / "new")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 0}, "-n: expected at least 1"),
        ({"size": (8, 8)}, "--size: expected 3 sizes"),
        ({"size": (8, 0, 8)}, "--size: expected 3 sizes"),
        ({"target": ("paper",)}, "--target: expected among ink, found paper"),
        ({"beta": -1.0}, "--beta"),
        ({"max_labelled": 1.0}, "--max-labelled"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_predicted(trained, tmp_path, settings, message):
    with pytest.raises(VolumenError, match=message):
        suggest(request_of(trained, tmp_path / "s", **settings))
    assert not (tmp_path / "s").exists()


def test_a_box_larger_than_the_volume_is_the_whole_axis(trained, tmp_path, caplog):
    found = suggest(request_of(trained, tmp_path / "s", size=(64, 24, 8), number=50, max_labelled=0.9))
    assert {box.box[0] for box in found.boxes} == {(0, 16)}
    assert f"only {len(found.boxes)} of 50 boxes" in caplog.text


def test_a_finished_folder_is_said_to_be_finished(trained, tmp_path):
    data = write_tiff_folder(tmp_path / "data", {"a": {"ink": TRUTH["a"]}})
    request = SuggestRequest(
        str(trained / "model"), str(data), str(tmp_path / "s"), 2, (8, 8, 8), device="cpu"
    )
    with pytest.raises(VolumenError, match="labelled already"):
        suggest(request)


def test_targets_without_probabilities_and_of_instances_are_refused(trained):
    from volumen.suggestion.subject import find_subjects

    predictor = load_predictor(next((trained / "model").glob("*_best.pth")))
    predictor.config["dataset_config"]["targets"]["ink"]["instances"] = "foreground"
    with pytest.raises(VolumenError, match="number instances"):
        find_subjects(predictor, None)
    with pytest.raises(VolumenError, match="number instances"):
        find_subjects(predictor, ("ink",))


def test_flags_of_the_other_use_are_refused(trained, capsys):
    assert main(["suggest", "--boxes", "1", "-m", "x", "-i", "x", "-o", "x"]) == 2
    assert "--boxes: belongs to --accept" in capsys.readouterr().err
    assert main(["suggest", "--accept", "x", "-i", "x", "--seed", "1"]) == 2
    assert "--seed: does not belong to --accept" in capsys.readouterr().err
    assert main(["suggest", "-i", "x", "-o", "x"]) == 2
    assert "-m: missing" in capsys.readouterr().err


def test_a_placed_image_of_nifti_gets_labels_on_its_grid(trained, tmp_path):
    data, truth = tmp_path / "data", TRUTH["a"]
    (data / "images").mkdir(parents=True)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (90, -20, 7)
    volume = nibabel.Nifti1Image(image_of(truth).T, affine)
    volume.header.set_xyzt_units("mm")
    nibabel.save(volume, data / "images" / "a.nii.gz")
    folder = tmp_path / "s"
    found = suggest(
        SuggestRequest(str(trained / "model"), str(data), str(folder), 2, (8, 8, 8), device="cpu")
    )
    for box in found.boxes:
        label = open_volume(folder / "boxes" / box.folder / "ink.zarr")
        assert label.geometry.spacing == (3.0, 2.0, 2.0)
        assert label.unit == "millimeter"
        paint(folder, box, truth[tuple(slice(*side) for side in box.box)])
    accept(AcceptRequest(str(folder), str(data), boxes=(1, 2)))
    (case,) = open_cases(discover(data))
    mask = case.masks["ink"].read(tuple(slice(0, n) for n in SHAPE))[0] > 0
    assert mask.sum() == 2 * 8**3
    label = case.labels["ink"].read(tuple(slice(0, n) for n in SHAPE))[0]
    assert np.array_equal(label, truth * mask)
    assert case.spacing == (3.0, 2.0, 2.0)


@pytest.mark.parametrize("masked", [False, True])
def test_with_a_loss_on_labels_only_a_painted_box_is_not_suggested_again(
    trained, tmp_path, monkeypatch, masked
):
    predictor = load_predictor(next((trained / "model").glob("*_best.pth")))
    predictor.config["tr_setup"]["compute_loss_on_labeled_only"] = True
    monkeypatch.setattr("volumen.suggestion.suggest.load_model", lambda *_, **__: predictor)
    label = np.zeros(SHAPE, np.uint8)
    label[:8, :8, :8] = 1
    masks = {"a": {"ink": np.ones(SHAPE, np.uint8)}} if masked else None
    data = write_tiff_folder(tmp_path / "data", {"a": {"ink": label}}, masks=masks)
    boxes, earlier = [], np.zeros(SHAPE, bool)
    for step in range(3):
        folder = tmp_path / f"s{step}"
        request = SuggestRequest(
            "m", str(data), str(folder), 4, (8, 8, 8), seed=step, max_labelled=0.0, device="cpu"
        )
        found = suggest(request).boxes
        for box in found:
            inside = tuple(slice(*side) for side in box.box)
            assert not label[inside].any()
            assert not earlier[inside].any(), "it was painted in an earlier round"
            earlier[inside] = True
            paint(folder, box, np.zeros((8, 8, 8)))
        boxes += found
        accept(
            AcceptRequest(
                str(folder), str(data), str(tmp_path / f"d{step}"), tuple(box.rank for box in found)
            )
        )
        data = tmp_path / f"d{step}"
    (case,) = open_cases(discover(data))
    whole = tuple(slice(0, n) for n in SHAPE)
    assert np.array_equal(case.labels["ink"].read(whole)[0], label), "nothing but background was painted"
    assert np.array_equal(case.masks["ink"].read(whole)[0] > 0, earlier | (label > 0))


@pytest.mark.parametrize("where", ["beside", "new"])
def test_a_failure_while_writing_leaves_nothing(painted, trained, tmp_path, monkeypatch, where):
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    before = snapshot(data)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("volumen.suggestion.store._unmask", fail)
    output = str(tmp_path / "new") if where == "new" else None
    with pytest.raises(OSError, match="No space"):
        accept(AcceptRequest(str(painted), str(data), output, ranks_in(painted, "c")))
    assert snapshot(data) == before
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "another version", "a target without its form"])
def test_a_damaged_record_is_named(painted, trained, tmp_path, damage):
    path = painted / "suggestions.json"
    content = json.loads(path.read_text())
    if damage == "another version":
        content["volumen_suggestions"] = 0
    if damage == "a target without its form":
        del content["targets"]["ink"]["values"]
    path.write_text(path.read_text()[:-9] if damage == "cut" else json.dumps(content))
    with pytest.raises(VolumenError, match=r"suggestions\.json"):
        accept(AcceptRequest(str(painted), str(trained / "data"), str(tmp_path / "new")))
