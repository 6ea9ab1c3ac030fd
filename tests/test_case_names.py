"""A case of one channel is called as its label is, not by the number of its channel, in every command."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
from data_folders import SHORT
from test_raw_dataset import CLASSES, nifti, nnunet

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.datalist import layout_of
from volumen.data.sampling.groups import find_groups
from volumen.inference.jobs import case_name, volume_name
from volumen.utils.errors import VolumenError

CASES = ["case_000", "case_001", "case_002"]
SMALL = ["--patch-size", "8,8,8", "--set", "model_config.features_per_stage=[4, 8]", "--device", "cpu"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def one_channel(root, listed=False):
    nnunet(root, CLASSES, channels=1)
    if listed:  # as nnU-Net v1 lists them
        description = json.loads((root / "dataset.json").read_text())
        description["training"] = [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in CASES
        ]
        (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.mark.parametrize("listed", [False, True])
def test_the_case_has_the_name_of_its_label(tmp_path, listed):
    root = one_channel(tmp_path / "raw", listed)
    config = ConfigManager(dataset_dir=str(root), dataset_config={"val_volumes": ["case_001"]})
    assert [case.name for case in config.cases] == CASES
    assert list(config.split.val) == ["case_001"]
    assert sorted(config.split.train) == ["case_000", "case_002"]


@pytest.mark.parametrize(
    ("image", "label", "name"),
    [
        ("a_0000.nii.gz", "a.nii.gz", "a"),
        ("a_0001.nii.gz", "a.nii.gz", "a_0001"),  # no first channel
        ("a_0000.nii.gz", "a_0000.nii.gz", "a_0000"),
        ("a_0000.nii", "seg/b.nii", "a_0000"),
        ("x/a_0000.nii", "y/a.nii.gz", "a"),
    ],
)
def test_only_a_number_that_the_label_lacks_is_no_part_of_the_name(tmp_path, image, label, name):
    nifti(tmp_path / image, np.zeros((4, 4, 4), np.float32))
    assert layout_of([{"image": image, "label": label}], root=str(tmp_path)).cases[0].name == name


def test_what_names_cases_by_their_files_still_names_them(tmp_path):
    root = str(one_channel(tmp_path / "raw"))
    boxes = {"case_001_0000": [[[0, 16], [0, 24], [0, 20]]]}
    old = tmp_path / "old_split.json"
    old.write_text(json.dumps({"train": ["case_000_0000", "case_002_0000"], "val": boxes}))
    assert list(ConfigManager(dataset_dir=root, dataset_config={"split_path": str(old)}).split.val) == [
        "case_001"
    ]
    config = ConfigManager(dataset_dir=root, dataset_config={"val_volumes": ["case_002_0000"]})
    assert list(config.split.val) == ["case_002"]
    config = ConfigManager(dataset_dir=root, dataset_config={"volumes": ["case_000_0000", "case_001"]})
    assert [case.name for case in config.cases] == CASES[:2]
    table = tmp_path / "groups.csv"
    table.write_text("volume,group\ncase_000_0000.nii.gz,p\ncase_001_0000,p\ncase_002,q\n")
    assert find_groups(CASES, str(table)) == {"case_000": "p", "case_001": "p", "case_002": "q"}
    with pytest.raises(VolumenError, match="found 'case_009_0000'"):
        _ = ConfigManager(dataset_dir=root, dataset_config={"val_volumes": ["case_009_0000"]}).split
    old.write_text(json.dumps({"val": ["case_001_0000", "case_001"]}))
    with pytest.raises(VolumenError, match="names the volume 'case_001' twice"):
        _ = ConfigManager(dataset_dir=root, dataset_config={"split_path": str(old)}).split


def test_a_prediction_has_the_name_that_nnunet_writes(tmp_path):
    def folder(name, *files):
        for file in files:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).touch()
        return str(tmp_path / name / files[0])

    assert volume_name(folder("imagesTs", "c_0000.nii.gz")) == "c"
    assert volume_name(folder("input", "c_0000.nii.gz", "d_0000.nii.gz")) == "c"
    alone = folder("alone", "c_0000.nii.gz")
    assert (volume_name(alone), case_name(alone, 1), case_name(alone)) == ("c_0000", "c", "c_0000")
    # The layout of images/ and labels/ names labels after the whole image, and a slice has a number too.
    assert volume_name(folder("images", "c_0000.nii.gz", "d_0000.nii.gz")) == "c_0000"
    assert volume_name(folder("slices", "s_0000.tif", "s_0001.tif")) == "s_0000"
    folder("slices2", "s_0000.tif", "s_0001.tif")
    (tmp_path / "slices2" / "s_0001.tif").unlink()
    folder("slices2", "t_0000.tif")
    assert volume_name(str(tmp_path / "slices2" / "t_0000.tif")) == "t"  # the folder is read again


def test_all_commands_call_the_case_by_its_name(tmp_path, capsys):
    root = one_channel(tmp_path / "raw")
    run = tmp_path / "out" / "model"
    train = ["train", "-i", str(root), "-o", str(tmp_path / "out"), *SMALL, *SHORT, "--batch-size", "1"]
    assert main([*train, "--val-volumes", "case_001"]) == 0
    split = run / "model_split.json"
    content = json.loads(split.read_text())
    assert (sorted(content["train"]), sorted(content["val"])) == (["case_000", "case_002"], ["case_001"])
    # A run of the time when the split named files goes on, and its validation part is found.
    content["train"] = {f"{name}_0000": boxes for name, boxes in content["train"].items()}
    content["val"] = {f"{name}_0000": boxes for name, boxes in content["val"].items()}
    split.write_text(json.dumps(content))
    assert main([*train, "--val-volumes", "case_001", "--resume"]) == 0
    predict = ["predict", "-m", str(run), "--dtype", "labels", "--device", "cpu"]
    output = tmp_path / "p"
    assert main([*predict, "-i", str(root / "imagesTr"), "-o", str(output), "--format", "nifti"]) == 0
    assert sorted(path.name for path in output.glob("*.nii.gz")) == [f"{c}_label.nii.gz" for c in CASES]
    zarr = tmp_path / "zarr"
    shutil.copytree(root / "imagesTr", tmp_path / "input")
    assert main([*predict, "-i", str(tmp_path / "input"), "-o", str(zarr)]) == 0
    assert sorted(path.name for path in zarr.glob("*.zarr")) == [f"{c}.zarr" for c in CASES]
    for predictions in (output, zarr):
        report = tmp_path / f"report_{predictions.name}"
        assert main(["evaluate", "-p", str(predictions), "-l", str(root), "-o", str(report)]) == 0
        assert sorted(json.loads((report / "metrics.json").read_text())["cases"]) == CASES
    tune = ["tune", "-m", str(run / "model_best.pth"), "-i", str(root), "-o", str(tmp_path / "tuned")]
    assert main([*tune, "--score", "dice", "--min-sizes", "0,5", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    messages = said.out + said.err
    assert "case_001" in messages
    assert "_0000" not in "".join(line for line in messages.splitlines() if ".nii.gz" not in line)


def test_the_prediction_lies_on_the_image(tmp_path):
    root = one_channel(tmp_path / "raw")
    train = ["train", "-i", str(root), "-o", str(tmp_path / "out"), *SMALL, *SHORT, "--batch-size", "1"]
    assert main(train) == 0
    path, output = root / "imagesTr" / "case_001_0000.nii.gz", tmp_path / "p"
    predict = ["predict", "-m", str(tmp_path / "out" / "model"), "-i", str(path), "-o", str(output)]
    assert main([*predict, "--format", "nifti", "--device", "cpu"]) == 0
    written, image = nibabel.load(next(output.glob("case_001_*.nii.gz"))), nibabel.load(path)
    assert np.array_equal(written.affine, image.affine)
