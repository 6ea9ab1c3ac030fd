"""The data of a tuning: those of other programs, and several folders, give the scores of one folder in our layout."""

from __future__ import annotations

import csv
import shutil

import pytest
from data_folders import SHORT, ball, write_tiff_folder
from test_raw_dataset import nnunet

from volumen.cli.main import main

TUNE = ["--score", "dice", "--thresholds", "0.3,0.5", "--fill-holes", "0", "--min-sizes", "0"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def trained(folders, tmp_path, validates, patch):
    words = [word for folder in folders for word in ("-i", str(folder))]
    small = ["--set", "model_config.features_per_stage=[4,8]", "--batch-size", "1", "--patch-size", patch]
    assert (
        main(["train", *words, "-o", str(tmp_path / "out"), "--val-volumes", validates, *SHORT, *small]) == 0
    )
    return tmp_path / "out" / "model" / "model_1.pth"


def tuned(checkpoint, folders, output):
    words = [word for folder in folders for word in ("-i", str(folder))]
    code = main(["tune", "-m", str(checkpoint), *words, "-o", str(output), *TUNE])
    assert code == 0
    with (output / "model_tuning.csv").open(encoding="utf-8") as file:
        return [
            {key: value for key, value in row.items() if key != "checkpoint"} for row in csv.DictReader(file)
        ]


def test_raw_data_of_nnunet_are_tuned_as_the_same_files_in_our_layout(tmp_path):
    raw, ours = tmp_path / "Dataset001", tmp_path / "ours"
    nnunet(raw, {"labels": {"background": 0, "organ": 1}}, channels=1, values=(1,))
    for part, ending, goal in (("imagesTr", "_0000", "images"), ("labelsTr", "", "labels")):
        (ours / goal).mkdir(parents=True)
        for number in range(3):
            name = f"case_{number:03d}"
            target = f"{name}.nii.gz" if goal == "images" else f"{name}_label.nii.gz"
            shutil.copy(raw / part / f"{name}{ending}.nii.gz", ours / goal / target)
    checkpoint = trained([raw], tmp_path, "case_001", "8,16,16")
    rows = tuned(checkpoint, [raw], tmp_path / "one")
    assert len(rows) == 2
    assert rows == tuned(checkpoint, [ours], tmp_path / "two")
    (raw / "labelsTr" / "case_001.nii.gz").unlink()
    assert main(["tune", "-m", str(checkpoint), "-i", str(raw), "-o", str(tmp_path / "three"), *TUNE]) == 2


def test_several_folders_are_tuned_as_one(tmp_path):
    shape = (16, 24, 24)
    label = {name: ball(shape, radius) for name, radius in (("a", 0.3), ("b", 0.4), ("c", 0.35))}
    first = write_tiff_folder(tmp_path / "first", {"a": {"ball": label["a"]}})
    second = write_tiff_folder(tmp_path / "second", {n: {"ball": label[n]} for n in "bc"})
    whole = write_tiff_folder(tmp_path / "whole", {n: {"ball": label[n]} for n in "abc"})
    checkpoint = trained([first, second], tmp_path, "a,b", "8,16,16")
    rows = tuned(checkpoint, [first, second], tmp_path / "one")
    assert rows == tuned(checkpoint, [whole], tmp_path / "two")
