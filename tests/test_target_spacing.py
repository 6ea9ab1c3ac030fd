"""Volumes of different voxel sizes on one grid: reading, the rule for the size, training patches, and prediction."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
import zarr
from prediction import make_predictor
from scipy.ndimage import map_coordinates
from torch import nn

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.patch_index import PatchLocation
from volumen.data.layout import OpenCase
from volumen.data.resampled import ResampledVolume
from volumen.data.space.resampling import Resampling
from volumen.data.target_spacing import automatic_spacing, resample_case, to_target_spacing
from volumen.inference.jobs import make_job
from volumen.inference.predict import predict_volume
from volumen.inference.request import PredictRequest
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import SpatialTransform
from volumen.utils.errors import VolumenError

STEPS = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.4, 1.5, 1.0), (0.73, 0.61, 2.7)]


def whole(volume):
    return tuple(slice(0, n) for n in volume.shape)


def reference(image, step, shape):
    """Interpolate an image (C, *space) by SciPy at the centres of voxels of another size."""
    axes = [
        np.clip((np.arange(n) + 0.5) * s - 0.5, 0, m - 1) for n, s, m in zip(shape, step, image.shape[1:])
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return np.stack([map_coordinates(channel.astype(float), grid, order=1) for channel in image])


@pytest.mark.parametrize("step", STEPS)
def test_a_resampled_image_is_the_linear_interpolation_at_the_voxel_centres(step):
    image = np.random.default_rng(0).integers(0, 255, (2, 9, 14, 17), dtype=np.uint8)
    volume = ResampledVolume(ArrayVolume(image, axes="czyx"), Resampling(image.shape[1:], step))
    assert volume.shape == tuple(max(1, round(n / s)) for n, s in zip(image.shape[1:], step))
    values = volume.read(whole(volume))
    np.testing.assert_allclose(values, reference(image, step, volume.shape), atol=1e-3)
    assert values.dtype == volume.dtype == np.float32


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_label", [False, True])
def test_a_region_is_the_crop_of_the_whole(step, is_label):
    image = np.random.default_rng(1).integers(0, 255, (9, 14, 17), dtype=np.uint8)
    volume = ResampledVolume(ArrayVolume(image), Resampling(image.shape, step), is_label=is_label)
    everything = volume.read(whole(volume))
    rng = np.random.default_rng(2)
    for _ in range(20):
        starts = [int(rng.integers(0, n)) for n in volume.shape]
        region = tuple(slice(a, int(rng.integers(a + 1, n + 1))) for a, n in zip(starts, volume.shape))
        np.testing.assert_array_equal(volume.read(region), everything[(slice(None), *region)])


@pytest.mark.parametrize("step", STEPS)
def test_a_resampled_label_takes_the_stored_voxel_that_contains_the_centre(step):
    label = np.random.default_rng(3).integers(0, 1000, (9, 14, 17), dtype=np.uint16)
    volume = ResampledVolume(ArrayVolume(label), Resampling(label.shape, step), is_label=True)
    found = volume.read(whole(volume))[0]
    for index in itertools.islice(np.ndindex(volume.shape), 0, None, 7):
        there = tuple(min(int((q + 0.5) * s), n - 1) for q, s, n in zip(index, step, label.shape))
        assert found[index] == label[there]
    assert found.dtype == label.dtype


@pytest.mark.parametrize("step", STEPS)
def test_boxes_that_touch_share_no_stored_voxel_and_lose_none(step):
    grid = Resampling((37, 41, 23), step)
    for axis, size in enumerate(grid.resampled_shape):
        cuts = sorted({0, size, *np.random.default_rng(4).integers(1, size, 4).tolist()})
        spans = [
            grid.stored_box([(a, b) if i == axis else (0, n) for i, n in enumerate(grid.resampled_shape)])[
                axis
            ]
            for a, b in itertools.pairwise(cuts)
        ]
        assert spans[0][0] == 0
        assert spans[-1][1] == grid.shape[axis]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


def test_a_grid_that_nowhere_differs_by_half_a_voxel_is_the_stored_one():
    assert Resampling.between((100, 100), (1.0, 1.0), (1.004, 0.997)).is_identity
    assert not Resampling.between((1000, 100), (1.0, 1.0), (1.004, 0.997)).is_identity
    assert Resampling.between((1000, 100), (0.5, 3.0), (0.5, 3.0)).is_identity


def test_the_place_in_space_is_kept():
    image = np.zeros((10, 12, 14), np.uint8)
    stored = ArrayVolume(image, affine=np.diag([3.0, 2.0, 1.0, 1.0]) @ _translation(5, -7, 11))
    volume = ResampledVolume(stored, Resampling(image.shape, (0.5, 2.0, 1.5)))
    # The outer corner of the first voxel stays where it is, and so do points inside.
    corner = np.array([-0.5, -0.5, -0.5, 1.0])
    np.testing.assert_allclose(volume.affine @ corner, stored.affine @ corner)
    q = np.array([3.0, 2.0, 4.0])  # (x, y, z)
    p = np.array([(3 + 0.5) * 1.5 - 0.5, (2 + 0.5) * 2.0 - 0.5, (4 + 0.5) * 0.5 - 0.5])
    np.testing.assert_allclose(volume.affine @ [*q, 1], stored.affine @ [*p, 1])


def _translation(*offset):
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix


def test_the_automatic_size_is_the_median_but_finer_along_a_coarse_axis_with_few_voxels():
    assert automatic_spacing([(1, 1, 1), (2, 1, 1), (3, 1, 1)], [(64, 64, 64)] * 3) == (2.0, 1.0, 1.0)
    # nnU-Net: the coarsest axis takes the 10th percentile, and does not become finer than the others.
    sizes = [(2.0, 1.0, 1.0)] + [(8.0, 1.0, 1.0)] * 4
    few = automatic_spacing(sizes, [(20, 256, 256)] * 5)
    assert few[1:] == (1.0, 1.0)
    assert few[0] == pytest.approx(np.percentile([s[0] for s in sizes], 10))
    assert automatic_spacing([(0.2, 1, 1)] * 2 + [(8.0, 1, 1)] * 9, [(20, 256, 256)] * 11)[0] >= 1.0
    # As many voxels along the coarse axis: the median.
    assert automatic_spacing(sizes, [(256, 256, 256)] * 5) == (8.0, 1.0, 1.0)
    assert automatic_spacing([(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)], [(100, 100)] * 3) == (0.7, 0.7)


def make_case(spacing=(2.0, 1.0, 1.0), shape=(20, 40, 36), seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, shape, dtype=np.uint8)
    label = (image > 128).astype(np.uint8)
    mask = np.ones(shape, np.uint8)
    mask[: shape[0] // 3] = 0
    volumes = [ArrayVolume(a, spacing=spacing, unit="micrometer") for a in (image, label, mask)]
    return OpenCase("a", volumes[0], {"ink": volumes[1]}, {"ink": volumes[2]}, spacing, "micrometer")


def location(start, size, shape, bounds=None):
    return PatchLocation(0, tuple(start), tuple(size), tuple(bounds or [(0, n) for n in shape]))


def read(case, start, size, spatial=None, bounds=None, **settings):
    sample = {"case": case, "location": location(start, size, case.image.shape, bounds)}
    if spatial is not None:
        sample["spatial"] = spatial
    return ReadPatchd(["ink"], size, normalization_scheme="none", **settings)(sample)


def test_a_plain_patch_is_the_crop_of_the_resampled_volumes():
    case = resample_case(make_case(), (1.0, 1.5, 1.0))
    start, size = (5, 3, 8), (16, 16, 16)
    sample = read(case, start, size)
    region = tuple(slice(a, a + n) for a, n in zip(start, size))
    np.testing.assert_allclose(sample["image"], case.image.read(region), atol=1e-3)
    np.testing.assert_array_equal(sample["ink_mask"], case.masks["ink"].read(region) > 0)
    known = sample["ink_mask"]
    np.testing.assert_array_equal(sample["ink"][known], case.labels["ink"].read(region)[known])
    assert sample["spacing"] == (1.0, 1.5, 1.0)


@pytest.mark.parametrize("flips", [(True, False, False), (False, True, True), (True, True, True)])
@pytest.mark.parametrize("permutation", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_flips_and_axis_swaps_of_a_patch_are_those_of_the_plain_one(flips, permutation):
    case = resample_case(make_case((1.0, 1.0, 1.0), (24, 24, 24)), (0.77, 0.77, 0.77))
    spatial = SpatialTransform(permutation, flips)
    plain, turned = read(case, (4, 5, 6), (16,) * 3), read(case, (4, 5, 6), (16,) * 3, spatial)
    for key in ("image", "ink", "ink_mask"):
        np.testing.assert_allclose(turned[key], spatial.orient(plain[key]), atol=1e-3)


def test_a_rotated_patch_interpolates_the_stored_voxels_once():
    stored = make_case((2.0, 1.0, 1.0), (30, 50, 50))
    case = resample_case(stored, (1.0, 1.0, 1.0))
    angle = np.deg2rad(20)
    matrix = np.eye(3)
    matrix[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    start, size = (20, 15, 15), (16, 16, 16)
    sample = read(case, start, size, SpatialTransform((0, 1, 2), (False,) * 3, matrix))
    centre = np.asarray(start) + (np.asarray(size) - 1) / 2
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij")).reshape(3, -1)
    there = centre[:, None] + matrix @ (grid - (np.asarray(size) - 1)[:, None] / 2)
    positions = (there + 0.5) * np.array([0.5, 1, 1])[:, None] - 0.5
    raw = stored.image.read(whole(stored.image))[0].astype(float)
    expected = map_coordinates(raw, positions, order=1, mode="nearest").reshape(size)
    np.testing.assert_allclose(sample["image"][0], expected, atol=1e-2)


def test_training_and_validation_patches_share_no_stored_voxel():
    shape = (40, 8, 8)
    image = np.zeros(shape, np.float32)
    image[20:] = 1000.0
    volume = ArrayVolume(image, spacing=(1.0, 1.0, 1.0))
    label = ArrayVolume((image > 0).astype(np.uint8))
    case = resample_case(OpenCase("a", volume, {"ink": label}, {}, (1.0, 1.0, 1.0)), (0.3, 1.0, 1.0))
    size = case.image.shape[0]
    cut = size // 2  # near the step of the image
    first = read(case, (cut - 16, 0, 0), (20, 8, 8), bounds=[(0, cut), (0, 8), (0, 8)])
    second = read(case, (cut - 4, 0, 0), (20, 8, 8), bounds=[(cut, size), (0, 8), (0, 8)])
    assert first["image"].max() == 0
    assert second["image"].min() == 1000
    assert not first["ink"][first["ink_mask"]].any()
    assert second["ink"][second["ink_mask"]].all()


def test_identity_gives_the_same_bytes():
    case = make_case()
    same = to_target_spacing([case], (2.0, 1.0, 1.0))[0]
    assert same.image is case.image
    assert same.labels["ink"] is case.labels["ink"]
    for key in ("image", "ink", "ink_mask"):
        np.testing.assert_array_equal(
            read(case, (3, 3, 3), (8, 8, 8))[key], read(same, (3, 3, 3), (8, 8, 8))[key]
        )


@pytest.mark.parametrize(
    ("setting", "words"),
    [((1.0, 1.0), "3 positive voxel sizes in micrometer"), ((1.0, 0.0, 1.0), "positive"),
     ((1000.0, 1000.0, 1000.0), "check the unit"), ("best", "auto")],
)  # fmt: skip
def test_an_impossible_target_is_refused(setting, words):
    with pytest.raises(VolumenError, match=words):
        to_target_spacing([make_case()], setting)


def test_volumes_without_a_voxel_size_are_refused():
    case = make_case()
    image = ArrayVolume(np.zeros((8, 8, 8), np.uint8))
    unknown = OpenCase("b", image, dict(case.labels), {}, (1.0, 1.0, 1.0))
    with pytest.raises(VolumenError, match="state their voxel size"):
        to_target_spacing([unknown], "auto")
    # A size of 1 that the settings give is stated.
    assert to_target_spacing([unknown], (2.0, 2.0, 2.0), stated=True)[0].image.shape == (4, 4, 4)


class Intensity(nn.Module):
    """Gives per target an affine function of the first channel, so that its prediction is known everywhere."""

    def __init__(self, scales: dict[str, list[float]]) -> None:
        super().__init__()
        self.scales = scales
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, targets=None):
        return {
            name: torch.cat([x[:, :1] * scale - 0.5 * scale for scale in self.scales[name]], dim=1)
            for name in (targets or self.scales)
        }


def known_predictor(spacing, heads=None, patch=(8, 8, 8), **changes):
    heads = heads or {"ink": (1, "sigmoid", "binary")}
    made = make_predictor(len(patch), patch, heads)
    network = Intensity({name: [4.0 / (i + 1) for i in range(entry[0])] for name, entry in heads.items()})
    return replace(
        made, network=network, spacing=spacing, unit="micrometer", resamples=True,
        config={"dataset_config": {"target_spacing": list(spacing)}}, **changes,
    )  # fmt: skip


def save_zarr(path, array, spacing, unit="micrometer"):
    group = zarr.open_group(path, mode="w", zarr_format=3)
    names = "zyx"[-array.ndim :]
    group.create_array("0", data=array, chunks=(8,) * array.ndim)
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{
            "axes": [{"name": n, "type": "space", "unit": unit} for n in names],
            "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(spacing)}]}],
        }],
    }  # fmt: skip
    return path


def ramp(shape):
    """A smooth image: its interpolation and what comes back differ little."""
    grids = np.meshgrid(*[np.linspace(0, np.pi, n) for n in shape], indexing="ij")
    return np.rint(127 + 120 * np.prod([np.sin(g) for g in grids], axis=0)).astype(np.uint8)


def run(predictor, image, output, **settings):
    from volumen.data.formats.opening import open_volume

    request = PredictRequest(str(image), "", str(output), **{"dtype": "float32", **settings})
    job = make_job(open_volume(image), None, str(output), tuple(predictor.targets), None)
    predict_volume(predictor, job, request)
    return zarr.open_group(output, mode="r")


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.5, 0.8, 1.3)])
def test_a_prediction_lies_on_the_voxels_of_its_image(tmp_path, spacing):
    image = ramp((24, 30, 28))
    path = save_zarr(tmp_path / "a.zarr", image, spacing)
    group = run(known_predictor((1.0, 1.0, 1.0)), path, tmp_path / "out.zarr")
    found = group["ink/0"][:]
    expected = 1 / (1 + np.exp(-4.0 * (image / 255 - 0.5)))
    assert found.shape == image.shape
    np.testing.assert_allclose(found, expected, atol=0.04)
    scale = group["ink"].attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0][
        "scale"
    ]
    assert scale == list(spacing)


def test_the_network_sees_voxels_of_the_training(tmp_path):
    image = ramp((16, 32, 32))
    path = save_zarr(tmp_path / "a.zarr", image, (2.0, 1.0, 1.0))
    predictor = known_predictor((1.0, 1.0, 1.0))
    run(predictor, path, tmp_path / "out.zarr")
    record = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["volumen"]["recipe"]
    assert record["resampling"]["shape"] == [32, 32, 32]


def test_the_same_voxel_size_gives_the_same_bytes(tmp_path):
    path = save_zarr(tmp_path / "a.zarr", ramp((20, 20, 20)), (1.0, 1.0, 1.0))
    predictor = known_predictor((1.0, 1.0, 1.0))
    here = run(predictor, path, tmp_path / "one.zarr")["ink/0"][:]
    plain = run(replace(predictor, resamples=False), path, tmp_path / "two.zarr")["ink/0"][:]
    np.testing.assert_array_equal(here, plain)


def test_units_are_converted(tmp_path):
    image = ramp((16, 16, 16))
    path = save_zarr(tmp_path / "a.zarr", image, (1000.0, 1000.0, 1000.0), "nanometer")
    same = run(known_predictor((1.0, 1.0, 1.0)), path, tmp_path / "one.zarr")["ink/0"][:]
    plain = 1 / (1 + np.exp(-4.0 * (image / 255 - 0.5)))
    np.testing.assert_allclose(same, plain, atol=1e-5)


def test_a_region_is_the_crop_of_the_whole_prediction(tmp_path):
    path = save_zarr(tmp_path / "a.zarr", ramp((24, 30, 28)), (1.7, 0.9, 1.2))
    predictor = known_predictor((1.0, 1.0, 1.0))
    everything = run(predictor, path, tmp_path / "one.zarr")["ink/0"][:]
    region = ((3, 19), (5, 30), (0, 9))
    part = run(predictor, path, tmp_path / "two.zarr", region=region)["ink/0"][:]
    np.testing.assert_allclose(part, everything[tuple(slice(*span) for span in region)], atol=1e-5)


def test_every_kind_of_head_comes_back_as_itself(tmp_path):
    heads = {
        "ink": (1, "sigmoid", "binary"),
        "tissue": (3, "softmax", "multiclass"),
        "normals": (3, "none", "vector"),
        "direction": (3, "none", "axis"),
        "distance": (1, "none", "distance"),
    }
    image = ramp((12, 24, 24))
    path = save_zarr(tmp_path / "a.zarr", image, (2.0, 1.0, 1.0))
    group = run(known_predictor((0.5, 0.5, 0.5), heads), path, tmp_path / "out.zarr")
    value = image / 255 - 0.5
    np.testing.assert_allclose(group["tissue/0"][:].sum(axis=0), 1, atol=1e-5)
    clear = np.abs(value) > 0.1
    for name in ("normals", "direction"):
        lengths = np.sqrt((group[f"{name}/0"][:] ** 2).sum(axis=0))
        np.testing.assert_allclose(lengths[clear], 1, atol=1e-4)
    # The smallest voxel is 0.5 in training and 1 here: a distance counts half as many of them.
    np.testing.assert_allclose(group["distance/0"][:], 4.0 * value * 0.5, atol=0.05)


def test_masks_and_empty_windows_stay_empty(tmp_path):
    from volumen.data.formats.opening import open_volume

    image = ramp((24, 24, 24))
    image[12:] = 0
    mask = np.zeros((24, 24, 24), np.uint8)
    mask[:, 4:, :] = 1
    path = save_zarr(tmp_path / "a.zarr", image, (1.5, 1.0, 1.0))
    masked = open_volume(save_zarr(tmp_path / "m.zarr", mask, (1.5, 1.0, 1.0)))
    predictor = known_predictor((1.0, 1.0, 1.0))
    job = make_job(open_volume(path), masked, str(tmp_path / "out.zarr"), ("ink",), None)
    predict_volume(predictor, job, PredictRequest(str(path), "", str(tmp_path / "out.zarr"), dtype="float32"))
    found = zarr.open_group(tmp_path / "out.zarr", mode="r")["ink/0"][:]
    assert not found[:, :4].any()
    assert not found[20:].any()
    assert (found[:10, 6:] > 0).all()


def test_labels_are_cleaned_on_the_voxels_of_the_image(tmp_path):
    image = np.zeros((24, 24, 24), np.uint8)
    image[4:20, 4:20, 4:20] = 255
    image[22, 22, 22] = 255
    path = save_zarr(tmp_path / "a.zarr", image, (1.3, 1.0, 0.7))
    predictor = known_predictor((1.0, 1.0, 1.0))
    group = run(predictor, path, tmp_path / "out.zarr", dtype="labels", min_size=20, skip_empty=False)
    found = group["labels/ink/0"][:]
    assert not found[21:].any()
    truth = image > 0
    truth[21:] = False
    assert 2 * (found.astype(bool) & truth).sum() / (found.sum() + truth.sum()) > 0.93


def test_channels_that_count_voxels_are_refused(tmp_path):
    path = save_zarr(tmp_path / "a.zarr", ramp((16, 16, 16)), (2.0, 1.0, 1.0))
    predictor = known_predictor((1.0, 1.0, 1.0), {"shape": (2, "none", "field")})
    with pytest.raises(VolumenError, match="count voxels"):
        run(predictor, path, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_a_wrong_unit_is_refused_and_a_missing_size_is_said(tmp_path, caplog):
    path = save_zarr(tmp_path / "a.zarr", ramp((16, 16, 16)), (1.0, 1.0, 1.0), "millimeter")
    with pytest.raises(VolumenError, match="near that of the training"):
        run(known_predictor((1.0, 1.0, 1.0)), path, tmp_path / "out.zarr")
    tifffile.imwrite(tmp_path / "b.tif", ramp((16, 16, 16)))
    run(known_predictor((1.0, 1.0, 1.0)), tmp_path / "b.tif", tmp_path / "b_out.zarr")
    assert "states no voxel size" in caplog.text


def test_two_dimensions(tmp_path):
    image = ramp((40, 50))
    path = save_zarr(tmp_path / "a.zarr", image, (0.5, 0.8))
    found = run(known_predictor((1.0, 1.0), patch=(16, 16)), path, tmp_path / "out.zarr")["ink/0"][:]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-4.0 * (image / 255 - 0.5))), atol=0.02)


def test_an_array_of_another_voxel_size_is_predicted_as_its_file_is(tmp_path):
    from volumen.inference.predictor import predict_array

    image = ramp((16, 24, 24))
    path = save_zarr(tmp_path / "a.zarr", image, (2.0, 1.0, 1.3))
    heads = {"ink": (1, "sigmoid", "binary"), "distance": (1, "none", "distance")}
    predictor = known_predictor((1.0, 1.0, 1.0), heads)
    group = run(predictor, path, tmp_path / "out.zarr")
    found = predict_array(predictor, image[None], spacing=(2.0, 1.0, 1.3))
    for name in heads:
        np.testing.assert_allclose(found[name][0], group[f"{name}/0"][:], atol=1e-4)


def test_an_array_without_a_voxel_size_is_predicted_as_it_is_and_says_so(caplog):
    from volumen.inference.predictor import predict_array

    image = ramp((16, 16, 16))
    found = predict_array(known_predictor((1.0, 1.0, 1.0)), image[None])["ink"][0]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-4.0 * (image / 255 - 0.5))), atol=1e-5)
    assert "states no voxel size" in caplog.text


def test_the_parts_of_the_bundle_resample_in_memory_as_a_streamed_prediction_does(tmp_path):
    import nibabel
    from monai.transforms import Compose

    from volumen.inference.bundle.in_memory import ReadVolumed, ResampleToTrainingd
    from volumen.inference.bundle.objects import NormalizeVolumed, StoreTargets
    from volumen.inference.windows.sliding import SlidingWindow

    image = ramp((16, 24, 20))
    affine = np.diag([1.3, 1.0, 2.0, 1.0]) @ _translation(3, 4, 5)
    stored = nibabel.Nifti1Image(image.T, affine)
    stored.header.set_xyzt_units("mm")
    nibabel.save(stored, tmp_path / "a.nii.gz")
    heads = {"ink": (1, "sigmoid", "binary"), "distance": (1, "none", "distance")}
    predictor = replace(known_predictor((1.0, 1.0, 1.0), heads), unit="millimeter")
    group = run(predictor, tmp_path / "a.nii.gz", tmp_path / "out.zarr")
    preprocessing = Compose(
        [ReadVolumed(), NormalizeVolumed(predictor.normalizer), ResampleToTrainingd(predictor)]
    )
    sample = preprocessing({"image": str(tmp_path / "a.nii.gz")})
    assert sample["image"].shape == (1, 32, 24, 26)
    outputs = SlidingWindow((8, 8, 8), divisor=(1, 1, 1))(sample["image"][None], predictor.network)
    sample["pred"] = {name: values[0] for name, values in outputs.items()}
    finished = StoreTargets(predictor, dtype="float32")(sample)
    for name in heads:
        there = finished[name][0].numpy().transpose(2, 1, 0)
        np.testing.assert_allclose(there, group[f"{name}/0"][:], atol=1e-4)
    np.testing.assert_allclose(finished["ink"].affine, affine)


@pytest.mark.parametrize("where", ["network", "pass"])
def test_a_stopped_prediction_goes_on_to_the_same_bytes(tmp_path, monkeypatch, where):
    from volumen.inference.postprocess.stored_grid import StoredGridPass

    path = save_zarr(tmp_path / "a.zarr", ramp((24, 40, 40)), (2.0, 1.0, 1.0))
    predictor = known_predictor((1.0, 1.0, 1.0))
    expected = run(predictor, path, tmp_path / "whole.zarr")["ink/0"][:]
    calls = []

    def stopping(function, most):
        def call(*args, **settings):
            calls.append(1)
            if len(calls) == most:
                raise KeyboardInterrupt
            return function(*args, **settings)

        return call

    with monkeypatch.context() as patch:
        if where == "network":
            patch.setattr(Intensity, "forward", stopping(Intensity.forward, 150))
        else:
            patch.setattr(StoredGridPass, "make", stopping(StoredGridPass.make, 7))
        with pytest.raises(KeyboardInterrupt):
            run(predictor, path, tmp_path / "out.zarr")
    found = run(predictor, path, tmp_path / "out.zarr")["ink/0"][:]
    np.testing.assert_array_equal(found, expected)
    assert not list((tmp_path / "out.zarr").rglob("grid"))


@pytest.mark.parametrize("spacing", [(0.4, 0.5, 0.5), (2.0, 1.5, 1.0), (1.7, 0.6, 1.0)])
def test_in_a_thin_mask_the_prediction_is_that_without_a_mask(tmp_path, spacing):
    from volumen.data.formats.opening import open_volume

    image = np.random.default_rng(5).integers(0, 255, (40, 44, 48), dtype=np.uint8)
    mask = np.zeros_like(image)
    mask[7] = mask[:, 30, 20:] = mask[33, 40, 44] = 1
    path = save_zarr(tmp_path / "a.zarr", image, spacing)
    masked = open_volume(save_zarr(tmp_path / "m.zarr", mask, spacing))
    predictor = known_predictor((1.0, 1.0, 1.0))
    everywhere = run(predictor, path, tmp_path / "whole.zarr")["ink/0"][:]
    job = make_job(open_volume(path), masked, str(tmp_path / "out.zarr"), ("ink",), None)
    predict_volume(predictor, job, PredictRequest(str(path), "", str(tmp_path / "out.zarr"), dtype="float32"))
    found = zarr.open_group(tmp_path / "out.zarr", mode="r")["ink/0"][:]
    # Beside what no window covers, a value is the mean of fewer neighbours: exact but at a few voxels.
    assert (found[mask > 0] > 0).all()
    assert np.isclose(found[mask > 0], everywhere[mask > 0], atol=1e-5).mean() > 0.95
    assert not found[mask == 0].any()


def test_skipped_windows_do_not_spread_into_predicted_voxels(tmp_path):
    image = np.zeros((40, 40, 40), np.uint8)
    image[:, :, 24:] = np.random.default_rng(6).integers(1, 255, (40, 40, 16))
    path = save_zarr(tmp_path / "a.zarr", image, (0.5, 0.5, 0.5))
    found = run(known_predictor((1.0, 1.0, 1.0)), path, tmp_path / "out.zarr")["ink/0"][:]
    assert (found[:, :, 24:] > 0).all()


def test_a_box_of_a_view_holds_what_it_holds_in_the_stored_volume():
    from volumen.data.space.geometry import AxisTurn
    from volumen.data.turned import TurnedVolume
    from volumen.data.views import stored_box

    image = np.arange(12 * 14 * 16, dtype=np.int32).reshape(12, 14, 16)
    turned = TurnedVolume(ArrayVolume(image), AxisTurn((2, 0, 1), (True, False, True)))
    view = ResampledVolume(turned, Resampling(turned.shape, (0.5, 1.0, 2.0)), is_label=True)
    box = ((6, 20), (3, 9), (2, 5))
    inside = np.unique(view.read(tuple(slice(*span) for span in box)))
    there = image[tuple(slice(*span) for span in stored_box(view, box))]
    assert np.isin(inside, there).all()
    # Of two stored voxels along the last axis one is taken; along the others, all.
    assert 2 * len(inside) == there.size
    assert stored_box(ArrayVolume(image), box) == box


def turned_and_stored(tmp_path, spacing):
    """Write a volume as NIfTI with reversed axes; return its path, the one read in training, and its grid."""
    import nibabel

    from volumen.data.formats.opening import open_volume
    from volumen.data.layout import oriented

    image = ramp((16, 20, 24))
    sizes = [float(size) for size in spacing[::-1]]
    for name, signs in (("first", (1, 1, 1)), ("second", (-1, 1, -1))):
        affine = np.diag([*(s * size for s, size in zip(signs, sizes)), 1.0])
        stored = nibabel.Nifti1Image(image.T, affine)
        stored.header.set_xyzt_units("mm")
        nibabel.save(stored, tmp_path / f"{name}.nii")
    volumes = [open_volume(tmp_path / f"{name}.nii") for name in ("first", "second")]
    cases = [OpenCase(str(n), volume, {}, {}, spacing, "millimeter") for n, volume in enumerate(volumes)]
    return volumes[1], resample_case(oriented(cases)[1], (1.0, 1.0, 1.0))


def test_regions_of_a_split_are_found_in_turned_and_resampled_files(tmp_path):
    from volumen.data.views import stored_box
    from volumen.tuning.held_out import _stored_box
    from volumen.tuning.validation_part import _box_in_image

    stored, case = turned_and_stored(tmp_path, (2.0, 1.0, 0.5))
    predictor = replace(known_predictor((1.0, 1.0, 1.0)), unit="millimeter", orientation="SAR")
    box = ((4, 20), (5, 15), (2, 9))
    found = _box_in_image(predictor, stored, box)
    assert found == _stored_box(case, box) == stored_box(case.image, box)
    assert found != box
    with pytest.raises(VolumenError, match="as it was when the run began"):
        _box_in_image(predictor, stored, ((0, 99), (0, 5), (0, 5)))


def test_an_image_without_a_size_has_that_of_the_training_s_settings(tmp_path):
    image = ramp((16, 24, 24))
    tifffile.imwrite(tmp_path / "a.tif", image)
    heads = {"ink": (1, "sigmoid", "binary"), "distance": (1, "none", "distance")}
    plain = known_predictor((1.0, 1.0, 1.0), heads)
    group = run(replace(plain, assumed_spacing=(2.0, 1.0, 0.5)), tmp_path / "a.tif", tmp_path / "one.zarr")
    path = save_zarr(tmp_path / "a.zarr", image, (2.0, 1.0, 0.5))
    expected = run(plain, path, tmp_path / "two.zarr")
    for name in heads:
        np.testing.assert_array_equal(group[f"{name}/0"][:], expected[f"{name}/0"][:])


def test_a_file_without_a_size_is_not_taken_for_one_of_size_1_in_memory(tmp_path, caplog):
    from volumen.inference.bundle.in_memory import ReadVolumed, ResampleToTrainingd

    tifffile.imwrite(tmp_path / "a.tif", ramp((16, 16, 16)))
    sample = ReadVolumed()({"image": str(tmp_path / "a.tif")})
    after = ResampleToTrainingd(known_predictor((0.5, 0.5, 0.5)))(sample)
    assert after["image"].shape == (1, 16, 16, 16)
    assert "states no voxel size" in caplog.text


def ensemble_of(*scales, spacings=((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))):
    from volumen.inference.ensemble import join

    found = []
    for number, (scale, spacing) in enumerate(zip(scales, spacings, strict=True)):
        member = known_predictor(spacing, patch=((8, 8, 8), (16, 8, 8))[number])
        network = Intensity({"ink": [scale]})
        found.append(replace(member, network=network, checksum=str(number), path=f"member_{number}.pth"))
    return found, join(found)


def test_an_ensemble_averages_logits_on_the_common_grid(tmp_path):
    image = np.random.default_rng(8).integers(0, 255, (20, 26, 24), dtype=np.uint8)
    path = save_zarr(tmp_path / "a.zarr", image, (1.6, 0.7, 1.0))
    members, both = ensemble_of(4.0, -1.0)
    logits = []
    for number, member in enumerate(members):
        alone = run(member, path, tmp_path / f"{number}.zarr")["ink/0"][:].astype(float)
        logits.append(np.log(alone / (1 - alone)))
    found = run(both, path, tmp_path / "both.zarr")["ink/0"][:]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.mean(logits, axis=0))), atol=1e-5)


def test_members_of_other_voxel_sizes_are_refused(tmp_path):
    path = save_zarr(tmp_path / "a.zarr", ramp((16, 16, 16)), (2.0, 1.0, 1.0))
    _, both = ensemble_of(4.0, 2.0, spacings=((1.0, 1.0, 1.0), (0.5, 0.5, 0.5)))
    with pytest.raises(VolumenError, match="averaged on one grid"):
        run(both, path, tmp_path / "both.zarr")


def test_runs_whose_splits_count_other_voxels_are_not_compared():
    from volumen.tuning.candidates import check_one_grid

    first = known_predictor((1.0, 1.0, 1.0))
    check_one_grid(first, known_predictor((1.0, 1.0, 1.0)))
    coarser = {"dataset_config": {**first.config["dataset_config"], "ome_zarr_resolution": 1}}
    for other in (
        known_predictor((2.0, 1.0, 1.0)),
        replace(first, resamples=False),
        replace(first, config=coarser),
    ):
        with pytest.raises(VolumenError, match="regions are in voxels of the training"):
            check_one_grid(first, other)
