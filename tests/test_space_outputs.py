"""Predictions in space: place, size, unit and orientation of OME-Zarr, TIFF and NIfTI outputs, whole and in part."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from prediction import make_predictor, save_checkpoint
from test_placement import reoriented, write_nifti, write_ome

from volumen.data.formats.opening import open_volume
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.output.stored import InstanceSpec, OutputSpec, most_frequent
from volumen.inference.predict import PredictRequest, predict
from volumen.inference.rules import read_rules
from volumen.inference.windows.heads import Head
from volumen.utils.errors import VolumenError

SHAPE = (13, 24, 19)
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
REGION = ((8, 12), (2, 20), (4, 19))


@pytest.fixture
def request_of(tmp_path):
    checkpoint = str(save_checkpoint(tmp_path / "m.pth"))

    def make(image, output, **options):
        return PredictRequest(
            str(image), checkpoint, str(tmp_path / output), amp="off", device="cpu", **options
        )

    return make


def placed(group) -> list[tuple[list[float], list[float]]]:
    """Return scale and translation of every level."""
    (multiscale,) = group.attrs["ome"]["multiscales"]
    return [
        (entry["coordinateTransformations"][0]["scale"], entry["coordinateTransformations"][1]["translation"])
        for entry in multiscale["datasets"]
    ]


@pytest.mark.parametrize("region", [None, REGION])
@pytest.mark.parametrize("dtype", ["uint8", "labels"])
def test_an_ome_zarr_prediction_lies_over_its_image(tmp_path, request_of, region, dtype):
    write_ome(tmp_path / "a.zarr", IMAGE, (8, 4, 4), translation=(40, 80, 80))
    predict(request_of(tmp_path / "a.zarr", "p.zarr", region=region, dtype=dtype))
    root = zarr.open_group(tmp_path / "p.zarr", mode="r")
    start = [low for low, _ in region or ((0, 0),) * 3]
    first = np.array([40, 80, 80]) + np.array(start) * [8, 4, 4]
    for name in ("normals", "labels/ink" if dtype == "labels" else "ink"):
        for scale, translation in placed(root[name]):
            step = np.array(scale[-3:])
            # The low corner of every level is that of the image's voxels.
            np.testing.assert_allclose(np.array(translation[-3:]) - step / 2, first - np.array([8, 4, 4]) / 2)
        assert {a.get("unit") for a in root[name].attrs["ome"]["multiscales"][0]["axes"]} - {None} == {
            "nanometer"
        }
    folder = tmp_path / "p.zarr" / ("labels/tissue" if dtype == "labels" else "tissue")
    assert open_volume(folder).geometry.origin == pytest.approx(tuple(first))


def test_mixed_units_are_written_as_one(tmp_path, request_of):
    write_ome(
        tmp_path / "a.zarr", IMAGE, (0.04, 4, 4), ("micrometer", "nanometer", "nanometer"), (0.4, 80, 80)
    )
    predict(request_of(tmp_path / "a.zarr", "p.zarr"))
    geometry = open_volume(tmp_path / "p.zarr" / "ink").geometry
    assert geometry.unit == "micrometer"
    assert geometry.spacing == pytest.approx((0.04, 0.004, 0.004))
    assert geometry.origin == pytest.approx((0.4, 0.08, 0.08))


def test_an_image_without_a_size_has_a_prediction_without_one(tmp_path, request_of):
    zarr.create_array(tmp_path / "a.zarr", data=IMAGE, chunks=SHAPE)
    predict(request_of(tmp_path / "a.zarr", "p.zarr"))
    group = zarr.open_group(tmp_path / "p.zarr" / "ink", mode="r")
    assert placed(group)[0] == ([1, 1, 1], [0, 0, 0])
    assert "unit" not in group.attrs["ome"]["multiscales"][0]["axes"][0]


@pytest.mark.parametrize("classes", [None, ["background", "paper", "air"]])
def test_label_outputs_are_ome_zarr_labels(tmp_path, request_of, classes):
    models = pytest.importorskip("ome_zarr_models.v05")
    write_ome(tmp_path / "a.zarr", IMAGE, (4, 4, 4))
    request = request_of(tmp_path / "a.zarr", "p.zarr", dtype="labels")
    if classes:
        import torch

        state = torch.load(request.checkpoint, weights_only=True)
        state["config"]["dataset_config"]["targets"]["tissue"]["classes"] = classes
        torch.save(state, request.checkpoint)
    predict(request)
    root = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert root["labels"].attrs["ome"] == {"version": "0.5", "labels": ["ink", "tissue"]}
    models.Labels.from_zarr(root["labels"])
    tissue = root["labels/tissue"]
    models.ImageLabel.from_zarr(tissue)
    label = tissue.attrs["ome"]["image-label"]
    assert [entry["label-value"] for entry in label["colors"]] == [1, 2]
    assert len({tuple(entry["rgba"]) for entry in label["colors"]}) == 2
    assert [entry["class"] for entry in label["properties"]] == (classes[1:] if classes else ["1", "2"])
    source = tmp_path / "p.zarr" / "labels" / "tissue" / label["source"]["image"]
    assert source.resolve() == (tmp_path / "a.zarr").resolve()
    assert tissue.attrs["ome"]["multiscales"][0]["type"] == "mode"
    assert root["normals"].attrs["ome"]["multiscales"][0]["type"] == "mean"
    for level in range(1, 3):
        np.testing.assert_array_equal(tissue[str(level)][...], mode_by_loops(tissue[str(level - 1)][...]))


def mode_by_loops(values: np.ndarray) -> np.ndarray:
    shape = tuple(-(-size // 2) for size in values.shape)
    result = np.zeros(shape, values.dtype)
    for index in np.ndindex(shape):
        cell = values[tuple(slice(2 * i, 2 * i + 2) for i in index)].reshape(-1).tolist()
        result[index] = max(dict.fromkeys(cell), key=cell.count)
    return result


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 3), (1, 1, 9)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_the_mode_of_cells_is_that_of_loops(shape, dtype):
    values = np.random.default_rng(1).integers(0, 4, shape).astype(dtype)
    np.testing.assert_array_equal(most_frequent(values[None], (2, 2, 2))[0], mode_by_loops(values))
    np.testing.assert_array_equal(most_frequent(values[None], (1, 1, 1))[0], values)


def test_instances_keep_their_numbers_in_coarse_levels():
    values = np.random.default_rng(2).choice([0, 7, 4_000_000_000], (1, 8, 8, 8)).astype(np.uint32)
    stored = InstanceSpec(Head("cells", 1, "none", "instances"))
    assert set(np.unique(stored.coarser(values, (2, 2, 2)))) <= {0, 7, 4_000_000_000}
    probabilities = OutputSpec(Head("ink", 1))
    assert probabilities.coarser(np.full((1, 2, 2, 2), 9, np.uint8), (2, 2, 2)).item() == 9


def test_the_container_lists_its_images_as_bioformats2raw(tmp_path, request_of):
    write_ome(tmp_path / "a.zarr", IMAGE, (8, 4, 4))
    predict(request_of(tmp_path / "a.zarr", "p.zarr", dtype="labels"))
    root = zarr.open_group(tmp_path / "p.zarr", mode="r")
    series = root["OME"].attrs["ome"]["series"]
    tree = ElementTree.parse(tmp_path / "p.zarr" / "OME" / "METADATA.ome.xml").getroot()
    space = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
    images = tree.findall(f"{space}Image")
    assert [image.attrib["ID"] for image in images] == [f"Image:{path}" for path in series]
    assert series == ["labels/ink", "labels/tissue", "normals"]
    for image, path in zip(images, series):
        (pixels,) = image.findall(f"{space}Pixels")
        assert "multiscales" in root[path].attrs["ome"]
        assert tuple(int(pixels.attrib[f"Size{axis}"]) for axis in "ZYX") == SHAPE
        assert pixels.attrib["PhysicalSizeZ"] == "8"
        assert pixels.attrib["PhysicalSizeZUnit"] == "nm"
        assert len(pixels.findall(f"{space}Channel")) == (3 if path == "normals" else 1)
    channels = root["normals"].attrs["ome"]["omero"]["channels"]
    assert [channel["label"] for channel in channels] == ["x", "y", "z"]


def test_labels_that_a_person_added_are_not_removed(tmp_path, request_of):
    write_ome(tmp_path / "a.zarr", IMAGE, (8, 4, 4))
    request = request_of(tmp_path / "a.zarr", "p.zarr", dtype="labels")
    predict(request)
    zarr.open_group(tmp_path / "p.zarr", mode="a").create_group("labels/corrected")
    with pytest.raises(VolumenError, match="holds labels/corrected, which no prediction made"):
        predict(replace(request, overlap=0.25, overwrite=True))


def sized_image(folder: Path, form: str, sizes=(2.0, 0.5, 0.5), unit="micrometer") -> Path:
    if form == "zarr":
        write_ome(folder / "a.zarr", IMAGE, sizes, (unit,) * 3)
        return folder / "a.zarr"
    short = {"micrometer": "µm", "nanometer": "nm", "millimeter": "mm"}[unit]
    known = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", sizes)}
    units = {f"PhysicalSize{axis}Unit": short for axis in "ZYX"}
    tifffile.imwrite(folder / "a.ome.tif", IMAGE, ome=True, metadata={"axes": "ZYX", **known, **units})
    return folder / "a.ome.tif"


@pytest.mark.parametrize("unit", ["micrometer", "nanometer", "millimeter"])
@pytest.mark.parametrize("form", ["zarr", "ome.tif"])
@pytest.mark.parametrize("region", [None, REGION])
def test_tiff_predictions_carry_their_voxel_size(tmp_path, request_of, form, unit, region):
    image = sized_image(tmp_path, form, unit=unit)
    predict(request_of(image, "out", format="tif", region=region))
    for name in ("ink", "normals"):
        path = tmp_path / "out" / f"a_{name}.tif"
        with tifffile.TiffFile(path) as tiff:
            pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
            assert tiff.series[0].dtype == (np.float32 if name == "normals" else np.uint8)
            (pages, centimetres), resolution_unit = (
                tiff.pages[0].tags["XResolution"].value, tiff.pages[0].tags["ResolutionUnit"].value,
            )  # fmt: skip
        assert [float(pixels[f"PhysicalSize{axis}"]) for axis in "ZYX"] == [2.0, 0.5, 0.5]
        metres = {"micrometer": 1e-6, "nanometer": 1e-9, "millimeter": 1e-3}[unit]
        assert int(resolution_unit) == 3
        assert centimetres / pages == pytest.approx(0.5 * metres * 100, rel=1e-4)
        assert open_volume(path).geometry.spacing == pytest.approx((2.0, 0.5, 0.5))
        assert open_volume(path).unit == unit


def test_a_tiff_prediction_without_a_unit_does_not_read_as_micrometers(tmp_path, request_of):
    zarr.create_array(tmp_path / "a.zarr", data=IMAGE, chunks=SHAPE)
    predict(request_of(tmp_path / "a.zarr", "out", format="tif"))
    assert open_volume(tmp_path / "out" / "a_ink.tif").unit is None


def test_distances_and_directions_are_float32_in_files_to_their_last_digit(tmp_path, request_of):
    write_ome(tmp_path / "a.zarr", IMAGE, (8, 4, 4))
    predict(request_of(tmp_path / "a.zarr", "exact.zarr", dtype="float32", targets=("normals",)))
    exact = zarr.open_group(tmp_path / "exact.zarr", mode="r")["normals/0"][...]
    predict(request_of(tmp_path / "a.zarr", "n.tif", targets=("normals",)))
    predict(request_of(tmp_path / "a.zarr", "m.nii.gz", targets=("normals",)))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "n.tif"), exact)
    stored = np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj)
    np.testing.assert_array_equal(stored.transpose(3, 2, 1, 0), exact)


@pytest.mark.parametrize(
    ("unit", "size", "expected", "name"),
    [
        ("nanometer", 4.0, 0.004, "micron"),
        ("micrometer", 4.0, 4.0, "micron"),
        ("millimeter", 0.5, 0.5, "mm"),
        ("centimeter", 0.5, 5.0, "mm"),
        (None, 4.0, 4.0, "unknown"),
    ],
)
def test_nifti_predictions_state_size_unit_and_place(tmp_path, request_of, unit, size, expected, name):
    write_ome(tmp_path / "a.zarr", IMAGE, (size,) * 3, (unit,) * 3, (10 * size, 0, 3 * size))
    predict(request_of(tmp_path / "a.zarr", "p.nii.gz", targets=("ink",), region=REGION))
    image = nibabel.load(tmp_path / "p.nii.gz")
    assert image.header.get_xyzt_units()[0] == name
    assert image.header.get_zooms() == pytest.approx((expected,) * 3, rel=1e-6)
    np.testing.assert_allclose(image.affine[:3, 3], np.array([4 + 3, 2, 8 + 10]) * expected, rtol=1e-5)


CODES = ["LPS", "PIR", "RAS"]


def oriented_predictor(heads, shape):
    predictor = make_predictor(3, shape, heads)
    return replace(predictor, orientation="SAR", spacing=(3.0, 1.5, 2.0), unit="millimeter")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tta", ["none", "mirror"])
def test_a_scan_in_another_orientation_is_predicted_as_if_it_were_reoriented(tmp_path, codes, tta, caplog):
    """One window, so that the reference needs no grid of windows: nibabel turns the file, and the result back."""
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    small = IMAGE[:6, :8, :10]
    heads = {"ink": (1, "sigmoid", "binary"), "normals": (3, "none", "vector")}
    predictor = oriented_predictor(heads, small.shape)
    write_nifti(tmp_path / "plain.nii", small, affine)
    turned, moved = reoriented(small, affine, codes)
    write_nifti(tmp_path / "turned.nii", turned, moved)
    results = {}
    for name in ("plain", "turned"):
        output = str(tmp_path / f"{name}.zarr")
        predict(
            PredictRequest(
                str(tmp_path / f"{name}.nii"), "m", output, amp="off", dtype="float32", tta=tta, device="cpu"
            ),
            predictor=predictor,
        )
        root = zarr.open_group(output, mode="r")
        results[name] = root["ink/0"][...], root["normals/0"][...]
    assert ("windows are turned for the network" in caplog.text) is (codes != "RAS")
    expected, _ = reoriented(results["plain"][0], affine, codes)
    np.testing.assert_allclose(results["turned"][0], expected, atol=1e-5)
    # A direction keeps its place and its direction in space: components along (x, y, z) of the arrays.
    steps = moved[:3, :3] / np.linalg.norm(moved[:3, :3], axis=0)
    in_space = [reoriented(component, affine, codes)[0] for component in results["plain"][1]]
    np.testing.assert_allclose(np.einsum("ij,jzyx->izyx", steps, results["turned"][1]), in_space, atol=1e-5)


def test_a_head_that_cannot_be_turned_is_refused(tmp_path):
    write_nifti(tmp_path / "a.nii", *reoriented(IMAGE, np.diag([2.0, 1.5, 3.0, 1.0]), "LPS"))
    predictor = oriented_predictor({"shape": (10, "none", "field")}, (8, 8, 8))
    with pytest.raises(VolumenError, match=r"a\.nii: expected axes that run to SAR.*found SPL"):
        predict(PredictRequest(str(tmp_path / "a.nii"), "m", str(tmp_path / "p.zarr")), predictor=predictor)


@pytest.mark.parametrize(
    ("spacing", "unit", "warns"),
    [
        ((3.0, 1.5, 2.0), "millimeter", False),
        ((3000.0, 1500.0, 2000.0), "micrometer", False),
        ((6.0, 3.0, 4.0), "millimeter", True),
        ((6.0, 3.0, 4.0), None, False),  # only ratios compare
        ((1.0, 1.0, 1.0), None, True),
    ],
)
def test_the_voxel_size_is_compared_with_that_of_the_training(tmp_path, caplog, spacing, unit, warns):
    write_ome(tmp_path / "a.zarr", IMAGE, spacing, (unit,) * 3)
    predictor = oriented_predictor({"ink": (1, "sigmoid", "binary")}, (8, 8, 8))
    predict(PredictRequest(str(tmp_path / "a.zarr"), "m", str(tmp_path / "p.zarr")), predictor=predictor)
    assert ("the network was trained on 3 x 1.5 x 2 millimeter" in caplog.text) is warns


def test_an_impossible_size_is_a_warning_in_prediction(tmp_path, request_of, caplog):
    image = sized_image(tmp_path, "ome.tif", (0.0, 0.5, 0.5))
    predict(request_of(image, "p.zarr"))
    assert "a.ome.tif: states a voxel size of 0 x 0.5 x 0.5, which counts as unknown" in caplog.text
    assert placed(zarr.open_group(tmp_path / "p.zarr" / "ink", mode="r"))[0][0] == [1, 1, 1]


def test_a_mask_in_another_orientation_is_turned(tmp_path):
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :5] = 1
    write_nifti(tmp_path / "a.nii", IMAGE, affine)
    write_nifti(tmp_path / "mask.nii", *reoriented(mask, affine, "PIR"))
    predict(
        PredictRequest(
            str(tmp_path / "a.nii"), "m", str(tmp_path / "p.zarr"), mask=str(tmp_path / "mask.nii"),
            dtype="float32",
        ),
        predictor=make_predictor(),
    )  # fmt: skip
    found = zarr.open_group(tmp_path / "p.zarr", mode="r")["ink/0"][...]
    np.testing.assert_array_equal(found != 0, mask != 0)


@pytest.mark.parametrize(("form", "region"), list(product(["zarr", "nii.gz"], [None, REGION])))
@pytest.mark.parametrize("codes", ["PIR", "LPS"])
def test_evaluate_turns_labels_to_their_prediction(tmp_path, request_of, form, region, codes):
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    write_nifti(tmp_path / "a.nii", IMAGE, affine)
    predict(request_of(tmp_path / "a.nii", "truth.zarr", dtype="labels", targets=("ink",)))
    truth = zarr.open_group(tmp_path / "truth.zarr", mode="r")["labels/ink/0"][...]
    (tmp_path / "labels").mkdir()
    write_nifti(tmp_path / "labels" / "a_ink.nii", *reoriented(truth, affine, codes))
    output = "found.zarr" if form == "zarr" else "found"
    kind = None if form == "zarr" else "nifti"
    predict(
        request_of(tmp_path / "a.nii", output, dtype="labels", targets=("ink",), format=kind, region=region)
    )
    evaluation = evaluate(
        EvaluateRequest(str(tmp_path / output), str(tmp_path / "labels"), str(tmp_path / "e"))
    )
    assert evaluation.mean["ink/dice"] > 0.999


def test_evaluate_says_what_lies_elsewhere_and_refuses_impossible_sizes(tmp_path, request_of, caplog):
    write_ome(tmp_path / "a.zarr", IMAGE, (4, 4, 4), translation=(40, 0, 0))
    predict(request_of(tmp_path / "a.zarr", "p.zarr", dtype="labels", targets=("ink",)))
    (tmp_path / "labels").mkdir()
    write_ome(tmp_path / "labels" / "a_ink.zarr", IMAGE // 128, (4, 4, 4))
    request = EvaluateRequest(str(tmp_path / "p.zarr"), str(tmp_path / "labels"), str(tmp_path / "e"))
    with pytest.raises(VolumenError, match=r"a_ink\.zarr: lies elsewhere in space than .* or give --spacing"):
        evaluate(request)
    with caplog.at_level(logging.WARNING):
        evaluate(replace(request, spacing=(4.0, 4.0, 4.0)))
    assert "a_ink.zarr lies elsewhere in space than" in caplog.text
    for folder in ("found", "truth"):
        (tmp_path / folder).mkdir()
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": float("nan")}
    meta = {"axes": "ZYX", **sizes}
    tifffile.imwrite(tmp_path / "found" / "a_ink.ome.tif", IMAGE // 128, ome=True, metadata=meta)
    tifffile.imwrite(tmp_path / "truth" / "a_ink.tif", IMAGE // 128)
    wrong = EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "truth"), str(tmp_path / "e2"))
    with pytest.raises(VolumenError, match=r"a_ink\.ome\.tif: .*found a voxel size of nan.*--spacing"):
        evaluate(wrong)
    assert evaluate(replace(wrong, spacing=(1.0, 1.0, 1.0))).mean["ink/dice"] == 1.0


def test_evaluate_counts_distances_of_all_cases_in_one_unit(tmp_path):
    """Two cases of the same error of one voxel, one stated in nanometers and one in micrometers."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[4:8, 5:15, 5:15] = 1
    for folder in ("found", "labels"):
        (tmp_path / folder).mkdir()
        values = np.roll(truth, 1 if folder == "found" else 0, axis=0)
        write_ome(tmp_path / folder / "a_ink.zarr", values, (40, 40, 40))
        write_ome(tmp_path / folder / "b_ink.zarr", values, (0.04,) * 3, ("micrometer",) * 3)
    evaluation = evaluate(
        EvaluateRequest(
            str(tmp_path / "found"), str(tmp_path / "labels"), str(tmp_path / "e"), metrics=("hd95",)
        )
    )
    values = [row["ink/hd95"] for row in evaluation.cases.values()]
    assert values == pytest.approx([40.0, 40.0])
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["settings"]["spacing"] == [40, 40, 40]


def test_a_target_called_labels_has_a_place_of_its_own(tmp_path, request_of):
    write_ome(tmp_path / "a.zarr", IMAGE, (4, 4, 4))
    heads = {"labels": (1, "sigmoid", "binary"), "ink": (1, "sigmoid", "binary")}
    predictor = make_predictor(3, (8, 8, 8), heads)
    request = request_of(tmp_path / "a.zarr", "p.zarr")
    for dtype, folder in (("uint8", "labels"), ("labels", "labels/labels")):
        output = str(tmp_path / f"{dtype}.zarr")
        predict(replace(request, output=output, dtype=dtype), predictor=predictor)
        assert find_target(Path(output), "labels") == Path(output) / folder
        assert open_volume(Path(output) / folder).shape == SHAPE
    pytest.importorskip("bioimage_cpp")
    mixed = replace(request, dtype="labels", instances=read_rules("labels"))
    with pytest.raises(VolumenError, match="target labels: cannot be stored as an image"):
        predict(mixed, predictor=predictor)


def test_a_coarse_level_is_predicted_in_its_place(tmp_path, request_of):
    """A level 1 of means, as other programs write it, beside a level 0 that begins at 40, 80, 80."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    datasets = []
    for level, (array, scale, translation) in enumerate(
        [(IMAGE, [8, 4, 4], [40, 80, 80]), (IMAGE[::2, ::2, ::2], [16, 8, 8], [44, 82, 82])]
    ):
        group.create_array(str(level), data=array, chunks=array.shape)
        steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    predict(request_of(tmp_path / "a.zarr", "p.zarr", level=1))
    geometry = open_volume(tmp_path / "p.zarr" / "ink").geometry
    assert (geometry.spacing, geometry.origin) == ((16, 8, 8), (44, 82, 82))
    inner = open_volume(tmp_path / "a.zarr" / "1").geometry
    assert (inner.spacing, inner.unit, inner.origin) == ((16, 8, 8), "nanometer", (44, 82, 82))


@pytest.mark.parametrize("codes", ["PIR", "LPS"])
def test_evaluate_turns_labels_to_predictions_of_other_programs(tmp_path, codes):
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    truth = IMAGE // 128
    for folder in ("found", "labels"):
        (tmp_path / folder).mkdir()
    write_nifti(tmp_path / "found" / "a_ink.nii", truth, affine)
    write_nifti(tmp_path / "labels" / "a_ink.nii", *reoriented(truth, affine, codes))
    evaluation = evaluate(
        EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "labels"), str(tmp_path / "e"))
    )
    assert evaluation.mean["ink/dice"] == 1.0
