"""MONAI Label and the Deploy SDK, by stand-ins, load the bundle, infer in memory and train it further.

The reference is the streamed prediction of the same file: same labels, voxel for voxel, in the file's own place.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
import zarr
from conftest import ROOT
from data_folders import image_of, shells, write_tiff_folder
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from prediction import save_checkpoint

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.datalist import layout_of
from volumen.inference.bundle.in_memory import ReadVolumed, check_memory
from volumen.sharing.package import PackageRequest, package
from volumen.utils.errors import VolumenError

SETTINGS = {
    "tr_config": {
        "patch_size": [16, 16, 16], "batch_size": 1, "max_epoch": 2, "max_steps_per_epoch": 3,
        "max_val_steps_per_epoch": 1, "num_dataloader_workers": 0, "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8]},
    "auxiliary_tasks": {
        "normals": {
            "type": "surface_normals", "source_target": "sheet", "losses": [{"name": "CosineSimilarityLoss"}]
        }
    },
}  # fmt: skip
# Neither symmetric nor of equal sides, steps of 0.5, 1 and 2 and an origin of its own: a wrong axis shows.
AFFINE = np.array([[0.5, 0, 0, -7], [0, 1.0, 0, 11], [0, 0, 2.0, 23], [0, 0, 0, 1.0]])
SHAPE_XYZ = (36, 28, 20)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small model, packaged and unzipped, as these programs get it."""
    folder = tmp_path_factory.mktemp("clients")
    data = write_tiff_folder(folder / "data", {"scroll": {"sheet": shells((24, 24, 64))}})
    (folder / "experiment.yaml").write_text(yaml.safe_dump(SETTINGS))
    words = [
        "train",
        "-i",
        str(data),
        "-o",
        str(folder / "out"),
        "--config-path",
        str(folder / "experiment.yaml"),
    ]
    assert main([*words, "--device", "cpu", "--quiet"]) == 0
    report = package(
        PackageRequest(str(folder / "out" / "model" / "model_best.pth"), str(folder / "sheets.zip"))
    )
    shutil.unpack_archive(report.path, folder)
    return folder / "sheets"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A NIfTI image, by its path, and its streamed labels in the order (Z, Y, X)."""
    folder = tmp_path_factory.mktemp("image")
    ramp = np.linspace(0, 60, SHAPE_XYZ[0])[:, None, None]
    array = (image_of(shells(SHAPE_XYZ)) * 0.7 + ramp).astype(np.uint8)
    path = folder / "case.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def streamed(bundle, image, tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed")
    model = str(bundle / "models" / "model.pt")
    words = ["-m", model, "--dtype", "labels", "--amp", "off", "--device", "cpu", "--quiet"]
    assert main(["predict", "-i", str(image), "-o", str(out), *words]) == 0
    return np.asarray(zarr.open_group(out / "case.zarr", mode="r")["sheet/0"])


def in_a_process_of_its_own(code: str, *words: str) -> None:
    """Run code with the stand-ins, but not this program's code, on the path."""
    preamble = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


LABEL = """
import numpy as np
from client_stand_ins import LabelInference
task = LabelInference(sys.argv[1])
assert task.pred == "pred" and task.image == "image" and task.dimension == 3
found = task({"image": sys.argv[2]})
again = task({"image": sys.argv[2]})
np.testing.assert_array_equal(found["label"], again["label"])
data = found["data"]
named = {name: np.asarray(data[name]) for name in sys.argv[4:]}
np.savez(sys.argv[3], label=found["label"], affine=found["affine"], **named)
"""


@pytest.mark.slow
def test_monai_label_infers_what_a_streamed_prediction_writes(bundle, image, streamed, tmp_path):
    targets = "sheet", "normals"
    in_a_process_of_its_own(LABEL, str(bundle), str(image), str(tmp_path / "found.npz"), *targets)
    found = np.load(tmp_path / "found.npz")
    assert found["label"].shape == SHAPE_XYZ
    assert found["label"].dtype == np.uint8
    np.testing.assert_array_equal(found["label"], streamed.transpose(2, 1, 0))
    assert 0 < streamed.mean() < 1
    np.testing.assert_allclose(found["affine"], AFFINE)
    assert found["sheet"].shape == (1, *SHAPE_XYZ)
    assert found["normals"].shape == (3, *SHAPE_XYZ)
    np.testing.assert_allclose(np.linalg.norm(found["normals"].astype(np.float32), axis=0), 1, atol=2e-3)


def test_the_config_s_parts_infer_in_memory_what_a_streamed_prediction_writes(image, tmp_path):
    """As the stand-ins do, in this process and with a network of every kind of head."""
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    words = ["-m", str(checkpoint), "--dtype", "float32", "--amp", "off", "--device", "cpu", "--quiet"]
    assert main(["predict", "-i", str(image), "-o", str(tmp_path / "out"), *words]) == 0
    root = zarr.open_group(tmp_path / "out" / "case.zarr", mode="r")
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundle" / "configs" / "inference.yaml"))
    parser.update({"checkpoint": str(checkpoint), "device": "cpu", "inference_config#dtype": "float32"})
    data = parser.get_parsed_content("preprocessing")({"image": str(image)})
    assert data["image"].dtype == torch.float32
    with torch.no_grad():
        outputs = parser.get_parsed_content("inferer")(
            data["image"][None], parser.get_parsed_content("network_def")
        )
    assert not isinstance(outputs, MetaTensor)
    found = parser.get_parsed_content("postprocessing")({**data, "pred": outputs[0]})
    for name in ("ink", "tissue"):
        # The streamed group keeps (Z, Y, X), or (C, Z, Y, X) of several channels.
        expected = np.asarray(root[f"{name}/0"]).reshape(-1, *SHAPE_XYZ[::-1])
        np.testing.assert_allclose(np.asarray(found[name]).transpose(0, 3, 2, 1), expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found["pred"]), np.asarray(found["ink"]) >= 0.5)
    np.testing.assert_allclose(np.asarray(found["pred"].affine), AFFINE)
    normals = np.asarray(found["normals"])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-5)


DEPLOY = """
import nibabel, numpy as np
from client_stand_ins import DeployOperator
file = nibabel.load(sys.argv[2])
operator = DeployOperator(sys.argv[1])
found = operator(np.swapaxes(np.asarray(file.dataobj), 0, 2), file.affine)
assert list(found) == ["pred"]
np.save(sys.argv[3], found["pred"])
"""


@pytest.mark.slow
def test_the_deploy_sdk_infers_what_a_streamed_prediction_writes(bundle, image, streamed, tmp_path):
    in_a_process_of_its_own(DEPLOY, str(bundle), str(image), str(tmp_path / "found.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), streamed)


@pytest.mark.slow
def test_the_shipped_bundle_serves_both_too(image, tmp_path):
    root = str(ROOT / "bundle")
    targets = "surface", "distance_transform", "surface_normals", "structure_tensor", "inplane_direction"
    in_a_process_of_its_own(LABEL, root, str(image), str(tmp_path / "found.npz"), *targets)
    in_a_process_of_its_own(DEPLOY, root, str(image), str(tmp_path / "found.npy"))
    found = np.load(tmp_path / "found.npz")
    assert [len(found[name]) for name in targets] == [1, 1, 3, 6, 3]
    np.testing.assert_array_equal(found["label"].transpose(2, 1, 0), np.load(tmp_path / "found.npy"))


TRAIN = """
import json, logging
from client_stand_ins import LabelTraining
logging.basicConfig(level=logging.INFO)
listed = json.loads(sys.argv[2])
for _ in range(int(sys.argv[4])):
    LabelTraining(sys.argv[1])(listed, json.loads(sys.argv[3]))
"""


def labelled(folder: Path, count: int) -> list[dict[str, str]]:
    """Images and labels as MONAI Label's datastore keeps them: labels in a folder of their own, of the same names."""
    (folder / "labels" / "final").mkdir(parents=True)
    listed = []
    for number in range(count):
        label = shells((20, 24, 28), period=7 + number)
        paths = folder / f"case{number}.nii.gz", folder / "labels" / "final" / f"case{number}.nii.gz"
        for path, array in zip(paths, (image_of(label, number), label), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        listed.append({"image": str(paths[0]), "label": str(paths[1])})
    return listed


@pytest.mark.slow
def test_monai_label_trains_the_bundle_further_on_its_own_lists(bundle, tmp_path):
    """Twice, as when somebody clicks again: each run has a folder of its own below the bundle."""
    root = tmp_path / "sheets"
    shutil.copytree(bundle, root)
    listed = labelled(tmp_path / "studies", 5)
    request = {"max_epochs": 2, "val_split": 0.2, "device": "cpu"}
    in_a_process_of_its_own(TRAIN, str(root), json.dumps(listed), json.dumps(request), "2")
    runs = sorted((root / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        split = json.loads((run / "model" / "model_split.json").read_text())
        assert {len(split["train"]), len(split["val"])} == {4, 1}
        assert not set(split["train"]) & set(split["val"])
        with (run / "model" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert rows[-1]["val/mean_dice"]
        # The label is the model's own target, so that all of its weights go on.
        content = torch.load(run / "model" / "model_final.pth", weights_only=True)
        assert list(content["config"]["dataset_config"]["targets"]) == ["sheet"]
        assert content["model"].keys() == torch.load(root / "models" / "model.pt", weights_only=True).keys()


def manager(**more) -> ConfigManager:
    sections = {"tr_config": {"patch_size": [16, 16, 16]}, "model_config": {"features_per_stage": [4, 8]}}
    return ConfigManager(**sections, device="cpu", **more)


def test_listed_images_train_and_validate_as_the_lists_say(tmp_path):
    listed = labelled(tmp_path, 4)
    own = manager()
    assert own.with_lists(own.items("train"), own.items("val")) is own
    config = own.with_lists(listed[:3], listed[3:])
    assert config.has_data
    assert not own.has_data
    assert list(config.targets) == ["label"]
    assert (sorted(config.split.train), sorted(config.split.val)) == (["case0", "case1", "case2"], ["case3"])
    assert config.split.val["case3"] == [((0, 28), (0, 24), (0, 20))]
    assert [case.image.path for case in config.cases] == [item["image"] for item in listed]
    assert list(config.items("train")) == listed[:3]
    assert list(config.items("val")) == listed[3:]


def test_without_a_list_for_validation_the_bundle_splits_and_an_empty_one_means_none(tmp_path):
    listed = labelled(tmp_path, 4)
    own = manager(tr_setup={"tr_val_split": 0.75})
    split = own.with_lists(listed, own.items("val")).split
    assert (len(split.train), len(split.val)) == (3, 1)
    alone = own.with_lists(listed, [])
    assert not alone.split.val
    assert not alone.validates
    assert len(alone.split.train) == 4
    with pytest.raises(VolumenError, match="validate#dataset#data: is a list and train#dataset#data is none"):
        own.with_lists(own.items("train"), listed)


def test_the_label_is_the_target_of_the_settings_where_they_name_one(tmp_path):
    listed = labelled(tmp_path, 2)
    own = manager(dataset_config={"targets": {"sheet": {}}})
    assert list(own.with_lists(listed).targets) == ["sheet"]
    two = manager(dataset_config={"targets": {"sheet": {}, "ink": {}}})
    several = [
        {"image": item["image"], "label_ink": item["label"], "label_sheet": item["label"]} for item in listed
    ]
    assert list(two.with_lists(several).primary_targets) == ["sheet", "ink"]


def test_a_list_is_read_and_what_is_wrong_in_it_is_named(tmp_path):
    listed = labelled(tmp_path, 2)
    layout = layout_of(listed, target="ink")
    assert [case.name for case in layout.cases] == ["case0", "case1"]
    assert layout.targets == ("ink",)
    assert layout.cases[1].labels == {"ink": listed[1]["label"]}
    relative = [{"image": "case0.nii.gz", "label_a": "x.nii.gz", "label_b": "y.nii.gz", "mask": "m.nii.gz"}]
    case = layout_of(relative, root=str(tmp_path)).cases[0]
    assert case.labels == {"a": str(tmp_path / "x.nii.gz"), "b": str(tmp_path / "y.nii.gz")}
    assert case.masks == {name: str(tmp_path / "m.nii.gz") for name in "ab"}
    for broken, message in (
        ([], "found an empty list"),
        ([{"image": listed[0]["image"]}], r"\[0\].*expected a label"),
        ([{"label": "x"}], r"\[0\].*expected {image: path"),
        ([listed[0], listed[0]], "lists an image twice"),
        ([{"image": 3, "label": "x"}], r"\[0\]\.image.*expected a path"),
    ):
        with pytest.raises(VolumenError, match=message):
            layout_of(broken)


def test_images_of_one_name_in_two_folders_are_two_cases(tmp_path):
    layout = layout_of([*labelled(tmp_path / "a", 1), *labelled(tmp_path / "b", 1)])
    assert [case.name for case in layout.cases] == ["case0", "case0_2"]


@pytest.mark.parametrize(
    ("given", "meta", "expected"),
    [
        ((5, 6, 7), {"original_channel_dim": "no_channel"}, (1, 7, 6, 5)),
        ((5, 6, 7), {"original_channel_dim": float("nan")}, (1, 7, 6, 5)),
        ((2, 5, 6, 7), {"original_channel_dim": 0}, (2, 7, 6, 5)),
        ((5, 6, 7, 2), {"original_channel_dim": -1}, (2, 7, 6, 5)),
        ((5, 6, 7, 2), {}, (2, 7, 6, 5)),
    ],
)
def test_arrays_in_monai_s_order_are_turned_to_the_network_s(given, meta, expected):
    array = torch.arange(int(np.prod(given))).reshape(given)
    image = ReadVolumed()({"image": MetaTensor(array, affine=torch.as_tensor(AFFINE), meta=meta)})["image"]
    assert tuple(image.shape) == expected
    assert list(image.meta["spatial_shape"]) == [5, 6, 7]
    # A voxel lies at the same place in space before and after.
    voxel = np.array([1, 2, 3, 1.0])
    turned = np.array([3, 2, 1, 1.0])
    np.testing.assert_allclose(np.asarray(image.affine) @ turned, AFFINE @ voxel)


def test_dimensions_other_than_the_network_s_are_refused(tmp_path):
    with pytest.raises(VolumenError, match="expected a 2D image, as the network's, found 3D"):
        ReadVolumed(spatial_dims=2)({"image": labelled(tmp_path, 1)[0]["image"]})


def test_what_does_not_fit_into_memory_is_refused_with_both_sizes():
    with pytest.raises(
        VolumenError, match=r"too large to be predicted in memory, expected .* found 65536\.0 GiB"
    ):
        check_memory("scroll.zarr", (16384, 16384, 16384), 4)
    check_memory("small.tif", (8, 8, 8), 4)
