"""Rounds of self-training: calibrated pseudo-labels beside a person's labels, and rounds that go on after a kill."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
import zarr
from suggestion_case import SHAPE, TRAIN, train_sparsely

from volumen.cli import rounds as command
from volumen.cli.main import main
from volumen.cli.rounds import Rounds
from volumen.config.experiment_file import shipped_sections
from volumen.config.manager import ConfigManager
from volumen.config.unlabelled import find_pseudo_labelled_patches
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.layout import OpenCase
from volumen.data.pseudo_labels import with_pseudo_labels
from volumen.data.validity import known_voxels
from volumen.suggestion.pseudo_labels import FULL, blocks, decide, least_confidence, write_pseudo_labels
from volumen.utils.errors import VolumenError

WHOLE = tuple(slice(0, size) for size in SHAPE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_sparsely(tmp_path_factory.mktemp("pseudo"))


def array_of(folder, kind, name):
    return np.asarray(zarr.open_array(folder / kind / f"{name}_ink.zarr" / "0", mode="r")[...])


def test_pseudo_labels_are_the_confident_predictions_of_the_unlabelled_training_part(trained, tmp_path):
    output = tmp_path / "pseudo"
    record = write_pseudo_labels(trained / "model", output, "cpu", precision=0.5)
    split = json.loads((trained / "model" / "model_split.json").read_text())
    held_out = set(split["val"])
    assert held_out <= {"a", "b"}
    limits = {int(k): v for k, v in record["thresholds"]["ink"].items()}
    counts = np.zeros(2)
    for name in "abc":
        if name in held_out:
            assert not (output / "masks" / f"{name}_ink.zarr").exists()
            continue
        stored = np.asarray(
            zarr.open_array(output / "predictions" / f"{name}.zarr" / "ink" / "0", mode="r")[...]
        )
        label, mask = array_of(output, "labels", name), array_of(output, "masks", name)
        inside = stored >= 128
        sure = np.where(inside, stored, 255 - stored.astype(int)) / FULL
        expected = np.zeros(SHAPE, bool)
        for number, limit in limits.items():
            expected |= (inside == number) & (limit is not None and sure >= (limit or 0) - 1e-9)
        if name != "c":
            expected[:8, :12, :16] = False  # a person labelled this
        assert np.array_equal(mask != 0, expected)
        assert np.array_equal(label[expected], inside[expected])
        assert not label[~expected].any()
        counts += [(label[expected] == number).sum() for number in (0, 1)]
    shares = record["shares"]["ink"]
    assert [shares["0"], shares["1"]] == pytest.approx((counts / max(1, counts.sum())).tolist())
    assert sorted(path.name for path in (output / "images").iterdir()) == ["a.tif", "b.tif", "c.tif"]
    # A second call changes nothing, and one that was interrupted after a volume ends with the same volumes.
    before = {path: path.read_bytes() for path in sorted(output.rglob("c/*")) if path.is_file()}
    (output / "pseudo_labels.json").unlink()
    assert write_pseudo_labels(trained / "model", output, "cpu", precision=0.5) == record
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_without_validation_part_is_refused(trained, tmp_path):
    run = tmp_path / "model"
    run.mkdir()
    for path in (trained / "model").iterdir():
        if path.is_file():
            (run / path.name).symlink_to(path)
    (run / "model_split.json").unlink()
    split = json.loads((trained / "model" / "model_split.json").read_text())
    (run / "model_split.json").write_text(json.dumps({**split, "val": {}}))
    with pytest.raises(VolumenError, match="no validation part"):
        write_pseudo_labels(run, tmp_path / "out", "cpu")


def test_nothing_is_written_where_no_class_is_precise(trained, tmp_path):
    with pytest.raises(VolumenError, match="label more"):
        write_pseudo_labels(trained / "model", tmp_path / "out", "cpu", precision=1.01)
    assert not (tmp_path / "out" / "labels").exists()


def test_the_least_confidence_by_a_second_implementation():
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(20):
        sure = rng.integers(128, 256, 4000)
        right = rng.random(4000) < (sure - 100) / 156
        counts = np.zeros((FULL + 1, 2), np.int64)
        np.add.at(counts, (sure, right.astype(int)), 1)
        for precision, others in (
            (0.5, 10**6),
            (0.8, 10**6),
            (0.95, 10**6),
            (1.0, 10**6),
            (0.8, 300),
            (0.8, 20),
        ):
            expected = None
            for limit in range(FULL + 1):
                kept = right[sure >= limit]
                wrong = (~kept).sum()
                if len(kept) >= 100 and wrong <= (1 - precision) * min(len(kept), others) + 1e-6:
                    expected = limit
                    break
            assert least_confidence(counts, precision, others) == expected
            found.add(expected)
    assert len(found) > 10


def test_background_is_not_taken_where_objects_are_missed():
    # 2 % of what is called background are missed objects, half of all object voxels: precise, and yet useless.
    counts = np.zeros((FULL + 1, 2), np.int64)
    counts[140] = 200, 1000
    counts[250] = 2, 9000
    assert least_confidence(counts, 0.95, 10**6) == 0
    assert least_confidence(counts, 0.95, 400) == 141


def test_too_few_voxels_have_no_threshold():
    counts = np.zeros((FULL + 1, 2), np.int64)
    counts[255, 1] = 99
    assert least_confidence(counts, 0.5, 1000) is None
    counts[255, 1] = 100
    assert least_confidence(counts, 0.5, 1000) == 0


def test_decisions_and_confidence():
    binary = SimpleNamespace(head=SimpleNamespace(activation="sigmoid"))
    found, sure = decide(binary, np.array([[0, 127, 128, 255]], np.uint8))
    assert (found.tolist(), sure.tolist()) == ([0, 0, 1, 1], [255, 128, 128, 255])
    classes = SimpleNamespace(head=SimpleNamespace(activation="softmax"))
    found, sure = decide(classes, np.array([[10, 200], [100, 30], [145, 25]], np.uint8))
    assert (found.tolist(), sure.tolist()) == ([2, 0], [145, 200])


@pytest.mark.parametrize("box", [((3, 300), (0, 5), (120, 257)), ((0, 2000), (1023, 1025))])
def test_blocks_cover_a_box_once(box):
    seen = np.zeros([stop for _, stop in box], int)
    for region in blocks(box):
        seen[region] += 1
    inside = tuple(slice(*span) for span in box)
    assert (seen[inside] == 1).all()
    assert seen.sum() == seen[inside].sum()


@pytest.mark.parametrize(
    ("labelled", "masked", "ignore"),
    [(True, True, None), (True, True, 2), (True, False, 2), (False, False, None)],
)
def test_a_persons_label_takes_precedence(labelled, masked, ignore):
    rng = np.random.default_rng(0)
    shape = (6, 7, 8)
    label, pseudo = (rng.integers(0, 3, shape).astype(np.uint8) for _ in range(2))
    mask, trusted = ((rng.random(shape) < 0.5).astype(np.uint8) for _ in range(2))

    def opened(*arrays):
        return {"ink": ArrayVolume(arrays[0], axes="zyx")} if arrays else {}

    image = ArrayVolume(pseudo, axes="zyx")
    case = OpenCase("a", image, opened(label) if labelled else {}, opened(mask) if masked else {}, (1.0,) * 3)
    other = OpenCase("a", image, opened(pseudo), opened(trusted), (1.0,) * 3)
    joined = with_pseudo_labels(case, other, {} if ignore is None else {"ink": ignore})
    region = (slice(1, 5), slice(0, 7), slice(2, 8))
    found, valid = joined.labels["ink"].read(region)[0], joined.masks["ink"].read(region)[0] != 0
    own = (
        known_voxels(label[None], mask[None] if masked else None, ignore)
        if labelled
        else np.zeros(shape, bool)
    )
    own = (np.ones(shape, bool) if own is None else own)[region]
    assert np.array_equal(found, np.where(own, label[region], pseudo[region]))
    assert np.array_equal(valid, own | (trusted[region] != 0))


def test_patches_with_pseudo_labels_join_the_batch_of_labelled_ones(trained, tmp_path):
    from volumen.time_budget.measure import training_objects

    output = tmp_path / "pseudo"
    write_pseudo_labels(trained / "model", output, "cpu", precision=0.5)
    sections = shipped_sections()
    snapshot = yaml.safe_load((trained / "model" / "model_config.yaml").read_text())
    sections.update({name: snapshot[name] for name in sections})
    sections["tr_config"].update(unlabelled={"pseudo_labels": str(output), "ratio": 1.0})
    config = ConfigManager(
        **sections, dataset_dir=str(trained / "data"), output_dir=str(tmp_path), device="cpu"
    )
    assert not config.has_teacher
    assert config.ema_decay is None
    cases, index = find_pseudo_labelled_patches(config)
    allowed = {
        case.name: array_of(output, "masks", case.name) != 0
        for case in cases
        if (output / "masks" / f"{case.name}_ink.zarr").exists()
    }
    for row in range(len(index)):
        place = index.random_location(row, np.random.default_rng(row))
        inside = tuple(slice(s, s + p) for s, p in zip(place.start, place.size))
        assert cases[place.case].name in config.split.train
        assert allowed[cases[place.case].name][inside].any()
    batch = next(iter(training_objects(config).get_parsed_content("train#dataloader")))
    assert len(batch["image"]) == 4
    assert batch["ink_mask"].any(dim=4).any(dim=3).any(dim=2).all()
    labelled = training_objects(config).get_parsed_content("train#dataset")[(0, 0)]
    assert torch.equal(batch["image"][0], labelled["image"])


def words(trained, output, *more):
    flags = [*TRAIN[:-1], "--set", "tr_config.initial_lr=0.01"]
    return [
        "train",
        "-i",
        str(trained / "data"),
        "-o",
        str(output),
        "--rounds",
        "2",
        *flags,
        "--quiet",
        *more,
    ]


class Calls:
    """Runs the processes of rounds in this process, and fails at chosen calls as a kill does."""

    def __init__(self, fail=()):
        self.fail, self.made = set(fail), []

    def __call__(self, command, *, ends_with_parent=False):
        assert ends_with_parent
        given = list(command[len(command) - command[::-1].index("volumen.cli.member") :])
        self.made.append(given[0])
        if len(self.made) in self.fail:
            return 137
        if given[0] == "train":
            return main(given)
        write_pseudo_labels(Path(given[1]), Path(given[2]), given[3], precision=0.5)
        return 0


def test_rounds_go_on_after_a_kill_and_end_as_without_one(trained, tmp_path, monkeypatch):
    whole = Calls()
    monkeypatch.setattr(command, "run_passing_signals", whole)
    assert main(words(trained, tmp_path / "whole")) == 0
    assert whole.made == ["train", "pseudo", "train"]
    results = {}
    for stop in (2, 3):
        killed = Calls(fail=[stop])
        monkeypatch.setattr(command, "run_passing_signals", killed)
        assert main(words(trained, tmp_path / f"killed{stop}")) == 137
        usable = (tmp_path / f"killed{stop}" / "model" / "ensemble.json").is_file()
        assert usable == (stop == 2), "a round without pseudo-labels can be used nevertheless"
        assert main(words(trained, tmp_path / f"killed{stop}")) == 0
        expected = ["train", "pseudo", "train"]
        assert killed.made == [*expected[:stop], *expected[stop - 1 :]]
        results[stop] = tmp_path / f"killed{stop}" / "model"
    one = torch.load(tmp_path / "whole" / "model" / "round_2" / "round_2_final.pth", weights_only=True)[
        "model"
    ]
    for folder in results.values():
        two = torch.load(folder / "round_2" / "round_2_final.pth", weights_only=True)["model"]
        assert all(torch.equal(one[name], two[name]) for name in one)
    run = tmp_path / "whole" / "model"
    splits = [json.loads((run / f"round_{n}" / f"round_{n}_split.json").read_text()) for n in (1, 2)]
    assert splits[0]["val"] == splits[1]["val"]
    assert splits[0]["train"] == splits[1]["train"]
    assert json.loads((run / "ensemble.json").read_text())["members"][0] in ("round_1", "round_2")
    # Nothing of the data has changed, and other settings are refused.
    assert sorted(path.name for path in (trained / "data" / "labels").iterdir()) == ["a_ink.tif", "b_ink.tif"]
    monkeypatch.setattr(command, "run_passing_signals", whole)
    assert main(words(trained, tmp_path / "whole", "--set", "tr_config.initial_lr=0.02")) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "1"], "at least 2"),
        (["--folds", "2"], "does not go with --folds"),
        (["--loss-on-label-only"], "teaches no background"),
        (["--set", "dataset_config.target_spacing=auto"], "pseudo-labels lie"),
        (["--set", "tr_config.unlabelled.pseudo_labels=x"], "is what --rounds writes"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(trained, tmp_path, capsys, more, message):
    assert main([*words(trained, tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_rounds_share_one_time_budget(tmp_path):
    made = Rounds(tmp_path, Namespace(), 3, 900.0, {"budgets": {}, "spent": 0.0})
    assert made._seconds_of(1) == pytest.approx(270)
    made.record["spent"] = 300.0
    assert made._seconds_of(1) == pytest.approx(270), "a continued round keeps its time"
    assert made._seconds_of(2) == pytest.approx(270)
    made.record["spent"] = 650.0
    assert made._seconds_of(3) == pytest.approx(250)
    late = Rounds(tmp_path, Namespace(), 3, 900.0, {"budgets": {"2": 1.0}, "spent": 890.0})
    assert [late.is_out_of_time(number) for number in (1, 2, 3)] == [False, False, True]
