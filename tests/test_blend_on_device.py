"""Windows blended on the network's device: bitwise the prediction of arrays in main memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zarr
from prediction import make_predictor

from volumen.data.formats.opening import open_volume
from volumen.inference.blocks import block_maker
from volumen.inference.jobs import Job
from volumen.inference.predict import predict_volume
from volumen.inference.request import PredictRequest


@pytest.mark.parametrize("budget", [1 << 30, 1])
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"dtype": "labels"}, {"batch_size": 3}])
def test_a_prediction_is_the_same_bit_by_bit(tmp_path, monkeypatch, options, budget):
    image = np.random.default_rng(0).integers(0, 256, (21, 40, 33), dtype=np.uint8)
    image[:, :16, :16] = 7  # skipped windows
    zarr.create_array(tmp_path / "image.zarr", data=image, chunks=(16, 16, 16))
    found = []
    for there in (False, True):
        monkeypatch.setattr(block_maker, "blends_on_device", lambda _, there=there: there)
        monkeypatch.setattr(block_maker, "sums_bytes", lambda _: budget)
        out = tmp_path / f"{there}.zarr"
        request = PredictRequest(str(tmp_path / "image.zarr"), "", str(tmp_path), overlap=0.5, **options)
        torch.manual_seed(0)
        predict_volume(make_predictor(), Job(open_volume(tmp_path / "image.zarr"), out), request)
        group = zarr.open_group(out, mode="r")
        arrays = {}

        def collect(name, item, arrays=arrays):
            if isinstance(item, zarr.Array):
                arrays[name] = item[...]

        for name, item in group.members(max_depth=None):
            collect(name, item)
        found.append(arrays)
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values, err_msg=name)
        assert values.any() or "normals" in name
