"""The last steps of a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import list_data_collate

from volumen.transforms.finalize import CropHalod, FinalizePatchd, RestrictToLabelledd
from volumen.utils.errors import VolumenError


def _sample(halo=(0, 0, 0), dtype=np.uint8):
    rng = np.random.default_rng(0)
    wide = tuple(6 + 2 * width for width in halo)
    return {
        "image": rng.random((2, 6, 6, 6), dtype=np.float32)[:, ::-1],
        "m": rng.integers(0, 3, (1, *wide)).astype(dtype),
        "m_mask": rng.random((1, *wide)) > 0.3,
        "d": rng.random((3, 6, 6, 6)).astype(np.float32),
        "d_mask": rng.random((1, 6, 6, 6)) > 0.3,
        "in_volume": None,
        "spacing": (2.0, 1.0, 1.0),
        "volume_name": "a",
        "start": (1, 2, 3),
        "spatial": object(),
    }


def test_crop_takes_the_halo_off():
    sample = _sample(halo=(1, 0, 2))
    out = CropHalod(["m"], (1, 0, 2))(sample)
    np.testing.assert_array_equal(out["m"], sample["m"][:, 1:-1, :, 2:-2])
    np.testing.assert_array_equal(out["m_mask"], sample["m_mask"][:, 1:-1, :, 2:-2])
    assert out["image"] is sample["image"]
    assert "in_volume" not in out


def test_one_number_is_a_halo_for_all_axes():
    sample = _sample(halo=(2, 2, 2))
    np.testing.assert_array_equal(CropHalod(["m"], 2)(sample)["m"], sample["m"][:, 2:-2, 2:-2, 2:-2])


def test_restriction_to_labelled_voxels_reaches_derived_targets():
    sample = _sample()
    out = RestrictToLabelledd(["m"], {"d": "m"})(sample)
    np.testing.assert_array_equal(out["m_mask"], sample["m_mask"] & (sample["m"] > 0))
    np.testing.assert_array_equal(out["d_mask"], sample["d_mask"] & (sample["m"] > 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.bool_])
def test_final_tensors_are_plain_and_collate(dtype):
    out = FinalizePatchd(["m"], ["d"])(_sample(dtype=dtype))
    types = {key: (type(value), value.dtype) for key, value in out.items() if hasattr(value, "dtype")}
    assert types == {
        "image": (torch.Tensor, torch.float32),
        "m": (torch.Tensor, torch.int16),
        "m_mask": (torch.Tensor, torch.bool),
        "d": (torch.Tensor, torch.float32),
        "d_mask": (torch.Tensor, torch.bool),
        "start": (torch.Tensor, torch.int64),
    }
    batch = list_data_collate([out, out])
    assert batch["image"].shape == (2, 2, 6, 6, 6)
    assert batch["m"].shape == batch["m_mask"].shape == (2, 1, 6, 6, 6)
    assert batch["volume_name"] == ["a", "a"]
    assert batch["start"].tolist() == [[1, 2, 3]] * 2
    assert [side.tolist() for side in batch["spacing"]] == [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]


def test_instance_numbers_are_no_class_indices():
    sample = _sample(dtype=np.uint32)
    sample["m"][0, 0, 0, 0] = 70_000
    with pytest.raises(VolumenError, match=r"'m' of a.*70000"):
        FinalizePatchd(["m"])(sample)
