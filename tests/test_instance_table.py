"""Colours and properties of instances in the metadata of their label."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from prediction import make_predictor
from scipy import ndimage
from test_file_writers import IMAGE, PLACE, REGION, SPACING
from test_placement import write_ome

from volumen.inference.output.ome_zarr import ZarrOutput
from volumen.inference.output.stored import InstanceSpec
from volumen.inference.postprocess import instance_table
from volumen.inference.postprocess.instance_table import colour_of, describe_instances, measure_instances
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest
from volumen.inference.rules import read_rules
from volumen.inference.windows.heads import Head


def arrays_of(root, labels, block):
    spec = InstanceSpec(Head("cells", 1, "none", "instances"))
    arrays = ZarrOutput(
        root, [spec], labels.shape, block, spacing=(2.0, 1.0, 1.0), unit="micrometer", pyramid=False
    )
    arrays.create()
    whole = tuple(slice(0, n) for n in labels.shape)
    arrays.write("cells", whole, labels[None])
    return arrays


@pytest.mark.parametrize("block", [(4, 5, 6), (16, 16, 16)])
def test_sizes_and_middles_are_those_of_scipy(tmp_path, block):
    labels = np.random.default_rng(0).integers(0, 9, (11, 12, 13)).astype(np.uint32)
    labels[labels == 4] = 0
    table = measure_instances(arrays_of(tmp_path / "a.zarr", labels, block), "cells")
    numbers = np.unique(labels)[1:]
    np.testing.assert_array_equal(table.numbers, numbers)
    np.testing.assert_array_equal(table.voxels, np.bincount(labels.ravel())[numbers])
    expected = ndimage.center_of_mass(np.ones(labels.shape), labels, numbers)
    np.testing.assert_allclose(table.middles, expected)


def test_many_instances_are_not_described(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(instance_table, "MOST_DESCRIBED", 5)
    labels = np.arange(8, dtype=np.uint32).reshape(2, 2, 2)
    arrays = arrays_of(tmp_path / "a.zarr", labels, (2, 2, 2))
    with caplog.at_level("INFO"):
        describe_instances(arrays, "cells")
    assert "more than 5 instances" in caplog.text
    group = zarr.open_group(tmp_path / "a.zarr" / arrays.groups["cells"], mode="r")
    assert "colors" not in group.attrs["ome"]["image-label"]


@pytest.mark.parametrize("region", [None, REGION])
def test_a_prediction_lists_its_instances_where_they_lie(tmp_path, region):
    pytest.importorskip("bioimage_cpp")
    write_ome(tmp_path / "a.zarr", IMAGE, SPACING, translation=PLACE)
    request = PredictRequest(
        str(tmp_path / "a.zarr"), "m", str(tmp_path / "p.zarr"), amp="off", device="cpu", region=region,
        instances=read_rules("foreground=ink"),
    )  # fmt: skip
    predict(request, predictor=make_predictor(3, (8, 8, 8), {"ink": (1, "sigmoid", "binary")}))
    group = zarr.open_group(tmp_path / "p.zarr" / "labels" / "ink_instances", mode="r")
    labels = group["0"][...]
    image_label = group.attrs["ome"]["image-label"]
    numbers = np.unique(labels)[1:]
    assert [entry["label-value"] for entry in image_label["properties"]] == numbers.tolist()
    assert [entry["label-value"] for entry in image_label["colors"]] == numbers.tolist()
    start = np.array([low for low, _ in region or ((0, 0),) * 3])
    for entry in image_label["properties"]:
        inside = np.argwhere(labels == entry["label-value"])
        assert entry["voxels"] == len(inside)
        np.testing.assert_allclose(
            entry["centroid"], np.array(PLACE) + (inside.mean(0) + start) * SPACING, atol=1e-5
        )
    models = pytest.importorskip("ome_zarr_models.v05")
    models.Labels.from_zarr(zarr.open_group(tmp_path / "p.zarr" / "labels", mode="r"))


def test_colours_of_neighbouring_numbers_are_far_apart():
    for number in range(1, 200):
        assert np.abs(np.subtract(colour_of(number), colour_of(number + 1))).max() > 60
