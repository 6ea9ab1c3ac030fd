"""The other phantoms: nerve tissue, nuclei, organs; what is labelled is what the image shows."""

from __future__ import annotations

import cc3d
import nibabel
import numpy as np
import pytest
from scipy.ndimage import find_objects

from volumen.data.layout import discover, open_cases
from volumen.phantom.command import main
from volumen.phantom.neurons import SMALLEST, micrograph, neurites
from volumen.phantom.nuclei import fluorescence, nuclei
from volumen.phantom.organ import EXTENT, KIDNEY, LIVER, SPACINGS, TUMOUR, scan

SHAPE = (32, 64, 64)


@pytest.fixture(scope="module")
def tissue():
    return neurites(SHAPE, 0)


def test_neurites_fill_space_and_are_one_component_each(tissue):
    assert tissue.min() == 1
    sizes = np.bincount(tissue.ravel())[1:]
    assert len(sizes) > 15
    assert sizes.min() > 0.5 * SMALLEST
    assert cc3d.connected_components(tissue, connectivity=6).max() == len(sizes)


def test_membranes_are_dark(tissue):
    image = micrograph(tissue, 0).astype(float)
    wall = np.zeros(SHAPE, bool)
    wall[:, :, 1:] = tissue[:, :, 1:] != tissue[:, :, :-1]
    assert image[wall].mean() < image[~wall].mean() - 20
    # Not by a threshold alone: some membranes are as bright as some cytoplasm.
    assert np.percentile(image[wall], 95) > np.percentile(image[~wall], 10)


@pytest.mark.parametrize("shape", [(96, 96), (20, 64, 64)])
def test_nuclei_are_whole_touch_and_are_brighter_than_what_is_between(shape):
    label = nuclei(shape, 1)
    count = int(label.max())
    assert len(np.unique(label)) == count + 1 > 5
    for number, box in enumerate(find_objects(label.astype(int)), 1):
        assert cc3d.connected_components((label[box] == number).astype(np.uint8)).max() == 1
    pairs = label[..., 1:], label[..., :-1]
    assert ((pairs[0] != pairs[1]) & (pairs[0] > 0) & (pairs[1] > 0)).any()
    image = fluorescence(label, 1)
    assert image.dtype == np.uint16
    assert image[label > 0].mean() > 2 * image[label == 0].mean()


def test_images_of_nuclei_have_different_numbers_of_them():
    """Equal numbers everywhere would look like classes."""
    assert len({int(nuclei((96, 96), seed).max()) for seed in range(5)}) > 2


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_patient_is_the_same_at_every_voxel_size(spacing):
    image, label = scan(spacing, 3)
    assert image.shape == tuple(round(e / s) for e, s in zip(EXTENT, spacing))
    _, reference = scan((2.5, 2.5, 2.5), 3)
    for value in (LIVER, KIDNEY):
        volume = (label == value).sum() * np.prod(spacing)
        assert volume == pytest.approx((reference == value).sum() * 2.5**3, rel=0.08)
    assert image[label == LIVER].mean() > image[label == TUMOUR].mean() + 20
    assert image[label == KIDNEY].mean() > image[label == LIVER].mean() + 20


def test_scans_lie_where_their_affines_say(tmp_path):
    """The liver is on the patient's right side, in the flipped scan, too."""
    assert main(["-o", str(tmp_path), "--kind", "organs", "--images", "2"]) == 0
    steps = []
    for name in ("patient1", "patient2"):
        file = nibabel.load(tmp_path / "labels" / f"{name}_organs.nii.gz")
        liver = np.argwhere(np.asarray(file.dataobj) == LIVER).mean(axis=0)
        assert nibabel.affines.apply_affine(file.affine, liver)[0] > 20
        assert nibabel.load(tmp_path / "images" / f"{name}.nii.gz").affine == pytest.approx(file.affine)
        steps.append(file.affine[0, 0])
    assert steps[0] < 0 < steps[1]


@pytest.mark.parametrize(
    ("words", "shape", "target", "images"),
    [
        ("--kind neurons --size 32,48,48", (32, 48, 48), "neurons", 1),
        ("--kind nuclei --size 64,48 --images 3", (64, 48), "cells", 3),
        ("--kind nuclei --size 16,48,48 --images 2", (16, 48, 48), "cells", 2),
    ],
)
def test_the_folders_are_data_sets(tmp_path, words, shape, target, images):
    assert main(["-o", str(tmp_path / "a"), *words.split()]) == 0
    assert main(["-o", str(tmp_path / "b"), *words.split()]) == 0
    cases = open_cases(discover(tmp_path / "a"))
    assert len(cases) == images
    assert [case.image.shape for case in cases] == [shape] * images
    assert all(case.unit in ("micrometer", "nanometer") for case in cases)
    whole = tuple(slice(0, n) for n in shape)
    for one, other in zip(cases, open_cases(discover(tmp_path / "b"))):
        assert np.array_equal(one.image.read(whole), other.image.read(whole))
        assert np.array_equal(one.labels[target].read(whole), other.labels[target].read(whole))
    (held, *_) = open_cases(discover(tmp_path / "a" / "heldout"))
    assert not np.array_equal(held.image.read(whole), cases[0].image.read(whole))


@pytest.mark.parametrize(
    "words",
    [
        "--kind organs --size 40",
        "--kind neurons --size 64,64",
        "--kind nuclei --size 8,8",
        "--kind nuclei --images 0",
    ],
)
def test_what_a_kind_does_not_have_is_refused(tmp_path, words, capsys):
    assert main(["-o", str(tmp_path / "x"), *words.split()]) == 2
    assert not (tmp_path / "x").exists()
