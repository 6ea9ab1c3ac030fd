"""`volumen view --picture`: a plane of every layer, at its place and in the proportions of the voxels."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_placement import write_ome

from volumen.cli.main import main
from volumen.data.formats.volumes import ArrayVolume
from volumen.utils.errors import VolumenError
from volumen.viewing.layers import ADDED, MISSED, View, ViewLayer, layer_of
from volumen.viewing.picture import draw_layer, write_picture
from volumen.viewing.sources import find_view

SHAPE = (6, 20, 30)
AXES = {3: "zyx", 4: "czyx"}
IMAGE = np.random.default_rng(0).integers(20, 90, SHAPE).astype(np.uint8)


def layer(values, kind, start=(0, 0, 0)):
    made = layer_of(kind, ArrayVolume(values, axes=AXES[values.ndim]), kind, coarser=())
    return ViewLayer(**{**made.__dict__, "start": start})


def plane(z, base=None):
    return (slice(z, z + 1), slice(0, SHAPE[1]), slice(0, SHAPE[2]))


BASE = np.full((*SHAPE[1:], 3), 40.0, np.float32)


def test_instances_have_colours_and_neighbours_differ():
    label = np.zeros(SHAPE, np.uint32)
    label[3, 5:15, 5:15], label[3, 5:15, 15:25] = 70_001, 70_002
    drawn = draw_layer(layer(label, "instances"), plane(3), BASE)
    assert np.ptp(drawn[0, 0]) == 0
    assert np.abs(drawn[10, 8] - drawn[10, 18]).max() > 20
    assert np.array_equal(draw_layer(layer(label, "instances"), plane(2), BASE)[10, 8], drawn[0, 0])


def test_errors_are_orange_and_blue():
    errors = np.zeros(SHAPE, np.uint8)
    errors[3, 4, 4], errors[3, 10, 10] = MISSED, ADDED
    drawn = draw_layer(layer(errors, "errors"), plane(3), BASE)
    assert drawn[4, 4, 0] > drawn[4, 4, 2] + 100
    assert drawn[10, 10, 2] > drawn[10, 10, 0] + 100


def test_distances_diverge_and_probabilities_are_tints_over_the_image():
    distance = (
        np.linspace(-4, 4, SHAPE[2], dtype=np.float32)[None, None].repeat(SHAPE[0], 0).repeat(SHAPE[1], 1)
    )
    drawn = draw_layer(layer(distance, "distance"), plane(0), BASE)
    assert drawn[0, 0, 2] > drawn[0, 0, 0] + 50
    assert drawn[0, -1, 0] > drawn[0, -1, 2] + 50
    assert drawn[0, SHAPE[2] // 2].min() > 200
    share = np.zeros(SHAPE, np.uint8)
    share[0, :, 10:] = 255
    tint = draw_layer(layer(share, "binary"), plane(0), BASE)
    assert np.allclose(tint[:, :10], 0.8 * BASE[:, :10])
    assert (tint[:, 10:, 0] > 150).all()


def test_vectors_have_their_components_as_colours():
    vectors = np.zeros((3, *SHAPE), np.float32)
    vectors[0, ..., :15], vectors[2, ..., 15:] = 1, 1
    drawn = draw_layer(layer(vectors, "vector"), plane(1), BASE)
    assert drawn[5, 5].argmax() == 0
    assert drawn[5, 25].argmax() == 2


def test_a_part_lies_in_its_place():
    part = np.full((2, 5, 6), 255, np.uint8)
    drawn = draw_layer(layer(part, "binary", start=(3, 10, 20)), plane(4), BASE)
    inside = np.zeros(SHAPE[1:], bool)
    inside[10:15, 20:26] = True
    assert np.array_equal(drawn[..., 0] > 100, inside)
    nothing = draw_layer(layer(part, "binary", start=(3, 10, 20)), plane(0), BASE)
    assert nothing[..., 0].max() < 100


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_command_writes_a_picture_in_the_proportions_of_the_voxels(tmp_path, capsys, suffix):
    write_ome(tmp_path / "a.zarr", IMAGE, (2.0, 1.0, 2.0))
    write_ome(tmp_path / "b.zarr", (IMAGE > 60).astype(np.uint8), (2.0, 1.0, 2.0))
    out = tmp_path / "new" / f"p{suffix}"
    words = ["view", str(tmp_path / "a.zarr"), "--labels", str(tmp_path / "b.zarr"), "--picture", str(out)]
    assert main([*words, "--at", "2,5,5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {out}"
    with Image.open(out) as picture:
        # Two tiles of 300 pixels; rows of 1 and columns of 2: a third as high.
        assert picture.size == (2 * 308 + 8, 100 + 22 + 2 * 8)
    for given, message in (("9,5,5", "--at"), ("1,2", "--at"), ("a,b", "--at")):
        assert main([*words, "--at", given]) == 2
        assert message in capsys.readouterr().err
    assert main(["view", str(tmp_path / "a.zarr"), "--picture", str(tmp_path / "p.txt")]) == 2
    assert "expected a file that ends with .png, .jpg, .webp" in capsys.readouterr().err
    assert main(["view", str(tmp_path / "a.zarr"), "--at", "2,5,5"]) == 2


def test_a_flat_image_of_three_channels_has_its_colours(tmp_path):
    flat = np.zeros((40, 40, 3), np.uint8)
    flat[:20, ..., 0], flat[20:, ..., 1] = 200, 200
    tifffile.imwrite(tmp_path / "a.tif", flat, photometric="rgb")
    with Image.open(write_picture(find_view([str(tmp_path / "a.tif")]), tmp_path / "p.png")) as picture:
        colours = np.asarray(picture.convert("RGB"))
    assert colours[60, 150].argmax() == 0
    assert colours[290, 150].argmax() == 1


def test_a_view_without_an_image_is_drawn_on_black(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[3, 5:15, 5:15] = 1
    view = View((layer(label, "labels"),))
    with Image.open(write_picture(view, tmp_path / "p.png", (3, 0, 0))) as picture:
        assert np.asarray(picture.convert("RGB")).max() > 150
    with pytest.raises(VolumenError, match="expected a voxel of a volume of"):
        write_picture(view, tmp_path / "p.png", (3, 20, 0))
