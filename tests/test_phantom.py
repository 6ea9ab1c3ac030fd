"""The phantom: its exact geometry, its files."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.spatial import cKDTree

from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.phantom.command import main
from volumen.phantom.geometry import Roll, sheet_geometry
from volumen.phantom.volume import labelled_slabs, labelled_slices, scan, write_phantom
from volumen.utils.errors import VolumenError

SHAPE = (48, 64, 72)
EVERYWHERE = (slice(None),) * 3


@pytest.fixture(scope="module")
def roll():
    return Roll.draw(SHAPE, seed=3)


@pytest.fixture(scope="module")
def geometry(roll):
    return sheet_geometry(roll, SHAPE, reach=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "data", SHAPE, seed=3)


def read(path):
    return open_volume(path).read(EVERYWHERE)


def middle_surface(roll, heights, angles):
    """Return points of the sheet's middle surface by root finding along rays, with a second implementation of F."""
    b = roll.pitch / (2 * math.pi)
    points = []

    def field(r, theta, z):
        phase = 2 * math.pi * r / roll.squeeze_length + 2 * theta + roll.phases[1]
        phase += math.sin(2 * math.pi * z / 150 + roll.phases[2])
        involute = math.sqrt(r * r - b * b) - b * math.acos(b / r) - b * theta
        squeeze = roll.squeeze * (math.sin(phase) + 0.35 * math.sin(2 * phase))
        return involute + (1 - math.exp(-((r / 30) ** 2))) * squeeze

    for z in heights:
        angle = 2 * math.pi * z / roll.wobble_length + roll.phases[0]
        x0 = roll.centre[0] + roll.wobble * math.sin(angle)
        y0 = roll.centre[1] + roll.wobble * math.cos(angle)
        for theta in angles:
            for turn in range(roll.first_turn, roll.last_turn + 1):
                r = brentq(lambda r: field(r, theta, z) - turn * roll.pitch, 1.02 * b, 200)  # noqa: B023
                points.append((z, y0 + r * math.sin(theta), x0 + r * math.cos(theta)))
    return np.array(points)


def test_distances_are_those_to_the_nearest_point_of_the_sheet(roll, geometry):
    heights = np.arange(14, 34, 0.4)
    angles = np.linspace(-math.pi, math.pi, 500)
    points = middle_surface(roll, heights, angles)
    z, y, x = np.nonzero(geometry.valid)
    near = (np.abs(z - 24) < 2) & (np.arange(z.size) % 7 == 0)
    voxels = np.stack([z[near], y[near], x[near]], axis=1)
    expected, _ = cKDTree(points).query(voxels)
    found = geometry.distance[tuple(voxels.T)] + roll.thickness / 2
    # points about 0.4 apart may lie 0.3 from the foot point, which matters most close to the sheet
    far = expected > 1
    assert np.abs(found - expected)[far].max() < 0.08
    assert np.abs(found - expected).max() < 0.35


def test_normals_are_the_gradient_of_the_distance(roll, geometry):
    gradient = np.stack(np.gradient(geometry.distance.astype(float))[::-1])
    # away from the sheet's middle, from halfway to the next turn, and from the cut
    steep = np.abs(np.linalg.norm(gradient, axis=0) - 1) < 0.01
    inner = geometry.valid & steep & (geometry.distance < 6)
    assert inner.mean() > 0.2
    cosine = (gradient * geometry.normals).sum(axis=0)[inner]
    angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    # central differences are inexact at the volume's border and at ridges between two turns
    assert np.median(angles) < 2
    assert np.percentile(angles, 99.9) < 10
    norms = np.linalg.norm(geometry.normals, axis=0)
    assert np.allclose(norms[geometry.valid], 1, atol=1e-5)


def test_the_sheet_has_its_thickness(roll, geometry):
    # volume between the borders, divided by the area of the middle surface, from the voxels within half a voxel of it
    inside = (geometry.distance <= 0) & geometry.valid
    middle = (np.abs(geometry.distance + roll.thickness / 2) < 0.5) & geometry.valid
    assert inside.sum() / middle.sum() == pytest.approx(roll.thickness, rel=0.05)


def test_the_spacing_varies_and_turns_come_close():
    roll = Roll.draw((48, 192, 192), seed=0)
    line = sheet_geometry(roll, (1, 192, 192)).distance[0]
    gaps = []
    for row in (*line[92:101], *line.T[92:101]):
        starts = np.flatnonzero(np.diff((row <= 0).astype(int)) == 1)
        gaps.extend(np.diff(starts))
    assert min(gaps) < 0.55 * roll.pitch
    assert np.percentile(gaps, 80) > 1.2 * roll.pitch


def test_the_files_are_read_as_training_data(folder):
    for root in (folder, folder / "heldout"):
        layout = discover(root)
        assert layout.targets == ("surface",)
        (case,) = open_cases(layout)
        assert case.spacing == (1, 1, 1)
        assert case.image.dtype == np.uint8
        assert case.labels["surface"].shape == case.masks["surface"].shape == case.image.shape
    assert open_cases(discover(folder))[0].image.shape == SHAPE


def test_labels_are_the_truth_where_labelled_and_the_held_out_roll_is_labelled_everywhere(folder):
    truth = read(folder / "truth/scroll_surface.zarr")
    mask = read(folder / "masks/scroll_surface.zarr")
    assert np.array_equal(read(folder / "labels/scroll_surface.zarr"), truth * mask)
    assert np.array_equal(mask[0], labelled_slabs(SHAPE))
    assert mask.mean() == pytest.approx(0.7, abs=0.05)
    assert np.array_equal(truth, read(folder / "truth/scroll_distance.zarr") <= 0)
    held = folder / "heldout"
    assert read(held / "masks/scroll_surface.zarr").all()
    assert np.array_equal(read(held / "labels/scroll_surface.zarr"), read(held / "truth/scroll_surface.zarr"))
    assert read(folder / "truth/scroll_normals.zarr").shape == (3, *SHAPE)
    shared = tuple(min(a, b) for a, b in zip(SHAPE, read(held / "images/scroll.zarr").shape[1:]))
    part = (0, *(slice(n) for n in shared))
    assert not np.array_equal(
        read(folder / "images/scroll.zarr")[part], read(held / "images/scroll.zarr")[part]
    )


def test_the_scan_is_hard_for_a_threshold_and_not_hopeless(folder):
    image, truth = read(folder / "images/scroll.zarr")[0], read(folder / "truth/scroll_surface.zarr")[0] > 0
    dice = max(
        2 * np.sum((image > cut) & truth) / (np.sum(image > cut) + truth.sum()) for cut in range(40, 220, 5)
    )
    assert 0.4 < dice < 0.8
    assert image[truth].mean() > image[~truth].mean() + 15


def test_slices_are_labelled_in_turn(tmp_path):
    assert main(["-o", str(tmp_path / "x"), "--size", "64,48,48", "--labelled", "slices"]) == 0
    mask = read(tmp_path / "x/masks/scroll_surface.zarr")[0]
    assert np.array_equal(mask, labelled_slices((64, 48, 48)))
    assert (mask.min(axis=(1, 2)) == mask.max(axis=(1, 2))).all()
    assert mask[:, 0, 0].reshape(4, 16).sum(axis=1).tolist() == [5] * 4


def test_noise_can_be_left_out(geometry):
    clean, noisy = (scan(geometry.distance, geometry.along, 0, noise) for noise in (0.0, 0.2))
    assert (
        np.abs(np.diff(clean.astype(int), axis=0)).mean()
        < np.abs(np.diff(noisy.astype(int), axis=0)).mean() / 3
    )


def test_a_seed_is_a_phantom(folder, tmp_path):
    again = write_phantom(tmp_path / "again", SHAPE, seed=3)
    other = write_phantom(tmp_path / "other", SHAPE, seed=4)
    image = read(folder / "images/scroll.zarr")
    assert np.array_equal(image, read(again / "images/scroll.zarr"))
    assert not np.array_equal(image, read(other / "images/scroll.zarr"))


def test_distances_are_in_physical_units(tmp_path, folder):
    fine = write_phantom(tmp_path / "fine", SHAPE, seed=3, spacing=0.5, unit="micrometer")
    volume = open_volume(fine / "truth/scroll_distance.zarr")
    assert volume.spacing == (0.5, 0.5, 0.5)
    assert np.allclose(volume.read(EVERYWHERE), 0.5 * read(folder / "truth/scroll_distance.zarr"))


def test_nothing_is_overwritten_and_bad_shapes_are_refused(folder, tmp_path):
    with pytest.raises(VolumenError, match="already holds a data set"):
        write_phantom(folder, SHAPE)
    with pytest.raises(VolumenError, match="at least 48 voxels, found \\(32, 64, 64\\)"):
        write_phantom(tmp_path, (32, 64, 64))
    assert main(["-o", str(tmp_path / "x"), "--size", "ten"]) == 2
    assert main(["-o", str(tmp_path / "x"), "--size", "10"]) == 2
    assert not (tmp_path / "x").exists()
