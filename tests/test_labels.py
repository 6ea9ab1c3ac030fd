"""The meaning of label values: detected from the volumes, and prepared in a patch."""

from __future__ import annotations

import numpy as np
import pytest
from data_folders import shells, write_tiff_folder

from volumen.config.manager import ConfigManager
from volumen.transforms.labels import PrepareLabelsd
from volumen.utils.errors import VolumenError

SHEETS = shells((16, 16, 16))


def config_of(tmp_path, label: np.ndarray, **target) -> ConfigManager:
    """Return the configuration of a single volume with one label."""
    data = write_tiff_folder(tmp_path / "data", {"a": {"ink": label}}, images={"a": SHEETS})
    return ConfigManager(dataset_config={"targets": {"ink": target}, "axes": "czyx"}, dataset_dir=str(data))


@pytest.mark.parametrize("value", [-1, -100])
def test_a_negative_label_is_refused_unless_it_is_the_ignore_label(tmp_path, value):
    label = SHEETS.astype(np.int16)
    label[:4] = value
    with pytest.raises(
        VolumenError, match=f"negative values, found {value} in .*; set ignore_label: {value} if"
    ):
        _ = config_of(tmp_path / "plain", label).primary_targets
    target = config_of(tmp_path / "ignored", label, ignore_label=value).primary_targets["ink"]
    assert (target.kind, target.out_channels) == ("binary", 1)


@pytest.mark.parametrize(("values", "kind", "channels"), [
    ([0, 255], "binary", 1),
    ([255], "binary", 1),
    ([0, 1, 2], "multiclass", 3),
])  # fmt: skip
def test_kind_and_channels_follow_the_values(tmp_path, caplog, values, kind, channels):
    label = np.resize(np.array(values, np.uint8), SHEETS.shape)
    target = config_of(tmp_path, label).primary_targets["ink"]
    assert (target.kind, target.out_channels) == (kind, channels)
    assert ("hold nothing but 255" in caplog.text) == (0 not in values)


@pytest.mark.parametrize(("target", "words"), [
    ({"kind": "binary", "out_channels": 3}, "out_channels: expected 1 for kind binary, found 3"),
    ({"kind": "multiclass", "out_channels": 1}, "out_channels: expected at least 2 for kind multiclass, found 1"),
    ({"out_channels": 1, "activation": "softmax"}, "activation: expected sigmoid or none .* found softmax"),
])  # fmt: skip
def test_an_entry_that_contradicts_itself_is_refused(tmp_path, target, words):
    with pytest.raises(VolumenError, match=words):
        _ = config_of(tmp_path, SHEETS, **target).primary_targets


def test_labels_of_several_channels_are_overlapping_masks(tmp_path):
    label = np.stack([SHEETS, 1 - SHEETS])
    assert config_of(tmp_path / "plain", label).primary_targets["ink"].kind == "multilabel"
    with pytest.raises(VolumenError, match="kind: expected multilabel, as its labels have several channels"):
        _ = config_of(tmp_path / "told", label, kind="binary").primary_targets


def prepared(label: list[int], known: list[bool], classes: int | None) -> np.ndarray:
    sample = {
        "ink": np.array([[label]], np.int16),
        "ink_mask": np.array([[known]]),
        "volume_name": "a",
    }
    return PrepareLabelsd({"ink": classes})(sample)["ink"]


def test_foreground_is_every_value_above_zero():
    assert prepared([0, 1, 255, 7], [True] * 4, None).ravel().tolist() == [0, 1, 1, 1]


def test_a_negative_value_is_no_foreground():
    with pytest.raises(VolumenError, match=r"label 'ink' of a: .*found -1; set targets.ink.ignore_label: -1"):
        prepared([0, 1, -1], [True] * 3, None)
    prepared([0, 1, -1], [True, True, False], None)


def test_a_class_beyond_the_configured_ones_is_refused():
    assert prepared([0, 2], [True] * 2, 3).ravel().tolist() == [0, 2]
    with pytest.raises(VolumenError, match="expected classes 0 to 2, found 3"):
        prepared([0, 3], [True] * 2, 3)
    # Where the mask marks the label as invalid, it may hold any value.
    assert prepared([1, 9, -1], [True, False, False], 3).ravel().tolist() == [1, 0, 0]
