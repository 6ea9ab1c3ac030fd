"""Layers of a viewer, played by plain objects with napari's attributes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import zarr

from volumen.data.napari_layers import cases_from_viewer
from volumen.utils.errors import VolumenError


@dataclass
class Image:
    name: str
    data: object
    scale: tuple = (1, 1, 1)
    rgb: bool = False
    multiscale: bool = False


class Labels(Image):
    pass


class Points(Image):
    pass


@dataclass
class Viewer:
    layers: list = field(default_factory=list)


def stack(value=0, shape=(8, 9, 10)):
    return np.full(shape, value, "u1")


def test_layers_are_paired_without_a_copy():
    image, ink, mask = stack(1), stack(2), stack(3)
    layers = [
        Image("a_b", image, (4, 2, 2)),
        Labels("a_b_ink", ink),
        Labels("a_b_mask", mask),
        Points("p", None),
    ]
    (case,) = cases_from_viewer(Viewer(layers))
    assert (case.name, case.spacing) == ("a_b", (4.0, 2.0, 2.0))
    assert case.image.array is image
    assert case.labels["ink"].array is ink
    assert case.masks["ink"].array is mask
    ink[0, 0, 0] = 77
    assert case.labels["ink"].read((slice(0, 1),) * 3).item() == 77


def test_fingerprint_follows_a_stroke_of_the_brush():
    ink = stack()
    (case,) = cases_from_viewer(Viewer([Image("a", stack()), Labels("a_ink", ink)]))
    before = case.labels["ink"].fingerprint()
    ink[3, 4, 5] = 1
    assert case.labels["ink"].fingerprint() != before


def test_rgb_channels_multiscale_and_lazy_arrays(tmp_path):
    rgb = Image("r", stack(shape=(30, 40, 3)), (1, 1), rgb=True)
    (case,) = cases_from_viewer(Viewer([rgb, Labels("r_ink", stack(shape=(30, 40)))]))
    assert (case.image.channels, case.image.shape) == (3, (30, 40))
    lazy = zarr.create_array(tmp_path / "a.zarr", data=stack(5, (2, 8, 9, 10)), chunks=(1, 4, 9, 5))
    layers = [Image("a", [lazy, None], (1, 3, 2, 2), multiscale=True), Labels("a_ink", stack())]
    (case,) = cases_from_viewer(Viewer(layers))
    assert (case.image.channels, case.image.shape, case.spacing) == (2, (8, 9, 10), (3.0, 2.0, 2.0))
    assert case.image.chunks == (4, 9, 5)
    assert case.image.read((slice(0, 2),) * 3).tolist() == np.full((2, 2, 2, 2), 5).tolist()


def test_what_is_missing():
    with pytest.raises(VolumenError, match=r"napari: expected an Image layer, found none"):
        cases_from_viewer(Viewer([Labels("a_ink", stack())]))
    with pytest.raises(VolumenError, match=r"napari: expected labels named <image>_<target>, found none"):
        cases_from_viewer(Viewer([Image("a", stack())]))
    with pytest.raises(VolumenError, match=r"napari layer a_ink: expected shape \(8, 9, 10\)"):
        cases_from_viewer(Viewer([Image("a", stack()), Labels("a_ink", stack(shape=(8, 9, 11)))]))


def placed(layer, translate=None, units=None):
    layer.translate, layer.units = translate, units
    return layer


def test_units_and_places_of_layers_are_compared(caplog):
    image = placed(Image("a", stack(), (4, 2, 2)), (0, 10, 0), ("micrometer",) * 3)
    same = placed(Labels("a_ink", stack(), (4, 2, 2)), (0, 10, 0), ("µm",) * 3)
    (case,) = cases_from_viewer(Viewer([image, same]))
    assert (case.spacing, case.unit) == ((4, 2, 2), "micrometer")
    assert case.image.geometry.origin == (0, 10, 0)
    assert caplog.text == ""
    cases_from_viewer(Viewer([image, placed(Labels("a_ink", stack(), (4, 2, 2)))]))
    assert "napari layer a_ink lies elsewhere in space than napari layer a" in caplog.text
    assert "it begins 0, -5, 0 voxels" in caplog.text


def test_a_mirrored_labels_layer_that_covers_its_image_is_turned():
    values = np.random.default_rng(0).integers(0, 2, (8, 9, 10)).astype("u1")
    mirrored = placed(Labels("a_ink", values[:, ::-1], (4, -2, 2)), (0, 16, 0))
    (case,) = cases_from_viewer(Viewer([Image("a", stack(), (4, 2, 2)), mirrored]))
    np.testing.assert_array_equal(case.labels["ink"].read((slice(None),) * 3)[0], values)
