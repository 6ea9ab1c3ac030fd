"""Data of nnU-Net, of the Medical Segmentation Decathlon and of MONAI's lists, read as they lie."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from data_folders import SHORT, shells, write_tiff_folder

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.formats.channel_files import channel_paths, joined_path
from volumen.data.formats.opening import open_volume
from volumen.inference.jobs import image_paths, volume_name
from volumen.utils.errors import VolumenError

SHAPE = (20, 24, 16)  # (X, Y, Z)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def nifti(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 3, 1])), path)


def label_of(number, values=(1, 2)):
    label = np.zeros(SHAPE, np.uint8)
    for place, value in enumerate(values):
        label[4 * place : 4 * place + 4, 4:20, 2 + number % 3 : 12] = value
    return label


def image_of(label, number, channel=0):
    rng = np.random.default_rng([number, channel])
    return (label * (40 + 10 * channel) + rng.normal(50, 5, SHAPE)).astype(np.float32)


def nnunet(root, description, cases=3, channels=2, values=(1, 2)):
    """Write a raw folder of nnU-Net v2; return the labels by case."""
    labels = {}
    for number in range(cases):
        label = labels[f"case_{number:03d}"] = label_of(number, values)
        nifti(root / "labelsTr" / f"case_{number:03d}.nii.gz", label)
        for channel in range(channels):
            nifti(
                root / "imagesTr" / f"case_{number:03d}_{channel:04d}.nii.gz",
                image_of(label, number, channel),
            )
    names = {str(channel): f"T{channel}" for channel in range(channels)}
    content = {"channel_names": names, "numTraining": cases, "file_ending": ".nii.gz", **description}
    (root / "dataset.json").write_text(json.dumps(content))
    return labels


CLASSES = {"labels": {"background": 0, "liver": 1, "tumour": 2}}


def test_nnunet_s_folder_is_read_with_its_channels_and_classes(tmp_path):
    labels = nnunet(tmp_path / "raw", CLASSES)
    config = ConfigManager(dataset_dir=str(tmp_path / "raw"))
    assert [case.name for case in config.cases] == list(labels)
    assert config.in_channels == 2
    assert config.spacing == (3.0, 1.0, 1.0)
    target = config.targets["label"]
    assert (target.kind, target.out_channels) == ("multiclass", 3)
    assert target.classes == ("background", "liver", "tumour")
    case = config.cases[1]
    region = (slice(3, 12), slice(2, 20), slice(0, 9))
    found = case.image.read(region)
    for channel in range(2):
        whole = image_of(labels["case_001"], 1, channel).T
        assert np.array_equal(found[channel], whole[region])
    assert np.array_equal(case.labels["label"].read(region)[0], labels["case_001"].T[region])
    again = ConfigManager(dataset_config=config.snapshot()["dataset_config"])
    assert again.fingerprint == config.fingerprint
    assert again.targets["label"].classes == target.classes


def test_what_the_user_says_of_the_target_goes_before_the_description(tmp_path):
    nnunet(
        tmp_path / "raw",
        {"labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}},
        values=(1, 2, 3),
    )
    root = str(tmp_path / "raw")
    config = ConfigManager(dataset_dir=root)
    assert config.ignore_labels == {"label": 3}
    assert config.targets["label"].out_channels == 3
    named = ConfigManager(
        dataset_dir=root, dataset_config={"targets": {"organ": {"classes": ["a", "b", "c"]}}}
    )
    assert named.targets["organ"].classes == ("a", "b", "c")
    assert named.targets["organ"].ignore_label == 3


def test_a_decathlon_s_folder_and_lists(tmp_path):
    labels, root = {}, tmp_path / "Task04"
    for number in range(3):
        label = labels[f"hippo_{number}"] = label_of(number)
        nifti(root / "labelsTr" / f"hippo_{number}.nii.gz", label)
        nifti(root / "imagesTr" / f"hippo_{number}.nii.gz", image_of(label, number))
    training = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in labels
    ]
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": training,
        "test": ["./imagesTs/hippo_9.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    config = ConfigManager(dataset_dir=str(root))
    assert [case.name for case in config.cases] == list(labels)
    assert config.targets["label"].classes == ("background", "Anterior", "Posterior")
    # MONAI's list, with a part that validates and with two files as channels.
    one, two, three = training
    one = {"image": [one["image"], two["image"]], "label": one["label"]}
    two = {"image": [two["image"], one["image"][0]], "label": two["label"]}
    three = {"image": [three["image"], one["image"][0]], "label": three["label"]}
    (root / "list.json").write_text(json.dumps({"training": [one, two], "validation": [three]}))
    listed = ConfigManager(dataset_dir=str(root / "list.json"))
    assert listed.in_channels == 2
    assert len(listed.split.train) == 2
    assert set(listed.split.val) == {listed.cases[2].name}
    folds = ConfigManager(dataset_dir=str(root / "list.json"), dataset_config={"fold": "0/3"})
    assert len(folds.split.val) == 1
    (root / "plain.json").write_text(json.dumps(training))
    assert len(ConfigManager(dataset_dir=str(root / "plain.json")).cases) == 3


def test_the_folds_of_a_list_are_those_of_the_training(tmp_path):
    items = []
    for number in range(6):
        label = label_of(number)
        nifti(tmp_path / f"i{number}.nii", image_of(label, number))
        nifti(tmp_path / f"l{number}.nii", label)
        items.append({"image": f"i{number}.nii", "label": f"l{number}.nii", "fold": number % 3})
    (tmp_path / "list.json").write_text(json.dumps({"training": items}))

    def config(setup=None, **data):
        return ConfigManager(
            dataset_dir=str(tmp_path / "list.json"), dataset_config=data, tr_setup=setup or {}
        )

    assert set(config().split.val) == {"i0", "i3"}
    assert set(config(fold="2/3").split.val) == {"i2", "i5"}
    assert [set(split.val) for split in config().folds(3)] == [{"i0", "i3"}, {"i1", "i4"}, {"i2", "i5"}]
    assert set(config(val_volumes=["i1"]).split.val) == {"i1"}
    assert config({"tr_val_split": 1.0}).split.val == {}
    with pytest.raises(
        VolumenError, match="expected 5 folds, as --fold or --folds says, found 3 in its list"
    ):
        _ = config(fold="0/5").split
    for wrong in ({"fold": 7}, {"fold": None}, {"fold": "1"}):
        broken = [*items[:5], {**items[5], **wrong}]
        (tmp_path / "list.json").write_text(json.dumps(broken))
        with pytest.raises(VolumenError, match=r"expected a fold 0, 1, 2, \.\.\. of every image"):
            _ = config().split


def test_nnunet_v1_lists_files_without_the_number_of_the_channel(tmp_path):
    nnunet(tmp_path / "raw", CLASSES)
    items = [
        {"image": f"./imagesTr/case_{n:03d}.nii.gz", "label": f"./labelsTr/case_{n:03d}.nii.gz"}
        for n in range(3)
    ]
    old = {"modality": {"0": "A", "1": "B"}, "labels": {"0": "bg", "1": "x", "2": "y"}, "training": items}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(old))
    config = ConfigManager(dataset_dir=str(tmp_path / "raw"))
    assert config.in_channels == 2
    assert [case.name for case in config.cases] == ["case_000", "case_001", "case_002"]


def test_the_real_data_set_as_the_decathlon_lays_it_out(real_data, tmp_path):
    source = real_data("hippocampus")
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    items = []
    for image in sorted((source / "images").iterdir())[:6]:
        name = image.name.removesuffix(".nii.gz")
        (tmp_path / "imagesTr" / image.name).symlink_to(image)
        (tmp_path / "labelsTr" / image.name).symlink_to(source / "labels" / f"{name}_hippocampus.nii.gz")
        items.append({"image": f"./imagesTr/{image.name}", "label": f"./labelsTr/{image.name}"})
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items}))
    raw = ConfigManager(dataset_dir=str(tmp_path), dataset_config={"targets": {"hippocampus": {}}})
    names = [case.name for case in raw.cases]
    ours = ConfigManager(dataset_dir=str(source), dataset_config={"volumes": names})
    assert raw.fingerprint == ours.fingerprint
    assert raw.split == ours.split
    assert raw.targets["hippocampus"].kind == ours.targets["hippocampus"].kind


def broken(change):
    def write(root):
        nnunet(root, CLASSES)
        description = json.loads((root / "dataset.json").read_text())
        change(root, description)
        (root / "dataset.json").write_text(json.dumps(description))

    return write


BAD = [
    (lambda root, d: (root / "imagesTr" / "case_001_0001.nii.gz").unlink(),
     r"lists 1 of 9 files that do not exist, such as .*case_001_0001.nii.gz"),
    (lambda root, d: d.update(training=[{"image": "imagesTr/x.nii.gz", "label": "labelsTr/y.nii.gz"}]),
     "lists 2 of 2 files that do not exist"),
    (lambda root, d: d.update(file_ending="nii.gz"), r'file_ending: expected an ending such as ".nii.gz"'),
    (lambda root, d: d.update(file_ending=".mha"), "labelsTr: expected labels CASE.mha, found none"),
    (lambda root, d: d.update(labels={"background": 0, "a": 1, "b": 3}), "without gaps, found 0, 1, 3"),
    (lambda root, d: d.update(labels={"background": 0, "a": "one"}), "labels.a: expected a label value"),
    (lambda root, d: d.pop("file_ending"), "expected a list of"),
    (lambda root, d: nifti(root / "imagesTr" / "case_002_0001.nii.gz", np.zeros((4, 4, 4), np.float32)),
     r"expected shape \(16, 24, 20\) of .*case_002_0000.nii.gz, the first channel"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_description_that_does_not_fit_the_files(tmp_path, change, said):
    broken(change)(tmp_path / "raw")
    with pytest.raises(VolumenError, match=said):
        _ = ConfigManager(dataset_dir=str(tmp_path / "raw")).targets


def test_files_that_are_no_description(tmp_path):
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    with pytest.raises(VolumenError, match=r"holds imagesTr/ and no dataset.json"):
        _ = ConfigManager(dataset_dir=str(tmp_path / "raw")).layout
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(VolumenError, match=r"x.json: is not valid JSON"):
        _ = ConfigManager(dataset_dir=str(tmp_path / "x.json")).layout
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(VolumenError, match="found an empty list"):
        _ = ConfigManager(dataset_dir=str(tmp_path / "x.json")).layout
    # A data folder in our layout may hold a file of that name.
    root = write_tiff_folder(tmp_path / "ours", {"a": {"ink": shells((8, 8, 8))}})
    (root / "dataset.json").write_text("{}")
    assert ConfigManager(dataset_dir=str(root)).layout.targets == ("ink",)


@pytest.mark.parametrize(
    ("paths", "joined"),
    [
        (["a/c_0000.nii.gz", "a/c_0001.nii.gz"], "a/c_{0000,0001}.nii.gz"),
        (["a/t1.nii", "a/t2.nii"], "a/t{1,2}.nii"),
        (["a/x.tif"], "a/x.tif"),
        (["a/1/x.tif", "b/2/x.tif"], "{a/1,b/2}/x.tif"),
        (["p10.tif", "p9.tif"], "p{10,9}.tif"),
    ],
)
def test_the_path_of_several_files(paths, joined, tmp_path):
    assert joined_path(paths) == joined
    assert channel_paths(joined) == paths


def test_a_file_with_braces_in_its_name_is_a_file(tmp_path):
    nifti(tmp_path / "a{1,2}.nii", np.zeros(SHAPE, np.float32))
    assert open_volume(tmp_path / "a{1,2}.nii").channels == 1
    assert volume_name("d/case_1_{0000,0001}.nii.gz") == "case_1"


def test_images_of_several_channels_are_found_for_prediction(tmp_path):
    nnunet(tmp_path / "raw", CLASSES)
    found = image_paths(str(tmp_path / "raw" / "imagesTr"))
    assert [volume_name(path) for path in found] == ["case_000", "case_001", "case_002"]
    assert open_volume(found[0]).channels == 2
    # A stack of numbered slices is no set of channels.
    for number in range(4):
        nifti(tmp_path / "stack" / f"slice_{number:04d}.nii", np.zeros(SHAPE, np.float32))
    assert len(image_paths(str(tmp_path / "stack"))) == 4


def test_commands_on_a_raw_folder(tmp_path, capsys):
    nnunet(tmp_path / "raw", CLASSES)
    small = ["--patch-size", "8,8,8", "--set", "model_config.features_per_stage=[4, 8]", "--device", "cpu"]
    assert main(["inspect", str(tmp_path / "raw"), *small]) == 0
    assert "background, liver, tumour" in capsys.readouterr().out
    short = [*SHORT, "--batch-size", "1"]
    train = ["train", "-i", str(tmp_path / "raw"), "-o", str(tmp_path / "out"), *small, *short]
    assert main(train) == 0
    predict = ["predict", "-i", str(tmp_path / "raw" / "imagesTr"), "-m", str(tmp_path / "out" / "model"),
               "-o", str(tmp_path / "p"), "--dtype", "labels", "--format", "nifti", "--device", "cpu"]  # fmt: skip
    assert main(predict) == 0
    assert (tmp_path / "p" / "case_001_label.nii.gz").is_file()
    for labels in ("raw", "raw/labelsTr"):
        report = tmp_path / "report" / labels
        assert (
            main(["evaluate", "-p", str(tmp_path / "p"), "-l", str(tmp_path / labels), "-o", str(report)])
            == 0
        )
        found = json.loads((report / "metrics.json").read_text())
        assert sorted(found["cases"]) == ["case_000", "case_001", "case_002"]
        assert "label/dice/liver" in found["mean"]


def test_labels_of_images_with_one_channel_are_found_by_evaluate(tmp_path):
    labels = nnunet(tmp_path / "raw", CLASSES, channels=1)
    for name, label in labels.items():
        nifti(tmp_path / "p" / f"{name}_0000_label.nii.gz", label)
    report = tmp_path / "report"
    assert main(["evaluate", "-p", str(tmp_path / "p"), "-l", str(tmp_path / "raw"), "-o", str(report)]) == 0
    found = json.loads((report / "metrics.json").read_text())
    assert len(found["cases"]) == 3
    assert found["mean"]["label/dice"] == 1
