"""Intensity augmentations: reproducible, bounded, equal to independent references."""

from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import Compose
from patch_cases import smooth
from scipy.ndimage import gaussian_filter

from volumen.transforms.intensity import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
)
from volumen.transforms.kernels import filters
from volumen.utils.errors import VolumenError

ALL = [RandNoised, RandBlurd, RandBrightnessd, RandContrastd, RandLowResolutiond, RandGammad]
IMAGE = smooth((24, 26, 28))


def _always(transform, **options):
    if transform in (RandBlurd, RandLowResolutiond):
        options.setdefault("prob_per_channel", 1.0)
    return transform(prob=1.0, **options)


def _apply(transform, image, seed=0, **extra):
    transform.set_random_state(seed=seed)
    return transform({"image": image, **extra})["image"]


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize("shape", [(1, 20, 22, 24), (3, 32, 30), (2, 1, 16, 16)])
def test_a_seed_decides_the_result_and_the_input_is_left_alone(transform, shape):
    image = np.stack([smooth(shape[1:], seed) for seed in range(shape[0])])
    kept = image.copy()
    augment = _always(transform)
    first, second, other = (_apply(augment, image, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(first, second)
    assert first.shape == image.shape
    assert first.dtype == np.float32
    assert not np.array_equal(first, other)
    assert np.isfinite(first).all()


@pytest.mark.parametrize("transform", ALL)
def test_values_of_a_unit_image_stay_sensible(transform):
    for seed in range(20):
        out = _apply(_always(transform), IMAGE[None], seed)
        assert out.min() > -0.75
        assert out.max() < 1.75


@pytest.mark.parametrize("transform", [RandBlurd, RandContrastd, RandLowResolutiond, RandNoised, RandGammad])
def test_a_constant_image_is_not_changed(transform):
    image = np.full((1, 12, 12, 12), 0.3, np.float32)
    np.testing.assert_allclose(_apply(_always(transform), image), image, rtol=1e-6)


@pytest.mark.parametrize("transform", ALL)
def test_views_give_the_same_as_contiguous_images(transform):
    view = IMAGE[None, ::-1].transpose(0, 3, 2, 1)
    augment = _always(transform)
    np.testing.assert_array_equal(_apply(augment, view), _apply(augment, np.ascontiguousarray(view)))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_channel_is_changed_with_its_own_probability(probability):
    image = np.random.default_rng(0).random((400, 8, 8), dtype=np.float32)
    out = _apply(RandBlurd(prob=1.0, prob_per_channel=probability), image)
    changed = (out != image).any(axis=(1, 2)).mean()
    # The tolerance is four standard errors, and 0 for the probabilities 0 and 1.
    assert changed == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 400) ** 0.5)


def test_default_probabilities_are_those_of_nnunet():
    expected = {RandNoised: 0.1, RandBlurd: 0.2, RandBrightnessd: 0.15, RandContrastd: 0.15}
    expected |= {RandLowResolutiond: 0.25, RandGammad: 0.3}
    assert {transform: transform().prob for transform in ALL} == expected
    small = np.random.default_rng(0).random((1, 4, 4), dtype=np.float32)
    augment = RandBrightnessd()
    augment.set_random_state(seed=0)
    changed = np.mean([augment({"image": small})["image"] is not small for _ in range(2000)])
    assert changed == pytest.approx(0.15, abs=0.032)


def test_compose_makes_a_sample_a_pure_function_of_the_seed():
    pipeline = Compose([_always(transform) for transform in ALL])
    results = []
    for seed in (1, 2, 1):
        pipeline.set_random_state(seed=seed)
        results.append(pipeline({"image": IMAGE[None]})["image"])
    np.testing.assert_array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


def test_noise_is_gaussian_and_relative_to_the_spread():
    image = smooth((48, 48, 48))[None]
    noise = _apply(RandNoised(prob=1, sigma_range=(0.1, 0.1)), image) - image
    assert noise.std() == pytest.approx(0.1 * image.std(), rel=0.02)
    assert abs(noise.mean()) < 0.01 * image.std()
    assert np.mean(np.abs(noise) < noise.std()) == pytest.approx(0.683, abs=0.01)


@pytest.mark.parametrize("sigmas", [(0.5, 0.7, 1.0), (0.0, 1.0, 0.6), (2.0, 0.0, 0.0)])
def test_blur_equals_scipy(sigmas):
    out = np.empty_like(IMAGE)
    filters.gaussian(IMAGE, sigmas, out)
    reference = IMAGE
    for axis, sigma in enumerate(sigmas):
        if sigma:
            widths = [0.0] * 3
            widths[axis] = sigma
            radius = max(1, int(np.ceil(3 * sigma - 0.5)))
            reference = gaussian_filter(reference, widths, mode="nearest", radius=radius)
    np.testing.assert_allclose(out, reference, atol=1e-6)


def test_blur_of_an_image_smaller_than_the_kernel():
    out = np.empty((2, 3), np.float32)
    filters.gaussian(np.arange(6, dtype=np.float32).reshape(2, 3), (2.0, 2.0), out)
    reference = gaussian_filter(np.arange(6, dtype=np.float32).reshape(2, 3), 2.0, mode="nearest", radius=6)
    np.testing.assert_allclose(out, reference, atol=1e-5)


def test_low_resolution_of_half_repeats_and_blends_every_second_voxel():
    line = np.arange(8, dtype=np.float32)[None]
    out = np.empty_like(line)
    filters.low_resolution(line, (1.0, 0.5), out)
    np.testing.assert_allclose(out[0], np.interp((np.arange(8) + 0.5) / 2 - 0.5, range(4), [1, 3, 5, 7]))


def test_low_resolution_of_one_changes_nothing():
    out = np.empty_like(IMAGE)
    filters.low_resolution(IMAGE, (1.0, 1.0, 1.0), out)
    np.testing.assert_array_equal(out, IMAGE)


@pytest.mark.parametrize("invert", [False, True])
def test_gamma_keeps_mean_and_deviation_or_the_range(invert):
    image = IMAGE * 4 - 1
    out = np.empty_like(image)
    filters.gamma(image, 1.4, invert, True, out)
    assert out.mean() == pytest.approx(image.mean(), abs=1e-4)
    assert out.std() == pytest.approx(image.std(), rel=1e-4)
    # The order is preserved: a brighter voxel remains brighter.
    order = np.argsort(image.reshape(-1))
    assert (np.diff(out.reshape(-1)[order]) >= -1e-5).all()
    filters.gamma(image, 1.4, invert, False, out)
    low, high = image.min(), image.max()
    unit = (image - low) / (high - low)
    expected = 1 - (1 - unit) ** 1.4 if invert else unit**1.4
    np.testing.assert_allclose(out, expected * (high - low) + low, atol=2e-5)


def test_contrast_keeps_the_range_and_stretches_about_the_mean():
    out = np.empty_like(IMAGE)
    filters.contrast(IMAGE, 1.25, out)
    expected = np.clip((IMAGE - IMAGE.mean()) * 1.25 + IMAGE.mean(), IMAGE.min(), IMAGE.max())
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("transform", [RandBlurd, RandLowResolutiond])
def test_a_thin_axis_is_not_filtered(transform):
    # Sections are independent noise: filtering across them would mix them.
    image = np.random.default_rng(0).random((1, 8, 32, 32), dtype=np.float32)
    image[0, 4:] = 0
    out = _apply(_always(transform), image, spacing=(45.0, 4.6, 4.6))
    assert (out[0, 4:] == 0).all()
    assert not np.array_equal(out[0, 3], image[0, 3])


def test_channels_are_changed_on_their_own():
    image = np.repeat(IMAGE[None], 8, axis=0)
    out = _apply(RandBlurd(prob=1.0), image, seed=1)
    changed = [not np.array_equal(out[channel], IMAGE) for channel in range(8)]
    assert 0 < sum(changed) < 8


@pytest.mark.parametrize("transform", ALL)
def test_bad_probabilities_are_refused(transform):
    with pytest.raises(VolumenError, match="probability"):
        transform(prob=1.2)


@pytest.mark.parametrize(
    ("transform", "option"),
    [(RandNoised, "sigma_range"), (RandGammad, "gamma_range"), (RandLowResolutiond, "zoom_range")],
)
def test_bad_ranges_are_refused(transform, option):
    with pytest.raises(VolumenError, match=option):
        transform(**{option: (1.0, 0.5)})
