"""Networks of nnU-Net v2 predict here what they predict there: their own logits, from their folders as they lie."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import zarr
from conftest import ROOT
from scipy import ndimage

import volumen
from volumen.checkpoints.nnunet_plan import ResamplingRule, fold_checkpoints, read_plan
from volumen.cli.main import main
from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.ensemble import load_model
from volumen.inference.nnunet.grid import HALO, PlannedGrid, separate_axis, spline
from volumen.inference.nnunet.preparation import nonzero_box
from volumen.inference.predict import predict
from volumen.inference.predictor import Predictor
from volumen.inference.request import PredictRequest
from volumen.inference.windows.reader import RegionReader
from volumen.inference.windows.window_rules import spread_starts
from volumen.utils.errors import VolumenError

MODELS = Path(__file__).parent / "data" / "nnunet"
SMALL = ("anisotropic", "residual")


def image_of(model: Path) -> str:
    files = sorted((model / "images").iterdir())
    return str(files[0]) if len(files) == 1 else str(model / "images" / "case_{0000,0001}.nii.gz")


def with_logits(predictor: Predictor) -> Predictor:
    """Return a predictor that stores what the network gives, without softmax or sigmoid."""
    heads = {name: replace(head, activation="none") for name, head in predictor.targets.items()}
    return replace(predictor, targets=heads, members=tuple(with_logits(one) for one in predictor.members))


def logits_of(model: Path, output: Path, **settings) -> np.ndarray:
    options = {"dtype": "float32", "amp": "off", "tta": "mirror", "skip_empty": False, **settings}
    predict(
        PredictRequest(image_of(model), str(model), str(output), **options),
        predictor=with_logits(load_model(model)),
    )
    return zarr.open_group(str(output), mode="r")["label/0"][:]


def expected_of(model: Path) -> dict[str, np.ndarray]:
    with np.load(model / "expected" / "case.npz") as stored:
        return {name: stored[name] for name in stored.files}


def check_model(model: Path, folder: Path) -> None:
    expected = expected_of(model)
    found = logits_of(model, folder / "logits.zarr")
    logits = expected["logits"].reshape(found.shape)
    outside = np.isnan(logits).any(axis=0)
    assert np.ptp(logits[:, ~outside]) > 0.5
    assert np.abs(found - logits)[:, ~outside].max() < 1e-4
    assert not found[:, outside].any()
    # By the command, with nothing but the folder: nnU-Net's own defaults, and its own labels.
    target = folder / "labels.zarr"
    assert (
        main(["predict", "-i", image_of(model), "-m", str(model), "-o", str(target), "--dtype", "labels"])
        == 0
    )
    labels = zarr.open_group(str(target), mode="r")["labels/label/0"][:]
    certain = separated(logits, json.loads((model / "dataset.json").read_text())) & ~outside
    assert certain.sum() > 0.9 * (~outside).sum()
    segmentation = expected["segmentation"].reshape(labels.shape)
    assert np.array_equal(labels[..., certain], segmentation[..., certain])
    assert not labels[..., outside].any()


def separated(logits: np.ndarray, description: dict) -> np.ndarray:
    """Return where rounding cannot change the label."""
    if "regions_class_order" in description:
        return (np.abs(logits) > 1e-4).all(axis=0)
    ranked = np.sort(np.nan_to_num(logits), axis=0)
    return ranked[-1] - ranked[-2] > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_logits_and_labels_are_those_of_nnunet(name, tmp_path):
    check_model(MODELS / name, tmp_path)


@pytest.mark.slow
def test_all_kinds_of_models_equal_nnunet_itself(tmp_path):
    """Models and logits are made here by nnU-Net, in an environment of its own."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from nnunet_environment import make_environment
    finally:
        sys.path.pop(0)
    python = make_environment(tmp_path / "environment")
    models = tmp_path / "models"
    script = Path(__file__).with_name("nnunet_reference.py")
    subprocess.run([python, script, models, "all"], check=True, capture_output=True)
    names = sorted(path.name for path in models.iterdir())
    assert len(names) == 5
    for name in names:
        (tmp_path / name).mkdir()
        check_model(models / name, tmp_path / name)


def test_a_fold_alone_and_all_of_them_are_averages(tmp_path):
    model = MODELS / "anisotropic"
    both = logits_of(model, tmp_path / "both.zarr")
    each = []
    for fold in ("fold_0", "fold_1"):
        folder = tmp_path / fold
        predictor = with_logits(load_model(model / fold))
        request = PredictRequest(
            image_of(model),
            str(model / fold),
            str(folder),
            dtype="float32",
            amp="off",
            tta="mirror",
            skip_empty=False,
        )
        predict(replace(request, output=str(folder) + ".zarr"), predictor=predictor)
        each.append(zarr.open_group(str(folder) + ".zarr", mode="r")["label/0"][:])
    assert not np.allclose(each[0], each[1], atol=1e-2)
    assert np.allclose((each[0] + each[1]) / 2, both, atol=1e-5)


def test_the_files_of_one_case_in_a_folder_are_one_image(tmp_path):
    model, output = MODELS / "anisotropic", tmp_path / "out"
    report = volumen.predict(model / "images", model, output, dtype="labels", amp="off")
    assert [Path(volume.output).name for volume in report.volumes] == ["case.zarr"]
    again = volumen.predict(model / "images", model, output, dtype="labels", amp="off")
    assert [volume.already_done for volume in again.volumes] == [True]


def test_other_processes_predict_the_same(tmp_path):
    pytest.importorskip("distributed")
    model = MODELS / "anisotropic"
    outputs = [str(tmp_path / f"{number}.zarr") for number in (1, 2)]
    for number, output in enumerate(outputs, start=1):
        volumen.predict(image_of(model), model, output, dtype="float32", amp="off", nworkers=number)
    alone, shared = (zarr.open_group(output, mode="r")["label/0"][:] for output in outputs)
    assert alone.any()
    assert np.allclose(shared, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "region"),
    [("residual", ((3, 9), (5, 20), (0, 11))), ("anisotropic", ((3, 20), (0, 7), (5, 21)))],
)
def test_a_region_is_the_crop_of_the_whole(tmp_path, name, region):
    whole = logits_of(MODELS / name, tmp_path / "whole.zarr")
    part = logits_of(MODELS / name, tmp_path / "part.zarr", region=region)
    assert part.any()
    assert np.allclose(part, whole[(slice(None), *(slice(*span) for span in region))], atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_mask_chooses_voxels_and_changes_none(tmp_path, name):
    model = MODELS / name
    whole = logits_of(model, tmp_path / "whole.zarr")
    image = nibabel.load(sorted((model / "images").iterdir())[0])
    mask = np.zeros(image.shape, np.uint8)
    mask[8:11, 4:7, 9] = 1
    nibabel.save(nibabel.Nifti1Image(mask, image.affine), tmp_path / "mask.nii.gz")
    part = logits_of(model, tmp_path / "part.zarr", mask=str(tmp_path / "mask.nii.gz"))
    inside = mask.T > 0
    assert np.allclose(part[:, inside], whole[:, inside], atol=1e-5)
    assert not part[:, ~inside].any()


def test_an_array_in_memory_gives_the_same(tmp_path):
    model = MODELS / "residual"
    image = nibabel.load(image_of(model))
    spacing = tuple(float(size) for size in image.header.get_zooms()[::-1])
    found = volumen.predict_array(
        volumen.load(model), np.asarray(image.dataobj).T, spacing=spacing
    )["label"]  # fmt: skip
    logits = logits_of(model, tmp_path / "plain.zarr", tta="none")
    assert found.shape == logits.shape
    assert np.allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-4)


def copied(tmp_path: Path, change) -> Path:
    """Return a copy of a model whose plans were changed."""
    model = tmp_path / "model"
    shutil.copytree(MODELS / "residual", model)
    plans = json.loads((model / "plans.json").read_text())
    change(plans, plans["configurations"]["3d_fullres"])
    (model / "plans.json").write_text(json.dumps(plans))
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda plans, own: own.update(previous_stage="3d_lowres"), "a cascade"),
        (lambda plans, own: own["architecture"].update(network_class_name="a.b.ResidualUNet"), "ResidualUNet"),
        (lambda plans, own: own["architecture"]["arch_kwargs"].update(squeeze_excitation=True), "squeeze_excitation"),
        (lambda plans, own: own["architecture"]["arch_kwargs"].update(nonlin="torch.nn.PReLU"), "PReLU"),
        (lambda plans, own: own.update(normalization_schemes=["Histogram"]), "the normalization Histogram"),
        (lambda plans, own: own.update(resampling_fn_data="resample_torch"), "resampling by resample_torch"),
        (lambda plans, own: own.update(preprocessor_name="Own"), "preprocessor_name: Own"),
        (lambda plans, own: own["resampling_fn_data_kwargs"].update(order_z=1), "order_z"),
        (lambda plans, own: plans.update(label_manager="Other"), "label_manager: Other"),
        (lambda plans, own: plans.update(transpose_forward=[0, 1]), "transpose_forward"),
        (lambda plans, own: plans["configurations"].pop("3d_fullres"), "3d_fullres"),
        (lambda plans, own: own.pop("spacing"), "lacks 'spacing'"),
        (lambda plans, own: own["architecture"]["arch_kwargs"].update(features_per_stage=[4, 6, 9]), "do not fit"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_in_one_line(tmp_path, change, named):
    with pytest.raises(VolumenError, match=named) as caught:
        load_model(copied(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_the_ignore_label_is_no_class(tmp_path):
    model = copied(tmp_path, lambda plans, own: None)
    description = json.loads((model / "dataset.json").read_text())
    description["labels"]["ignore"] = 3
    (model / "dataset.json").write_text(json.dumps(description))
    assert load_model(model).targets == load_model(MODELS / "residual").targets


def test_more_labels_than_a_byte_are_refused(tmp_path):
    model = copied(tmp_path, lambda plans, own: None)
    description = json.loads((model / "dataset.json").read_text())
    description["labels"] = {"background": 0, **{f"label{n}": n for n in range(1, 257)}}
    (model / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(VolumenError, match="labels above 255"):
        load_model(model)


def test_plans_of_earlier_versions_are_read(tmp_path):
    def to_old(plans, own):
        arguments = own.pop("architecture")["arch_kwargs"]
        own.update(
            UNet_class_name="PlainConvUNet", UNet_base_num_features=4, unet_max_num_features=10,
            n_conv_per_stage_encoder=[1, 2, 2], n_conv_per_stage_decoder=[1, 2], num_pool_per_axis=[1, 2, 2],
            conv_kernel_sizes=arguments["kernel_sizes"], pool_op_kernel_sizes=arguments["strides"],
        )  # fmt: skip

    plan = read_plan(copied(tmp_path, to_old), "3d_fullres")
    new = read_plan(MODELS / "residual", "3d_fullres").network_arguments
    assert plan.kind == "PlainConvUNet"
    found = plan.network_arguments
    assert found["features_per_stage"] == [4, 8, 10]
    assert found["n_conv_per_stage"] == [1, 2, 2]
    for key in ("kernel_sizes", "strides", "conv_op", "conv_bias", "norm_op", "norm_op_kwargs", "nonlin"):
        assert found[key] == new[key]


def test_a_configuration_inherits_from_another(tmp_path):
    def inherit(plans, own):
        plans["configurations"]["parent"] = dict(own)
        own.clear()
        own.update(inherits_from="parent", batch_size=7)

    assert read_plan(copied(tmp_path, inherit), "3d_fullres") == read_plan(MODELS / "residual", "3d_fullres")


def test_a_folder_without_a_final_checkpoint_is_refused(tmp_path):
    model = copied(tmp_path, lambda plans, own: None)
    (model / "fold_0" / "checkpoint_final.pth").rename(model / "fold_0" / "checkpoint_latest.pth")
    with pytest.raises(VolumenError, match="checkpoint_final"):
        load_model(model)
    # A checkpoint that the user names is taken, whatever its name.
    assert load_model(model / "fold_0" / "checkpoint_latest.pth").path.endswith("latest.pth")


def test_all_cases_count_only_where_there_are_no_folds(tmp_path):
    model = copied(tmp_path, lambda plans, own: None)
    shutil.copytree(model / "fold_0", model / "fold_all")
    assert [path.parent.name for path in fold_checkpoints(model)] == ["fold_0"]
    shutil.rmtree(model / "fold_0")
    assert [path.parent.name for path in fold_checkpoints(model)] == ["fold_all"]


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = copied(tmp_path, lambda plans, own: None)
    torch.save({"network_weights": {}, "init_args": Harmful()}, model / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(VolumenError, match="damaged or of another kind"):
        load_model(model)
    assert not Path("harmed").exists()


def test_networks_of_both_programs_are_not_averaged():
    predictor = load_model(MODELS / "residual")
    other = replace(predictor, preparation=None, checksum="another")
    from volumen.inference.ensemble import join

    image = ArrayVolume(np.ones((16, 16, 16), np.uint8), spacing=(1.0, 1.0, 1.0))
    from volumen.inference.jobs import Job
    from volumen.inference.predict import plan_work

    request = PredictRequest("image", "model", "out.zarr")
    with pytest.raises(VolumenError, match="a network of volumen"):
        plan_work(join([predictor, other]), Job(image, Path("out.zarr")), request, "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_do_not_spread(tmp_path, value, caplog):
    model = MODELS / "residual"
    image = nibabel.load(image_of(model))
    array = np.asarray(image.dataobj).T.astype(np.float32)
    array[4, 4, 4] = value
    found = volumen.predict_array(volumen.load(model), array, spacing=(1.3, 0.9, 1.1))["label"]
    assert np.isfinite(found).all()
    assert "count as 0" in caplog.text
    nibabel.save(nibabel.Nifti1Image(array.T, image.affine), tmp_path / "image.nii.gz")
    with pytest.raises(VolumenError, match="NaN or infinite"):
        volumen.predict(tmp_path / "image.nii.gz", model, tmp_path / "out.zarr", nonfinite="refuse")


def test_an_image_without_a_voxel_size_has_that_of_the_plan(caplog):
    """Taken for 1, it would be resampled by factors that nobody stated; ours do the same with `target_spacing`."""
    model = volumen.load(MODELS / "anisotropic")
    plan = model.preparation.plan
    array = np.random.default_rng(0).normal(100, 30, (2, 11, 12, 13)).astype(np.float32)
    # The plan has the axes as its network sees them.
    stated = tuple(float(plan.spacing[plan.transpose.index(axis)]) for axis in range(3))
    assert stated == (1.0, 3.0, 1.2)
    expected = volumen.predict_array(model, array, spacing=stated)
    assert "states no voxel size" not in caplog.text
    found = volumen.predict_array(model, array)
    assert "states no voxel size, so it is taken to be that of the training" in caplog.text
    wrong = volumen.predict_array(model, array, spacing=(1.0, 1.0, 1.0))
    for name, values in expected.items():
        assert np.array_equal(found[name], values)
        assert not np.array_equal(wrong[name], values)


def test_a_voxel_size_in_another_unit_is_refused():
    model = volumen.load(MODELS / "residual")
    with pytest.raises(VolumenError, match="correct the voxel size or its unit"):
        volumen.predict_array(model, np.ones((9, 9, 9), np.int16), spacing=(2000.0, 1500.0, 1500.0))


def test_an_image_of_zeros_is_predicted_as_a_whole():
    found = volumen.predict_array(
        volumen.load(MODELS / "residual"), np.zeros((9, 9, 9), np.int16), spacing=(1.0, 1.0, 1.0)
    )["label"]  # fmt: skip
    assert np.isfinite(found).all()
    assert found.any()


@pytest.mark.parametrize(
    "box", [((2, 9), (0, 5), (3, 4)), ((0, 70), (1, 20), (11, 30)), ((69, 70), (19, 20), (0, 1))]
)
def test_the_nonzero_box_is_found_from_outside(box):
    values = np.zeros((2, 70, 20, 30), np.int16)
    region = tuple(slice(*span) for span in box)
    for number, corner in enumerate(([part.start for part in region], [part.stop - 1 for part in region])):
        values[(number, *corner)] = -3
    image = ArrayVolume(values, axes="czyx")
    image.chunks = (16, 7, 30)
    assert nonzero_box(RegionReader(image)) == box


@pytest.mark.parametrize(("size", "new"), [(30, 41), (41, 30), (9, 20), (1, 3), (64, 63)])
def test_a_spline_of_parts_equals_that_of_scipy(size, new):
    values = np.random.default_rng(size).normal(size=(2, size, 3))
    whole = np.stack(
        [
            ndimage.zoom(channel, (new / size, 1), order=3, mode="nearest", grid_mode=True)
            for channel in values
        ]
    )
    positions = size / new * (np.arange(new) + 0.5) - 0.5
    for start in range(0, new, 7):
        where = positions[start : start + 7]
        low = max(0, int(np.floor(where[0])) - HALO)
        high = min(size, int(np.floor(where[-1])) + 2 + HALO)
        found = spline(values[:, low:high], 0, where, low, size)
        assert np.allclose(found, whole[:, start : start + 7], atol=1e-10)


def test_the_axis_resampled_by_itself_is_that_of_nnunet():
    assert separate_axis(None, (5, 1, 1), (1, 1, 1)) == 0
    assert separate_axis(None, (1, 1, 1), (1, 4, 1)) == 1
    assert separate_axis(None, (3, 1, 1), (2, 1, 1)) is None
    assert separate_axis(None, (0.2, 1, 1), (1, 1, 1)) is None
    assert separate_axis(False, (5, 1, 1), (1, 1, 1)) is None
    assert separate_axis(True, (2, 1, 1), (1, 1, 1)) == 0


def test_stored_and_resampled_voxels_correspond():
    rule = ResamplingRule(1, None)
    grid = PlannedGrid.planned((20, 30), ((2, 18), (0, 30)), (1.0, 2.0), (1.7, 1.1), rule, rule)
    assert grid.sizes == (round(16 / 1.7), round(60 / 1.1))
    for axis in range(2):
        stored = grid.stored_positions(axis, 0, grid.sizes[axis])
        assert np.isclose((stored[0] + stored[-1]) / 2, grid.start[axis] + (grid.box[axis] - 1) / 2)
    assert grid.stored_box(tuple((0, size) for size in grid.sizes)) == ((2, 18), (0, 30))
    outside = grid.outside((slice(0, 20), slice(4, 6)))
    assert outside is not None
    assert np.array_equal(np.flatnonzero(outside[:, 0]), [0, 1, 18, 19])


def test_windows_are_spread_as_nnunet_spreads_them():
    assert spread_starts(110, 64, 0.5) == (0, 23, 46)  # the example of its own comment
    assert spread_starts(64, 64, 0.5) == (0,)
    assert spread_starts(5, 1, 0.5) == (0, 1, 2, 3, 4)
