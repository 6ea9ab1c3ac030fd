"""One rule says where a label is valid, and every part that asks follows it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from volumen.cli.contact_sheet import View, draw_view
from volumen.config.targets import Target
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.label_counts import CountRequest, LabelCounter, LabelReader, count_case
from volumen.data.index.patch_index import PatchLocation
from volumen.data.layout import OpenCase
from volumen.data.sampling.validation_blocks import find_blocks
from volumen.data.validity import (
    binary_truth,
    class_truth,
    inside_mask,
    known_voxels,
    labelled_voxels,
    without_ignored,
)
from volumen.evaluation.cases import ScoredCase
from volumen.evaluation.derived_truth import _read_around
from volumen.inference.gain import GainMeter, Labels
from volumen.inference.output.stored import OutputSpec
from volumen.inference.windows.heads import Head
from volumen.inference.windows.reader import WindowReader
from volumen.inference.windows.window_rules import OURS
from volumen.transforms.intensity_properties import _read as read_for_statistics
from volumen.transforms.read import ReadPatchd
from volumen.utils.errors import VolumenError

SHAPE = (6, 9)


def voxel_by_voxel(label: np.ndarray, mask: np.ndarray | None, ignore: int | None) -> np.ndarray:
    """The rule as nested loops: above 0 in the mask, not the ignored value in the label."""
    known = np.zeros(label.shape[1:], bool)
    for place in np.ndindex(*label.shape[1:]):
        inside = mask is None or all(channel[place] > 0 for channel in mask)
        known[place] = inside and all(ignore is None or channel[place] != ignore for channel in label)
    return known


def arrays(kind: str, channels: int = 1):
    rng = np.random.default_rng(5)
    label = rng.integers(0, 3, (channels, *SHAPE)).astype(np.int16)
    masks = {
        "none": None,
        "signed": rng.integers(-2, 3, (1, *SHAPE)).astype(np.int16),
        "boolean": (rng.random((1, *SHAPE)) < 0.5).astype(np.uint8),
        "empty": np.full((1, *SHAPE), -1, np.int8),
    }
    return label, masks[kind]


@pytest.mark.parametrize("ignore", [None, 0, 2, -1])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["none", "signed", "boolean", "empty"])
def test_the_rule(kind, channels, ignore):
    label, mask = arrays(kind, channels)
    expected = voxel_by_voxel(label, mask, ignore)
    known = known_voxels(label, mask, ignore)
    assert np.array_equal(np.ones(SHAPE, bool) if known is None else known, expected)
    cleaned = without_ignored(label, ignore)
    assert ignore in (None, 0) or not (cleaned == ignore).any()
    assert np.array_equal(labelled_voxels(cleaned, known), expected & (cleaned > 0).any(axis=0))


def test_nan_in_a_mask_is_outside():
    assert inside_mask(np.array([[1.0, np.nan, -np.inf, np.inf, 0.0]])).tolist() == [
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("ignore", [None, 2])
@pytest.mark.parametrize("kind", ["none", "signed", "boolean", "empty"])
def test_every_part_follows_the_rule(kind, ignore):
    label, mask = arrays(kind)
    expected = voxel_by_voxel(label, mask, ignore)
    volume, limit = ArrayVolume(label[0]), None if mask is None else ArrayVolume(mask[0])
    image = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    case = OpenCase(
        "a", ArrayVolume(image), {"ink": volume}, {} if limit is None else {"ink": limit}, (1.0, 1.0)
    )
    box = tuple((0, n) for n in SHAPE)
    region = tuple(slice(0, n) for n in SHAPE)
    ignored = {} if ignore is None else {"ink": ignore}
    found = {}

    read = ReadPatchd(["ink"], ignore_labels=ignored, normalization_scheme="none")
    found["read"] = read({"case": case, "location": PatchLocation(0, (0, 0), SHAPE, box)})["ink_mask"][0]

    reader = LabelReader(volume, limit, CountRequest(ignore=ignore, known=True, foreground=True))
    counter = LabelCounter(reader, [[np.arange(n + 1) for n in SHAPE]])
    count_case({"ink": counter}, 1, lambda _: None, lambda: None)
    found["label_counts"] = counter.counts[0].known.astype(bool)
    assert np.array_equal(counter.counts[0].foreground.astype(bool), expected & (label[0] != 0))

    (blocks,) = find_blocks([case], {"a": [box]}, [(1, 1)], ["ink"], ignore_labels=ignored)
    found["regions"] = blocks.known.reshape(SHAPE).astype(bool)

    scored = ScoredCase("a", "ink", "multiclass", volume, volume, limit, region, 3, 0.0, ignore=ignore)
    found["evaluation"] = scored.read(region)[2]

    found["derived_truth"] = _read_around(region, (0, 0), volume, limit, ignore)[1][0]

    foreground = read_for_statistics(case, region, ignored, True)[1]
    assert np.array_equal(foreground, expected & (label[0] > 0))

    # Where it is known, a prediction of foreground meets a truth of foreground or not.
    meter = GainMeter({"ink": Labels(volume, limit, ignore)}, [OutputSpec(Head("ink", 1))], (0, 0))
    ones = np.ones((1, *SHAPE), np.float32)
    meter.add("ink", region, ones, ones)
    both, sizes = meter.overlaps["ink"][0, 0]
    assert both == (expected & (label[0] > 0)).sum()
    assert sizes == both + expected.sum()

    target = Target("ink", "multiclass", 3, "softmax", losses=(), ignore_label=ignore)
    picture = draw_view(case, View(region, "", (1.0, 1.0)), {"ink": target}, {"ink": np.zeros((2, 3))}, 9)
    bright = draw_view(case, View(region, "", (1.0, 1.0)), {}, {}, 9)
    plain = (label[0] == 0) & (bright.sum(axis=-1) > 30)
    assert np.array_equal((picture.sum(axis=-1) < 0.9 * bright.sum(axis=-1))[plain], ~expected[plain])

    for part, known in found.items():
        assert np.array_equal(known, expected), part


def test_a_prediction_s_mask_follows_the_rule():
    mask = np.array([[-1, 0, 1], [2, -3, 0]], np.int16)
    plan = SimpleNamespace(
        box=((0, 2), (0, 3)),
        shape=(2, 3),
        patch_size=(1, 1),
        start=lambda place: divmod(place, 3),
        rules=OURS,
    )
    image = ArrayVolume(np.arange(6, dtype=np.uint8).reshape(2, 3))
    reader = WindowReader(
        image, plan, lambda raw: raw.astype(np.float32), mask=ArrayVolume(mask), skip_empty=False
    )
    assert np.array_equal(reader.masked_out((slice(0, 2), slice(0, 3))), ~(mask > 0))
    assert [reader.window(place) is not None for place in range(6)] == (mask > 0).ravel().tolist()


def test_negative_labels_and_foreign_classes_are_refused_at_known_voxels_alone():
    label = np.array([[0, 1, -4, 7]])
    known = np.array([True, True, False, False])
    assert binary_truth(label, known, "ink", "a").tolist() == [[0, 1, 1, 1]]
    assert class_truth(label, known, "ink", 3, "a").tolist() == [[0, 1, 0, 0]]
    with pytest.raises(VolumenError, match="found -4"):
        binary_truth(label, None, "ink", "a")
    with pytest.raises(VolumenError, match="expected classes 0 to 2, found 7"):
        class_truth(label, None, "ink", 3, "a")
