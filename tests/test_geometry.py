"""Geometry: units, turns and places, against nibabel and matrices written out."""

from __future__ import annotations

import copy
import pickle
from itertools import permutations, product

import nibabel
import numpy as np
import pytest

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.space.geometry import (
    PATIENT,
    AxisTurn,
    Geometry,
    directions_of,
    nearest_turn,
    stated_geometry,
)
from volumen.data.space.units import common_unit, factor, unit_name
from volumen.data.turned import TurnedVolume

SHAPE = (5, 6, 7)
ALL_TURNS = [
    AxisTurn(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("µm", "micrometer"), ("μm", "micrometer"), ("\\u00B5m", "micrometer"), ("um", "micrometer"),
        ("micron", "micrometer"), ("Micrometre", "micrometer"), ("micrometers", "micrometer"), ("nm", "nanometer"),
        ("Å", "angstrom"), ("mm", "millimeter"), ("inch", "inch"), ("pixel", None), ("pixels", None), ("", None),
        (None, None), ("unknown", None), ("furlong", "furlong"),
    ],
)  # fmt: skip
def test_units_have_one_name(text, name):
    assert unit_name(text) == name


def test_units_convert_exactly_by_powers_of_ten():
    assert factor("micrometer", "nanometer") == 1000.0
    assert factor("nanometer", "micrometer") == 0.001
    assert factor("inch", "millimeter") == pytest.approx(25.4)
    assert factor("furlong", "meter") is None
    assert common_unit((0.04, 4.0, 4.0), ("micrometer", "nanometer", "nanometer")) == (
        pytest.approx((0.04, 0.004, 0.004)),
        "micrometer",
    )
    assert common_unit((1, 2), ("nanometer",) * 2) == ((1, 2), "nanometer")
    assert common_unit((1, 2), ("nanometer", None)) is None


@pytest.mark.parametrize("bad", [0.0, -2.0, float("nan"), float("inf")])
def test_sizes_that_cannot_be_count_as_unknown_and_are_named(bad):
    geometry = stated_geometry((bad, 0.5, 0.5), "micrometer")
    assert geometry.spacing is None
    assert geometry.problem == f"a voxel size of {bad:g} x 0.5 x 0.5"


def random_affine(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    order, signs = rng.permutation(3), rng.choice([-1.0, 1.0], 3)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[order] * signs * rng.uniform(0.5, 3, 3)
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    return affine


@pytest.mark.parametrize("seed", range(6))
def test_nifti_orientation_and_places_are_those_of_nibabel(tmp_path, seed):
    affine = random_affine(seed)
    values = np.random.default_rng(seed).integers(0, 255, SHAPE[::-1]).astype(np.uint8)
    nibabel.Nifti1Image(values, affine).to_filename(tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    stored = nibabel.load(tmp_path / "a.nii")
    assert volume.geometry.frame == PATIENT
    assert volume.geometry.orientation == "".join(nibabel.aff2axcodes(stored.affine))[::-1]
    for index in ((0, 0, 0), (4, 1, 6), (2, 5, 3)):
        place = stored.affine @ [*index[::-1], 1]
        np.testing.assert_allclose((volume.geometry.matrix() @ [*index, 1])[:3], place[:3][::-1], atol=1e-4)


@pytest.mark.parametrize("turn", ALL_TURNS, ids=str)
def test_a_turned_volume_is_the_turned_array_at_the_turned_places(turn):
    values = np.random.default_rng(0).integers(0, 255, (2, *SHAPE)).astype(np.uint8)
    geometry = stated_geometry((3.0, 2.0, 0.5), "millimeter", origin=(10.0, -4.0, 7.0), frame=PATIENT)
    plain = ArrayVolume(values, axes="czyx", geometry=geometry)
    turned = TurnedVolume(plain, turn)
    expected = np.flip(
        values.transpose(0, *(axis + 1 for axis in turn.order)),
        [axis + 1 for axis, flip in enumerate(turn.flips) if flip],
    )
    assert turned.shape == expected.shape[1:]
    np.testing.assert_array_equal(turned.read(tuple(slice(0, n) for n in turned.shape)), expected)
    region = tuple(slice(1, n - 1) for n in turned.shape)
    np.testing.assert_array_equal(turned.read(region), expected[(slice(None), *region)])
    # Every voxel keeps its place in space: of each turned index, the index in the plain array by hand.
    for index in product(*(range(0, n, 2) for n in turned.shape)):
        there = [0, 0, 0]
        for axis, (source, flip) in enumerate(zip(turn.order, turn.flips)):
            there[source] = SHAPE[source] - 1 - index[axis] if flip else index[axis]
        np.testing.assert_allclose(
            turned.geometry.matrix() @ [*index, 1], geometry.matrix() @ [*there, 1], atol=1e-9
        )
    back, angle = nearest_turn(plain.geometry, turned.geometry)
    assert angle == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(TurnedVolume(turned, back).read((slice(None),) * 3), values)
    assert (turned.fingerprint() == plain.fingerprint()) is False


@pytest.mark.parametrize("seed", range(4))
def test_turning_a_nifti_is_nibabels_reorienting(tmp_path, seed):
    image = nibabel.Nifti1Image(
        np.random.default_rng(seed).integers(0, 255, SHAPE[::-1]).astype(np.uint8), random_affine(seed)
    )
    image.to_filename(tmp_path / "a.nii")
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii"))
    volume = open_volume(tmp_path / "a.nii")
    turn, _ = nearest_turn(directions_of("SAR"), volume.geometry)
    turned = TurnedVolume(volume, turn)
    np.testing.assert_array_equal(turned.read((slice(None),) * 3)[0], np.asarray(canonical.dataobj).T)
    np.testing.assert_allclose(turned.affine, canonical.affine, atol=1e-4)
    assert turned.spacing == pytest.approx(canonical.header.get_zooms()[::-1], rel=1e-5)
    assert turned.geometry.orientation == "SAR"


def test_the_geometry_of_a_region_and_its_record():
    geometry = stated_geometry((4.0, 2.0, 2.0), "nanometer", origin=(40.0, 80.0, 80.0))
    assert geometry.moved((8, 4, 4)).origin == (72.0, 88.0, 88.0)
    assert geometry.shift(geometry.moved((8, -4, 4))) == pytest.approx((8, -4, 4))
    assert Geometry.from_plain(geometry.plain()) == geometry
    assert Geometry.from_plain(Geometry().plain()) == Geometry()
    micro = geometry.in_unit("micrometer")
    assert micro.spacing == pytest.approx((0.004, 0.002, 0.002))
    assert geometry.covers(micro)
    assert not geometry.covers(micro.moved((0, 1, 0)))
    assert stated_geometry((4.0, 2.0), "nanometer").moved((1, 1)).origin is None


def test_wrong_orientations_are_refused():
    with pytest.raises(ValueError, match="every axis once"):
        directions_of("SSA")


def test_a_turned_volume_can_be_sent_to_a_worker_and_moved(tmp_path):
    values = np.random.default_rng(1).integers(0, 255, SHAPE[::-1]).astype(np.uint8)
    nibabel.Nifti1Image(values, np.diag([2.0, 1.5, 3.0, 1.0])).to_filename(tmp_path / "a.nii")
    turned = TurnedVolume(open_volume(tmp_path / "a.nii"), AxisTurn((2, 0, 1), (True, False, True)))
    copied = pickle.loads(pickle.dumps(turned))
    region = (slice(1, 6), slice(0, 4), slice(2, 5))
    np.testing.assert_array_equal(copied.read(region), turned.read(region))
    moved = copy.copy(turned)
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii").read_bytes())
    moved.path = str(tmp_path / "b.nii")
    assert turned.path == str(tmp_path / "a.nii")
    np.testing.assert_array_equal(moved.read(region), turned.read(region))
