"""Overlapping regions of a label map: learned as channels of their own, predicted as one label map again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import zarr
from data_folders import write_tiff_folder
from test_raw_dataset import nnunet

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.formats.label_view import RegionLabel
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.patches import find_valid_patches
from volumen.data.labels.label_channels import region_representatives
from volumen.evaluation.pairing import find_cases
from volumen.evaluation.request import EvaluateRequest
from volumen.inference.output.stored import OutputSpec
from volumen.inference.predictor import load_predictor
from volumen.inference.windows.heads import Head
from volumen.utils.errors import VolumenError

REGIONS = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def nested(shape=(16, 20, 24), ignored=None):
    grids = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    distance = np.sqrt(sum(grid**2 for grid in grids))
    label = np.select([distance < 3, distance < 5, distance < 7], [3, 2, 1], 0).astype(np.uint8)
    if ignored is not None:
        label[:2] = ignored
    return label


def test_a_label_map_is_read_as_regions_and_written_back():
    label = nested(ignored=9)
    view = RegionLabel(ArrayVolume(label), list(REGIONS.values()), 9)
    box = (slice(1, 14), slice(0, 20), slice(2, 24))
    found = view.read(box)
    part = label[box]
    for channel, values in zip(found, REGIONS.values(), strict=True):
        expected = np.isin(part, values).astype(np.uint8)
        assert np.array_equal(channel, np.where(part == 9, 9, expected))
    assert view.channels == 3
    head = Head("t", 3, "sigmoid", "multilabel", values=tuple(region_representatives(list(REGIONS.values()))))
    stored = OutputSpec(head, "labels")
    known = part != 9
    probabilities = np.where(found == 1, 0.9, 0.1).astype(np.float32)
    written = stored.convert(probabilities)
    assert stored.channels == 1
    assert written.shape == (1, *part.shape)
    assert np.array_equal(written[0][known], part[known])
    assert OutputSpec(head, "uint8").channels == 3


def test_later_regions_lie_over_earlier_ones():
    values = (4, 7)
    stored = OutputSpec(Head("t", 2, "sigmoid", "multilabel", values=values), "labels", 0.5)
    result = np.array([[0.9, 0.9, 0.1, 0.5], [0.1, 0.9, 0.9, 0.4]])[:, None, None]
    assert stored.convert(result).ravel().tolist() == [4, 7, 7, 4]


@pytest.mark.parametrize("regions", [REGIONS, None], ids=["regions", "channels"])
def test_a_rare_region_or_channel_is_drawn_by_class(tmp_path, regions):
    """Overlapping classes are drawn equally often, each in the middle of its patches; one of them is in a corner."""
    label = np.zeros((16, 32, 96), np.uint8)
    label[:, :, 8:80] = 1
    label[4:8, 4:8, 88:92] = 3
    masks = [label > 0, np.isin(label, [3])]
    image = (50 * label + 10).astype(np.uint8)
    stored = label if regions else np.stack(masks).astype(np.uint8)
    write_tiff_folder(tmp_path, {"a": {"t": stored}}, images={"a": image})
    target = {"regions": {"whole": [1, 3], "rare": [3]}} if regions else {"kind": "multilabel"}
    config = ConfigManager(
        dataset_config={"class_oversampling": 1.0, "targets": {"t": target}, "min_labeled_ratio": 0.001},
        tr_config={"patch_size": [16, 16, 16]},
        model_config={"features_per_stage": [4, 8]},
        tr_setup={"tr_val_split": 1.0},
        dataset_dir=str(tmp_path),
    )
    index = find_valid_patches(
        config.cases,
        config.split.train,
        config.patch_size,
        targets=["t"],
        min_labeled_ratio=0.001,
        classes=config.sampled_classes,
        jitter=True,
    )
    assert len(index.classes) == 2
    rows = [i for i in range(len(index.foreground.start)) if index.foreground.class_shifts[1, i]]
    seen = []
    for row in rows:
        for seed in range(5):
            at = index.random_location(row, np.random.default_rng(seed), background=False, class_row=1)
            part = tuple(slice(low, low + size) for low, size in zip(at.start, at.size, strict=True))
            seen.append(masks[1][part].any())
    assert seen
    assert all(seen)
    # Most patches do not show the rare class.
    assert len(rows) < 0.3 * len(index.foreground.start)


@pytest.mark.parametrize(
    ("regions", "shown"),
    [
        ([[1, 2, 3], [2, 3], [3]], [1, 2, 3]),
        ([[1, 2], [2]], [1, 2]),
        ([[2], [1, 2]], [2, 1]),
        ([[1], [2]], [1, 2]),
    ],
)
def test_the_value_that_stands_for_a_region(regions, shown):
    assert region_representatives(regions) == shown


def config(root, entry, **more):
    return ConfigManager(dataset_config={"targets": {"tumour": entry}}, dataset_dir=str(root), **more)


@pytest.fixture
def root(tmp_path):
    return write_tiff_folder(tmp_path / "data", {name: {"tumour": nested()} for name in "ab"})


def test_heads_losses_and_snapshot(root):
    regions = config(root, {"regions": REGIONS})
    target = regions.targets["tumour"]
    assert (target.kind, target.out_channels, target.activation) == ("multilabel", 3, "sigmoid")
    assert target.classes == ("whole", "core", "enhancing")
    assert target.losses[0].name == "BCEWithLogitsLoss"
    entry = regions.snapshot()["dataset_config"]["targets"]["tumour"]
    assert entry["region_values"] == [1, 2, 3]
    again = config(root, entry).targets["tumour"]
    assert again == target


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"regions": {}}, "expected names and label values"),
        ({"regions": {"a": []}}, "regions.a"),
        ({"regions": {"a": [0, 1]}}, "regions"),
        ({"regions": REGIONS, "kind": "multiclass"}, "expected multilabel, as regions overlap"),
        ({"regions": REGIONS, "instances": "boundary"}, "instances: contradicts regions"),
        ({"regions": REGIONS, "ignore_label": 3}, "hold 3, which is ignore_label"),
        ({"regions": REGIONS, "region_values": [1, 2]}, "expected 3 different values"),
        ({"regions": {"a": [1, 2], "b": [1, 2]}}, "would have the values 1, 1"),
        ({"regions": REGIONS, "out_channels": 2}, "expected 3, the channels of its labels"),
    ],
)
def test_entries_that_contradict_themselves(root, entry, said):
    with pytest.raises(VolumenError, match=said):
        _ = config(root, entry).targets


def test_nnunet_s_regions_are_read_from_its_description(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    nnunet(tmp_path / "raw", {"labels": labels, "regions_class_order": [1, 2]}, values=(1, 2, 3))
    manager = ConfigManager(dataset_dir=str(tmp_path / "raw"))
    target = manager.targets["label"]
    assert target.regions == {"whole": [1, 2], "core": [2]}
    assert target.region_values == (1, 2)
    assert manager.ignore_labels == {"label": 3}
    nnunet(tmp_path / "raw", {"labels": labels, "regions_class_order": [1]}, values=(1, 2, 3))
    with pytest.raises(VolumenError, match="regions_class_order: expected 2 values"):
        _ = ConfigManager(dataset_dir=str(tmp_path / "raw")).targets


def test_training_prediction_and_scores_agree(root, tmp_path):
    (tmp_path / "my.yaml").write_text(
        json.dumps({"dataset_config": {"targets": {"tumour": {"regions": REGIONS}}}})
    )
    small = ["--patch-size", "16,16,16", "--set", "model_config.features_per_stage=[4, 8]", "--device", "cpu"]
    short = [
        "--max-epochs",
        "2",
        "--steps-per-epoch",
        "6",
        "--val-steps",
        "1",
        "--workers",
        "0",
        "--amp",
        "off",
    ]
    words = [
        "train",
        "-i",
        str(root),
        "-o",
        str(tmp_path / "out"),
        "--config-path",
        str(tmp_path / "my.yaml"),
    ]
    assert main([*words, *small, *short, "--set", "tr_config.initial_lr=0.01"]) == 0
    model = str(tmp_path / "out" / "model" / "model_best.pth")
    (head,) = load_predictor(model).heads()
    assert head.values == (1, 2, 3)
    predict = [
        "predict",
        "-i",
        str(root / "images" / "a.tif"),
        "-m",
        model,
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    assert main([*predict, "-o", str(tmp_path / "p" / "a.zarr"), "--dtype", "float32"]) == 0
    assert main([*predict, "-o", str(tmp_path / "l" / "a.zarr"), "--dtype", "labels"]) == 0
    probabilities = zarr.open_array(tmp_path / "p" / "a.zarr" / "tumour" / "0", mode="r")[...]
    labels = zarr.open_array(tmp_path / "l" / "a.zarr" / "labels" / "tumour" / "0", mode="r")[...]
    expected = np.select([p >= 0.5 for p in probabilities[::-1]], [3, 2, 1], 0)
    assert np.array_equal(labels, expected)
    # Label maps and probabilities are scored region by region, and against the label as it lies.
    scores = []
    for folder in ("p", "l"):
        request = EvaluateRequest(str(tmp_path / folder), str(root), str(tmp_path / "r"), metrics=("dice",))
        (case,) = find_cases(request)
        assert (case.kind, case.channels, case.label.channels) == ("multilabel", 3, 3)
        report = tmp_path / f"report_{folder}"
        assert main(["evaluate", "-p", str(tmp_path / folder), "-l", str(root), "-o", str(report)]) == 0
        scores.append(json.loads((report / "metrics.json").read_text())["mean"])
    truth = nested()
    for name, values in REGIONS.items():
        both = [np.isin(array, values) for array in (labels, truth)]
        total = both[0].sum() + both[1].sum()
        own = scores[1][f"tumour/dice/{name}"]
        assert own == pytest.approx(2 * (both[0] & both[1]).sum() / total, abs=1e-6)
    assert torch.tensor(scores[0]["tumour/dice/whole"]).isfinite()
