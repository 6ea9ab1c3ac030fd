"""Weights of classes from label counts: the counts against NumPy on the whole label, the formula, and the losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tifffile
import torch
import zarr
from data_folders import SHORT, image_of, write_tiff_folder

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.formats.opening import open_volume
from volumen.data.index.class_counts import class_counts
from volumen.data.labels.label_channels import LabelRule, as_label
from volumen.data.layout import OpenCase
from volumen.losses.class_weights import automatic_weights
from volumen.losses.multitask import MultiTaskLoss
from volumen.utils.errors import VolumenError

SHAPE = (12, 40, 30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def random_label(classes, seed=0, shape=SHAPE):
    share = np.array([1.0, *(0.2 / 3**c for c in range(1, classes))])
    return np.random.default_rng(seed).choice(classes, size=shape, p=share / share.sum()).astype(np.uint8)


def case_of(tmp_path, label, mask=None, chunks=(5, 16, 16), rule=None, fill=0):
    """Write a label (and mask) as zarr, without the chunks that hold the fill value alone."""
    opened = {}
    for name, array in (("label", label), ("mask", mask)):
        if array is not None:
            path = tmp_path / f"{name}.zarr"
            shape_chunks = (*(1,) * (array.ndim - 3), *chunks)
            stored = zarr.create_array(path, data=array, chunks=shape_chunks, fill_value=fill)
            assert stored.nchunks_initialized <= stored.nchunks
            axes = "zyx" if array.ndim == 3 else "czyx"
            opened[name] = as_label(open_volume(path, axes=axes, labels=True), rule or LabelRule())
    masks = {"ink": opened["mask"]} if mask is not None else {}
    return OpenCase("a", opened["label"], {"ink": opened["label"]}, masks, (1.0,) * 3)


BOXES = [((0, 12), (0, 17), (0, 30)), ((3, 11), (20, 40), (5, 29))]


def crops(array):
    return [array[(..., *[slice(a, b) for a, b in box])] for box in BOXES]


@pytest.mark.parametrize("ignore", [None, 0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_of_classes_are_those_of_the_whole_arrays(tmp_path, ignore, masked):
    label = random_label(5)
    label[:, 16:32, :16] = 0  # chunks that are not stored
    mask = (np.random.default_rng(1).random(SHAPE) < 0.3).astype(np.uint8) if masked else None
    if masked:
        mask[:5] = 0
    case = case_of(tmp_path, label, mask)
    voxels, known = class_counts([case], {"a": BOXES}, "ink", 4, exclusive=True, ignore=ignore)
    values = np.concatenate([crop.ravel() for crop in crops(label)])
    inside = (
        np.concatenate([crop.ravel() > 0 for crop in crops(mask)]) if masked else np.ones(len(values), bool)
    )
    valid = values[inside & (values != ignore)]
    assert voxels.tolist() == [int((valid == c).sum()) for c in range(4)]
    assert set(known.tolist()) == {len(valid)}


def test_counts_of_independent_channels_and_regions(tmp_path):
    label = np.stack([random_label(2, seed) for seed in range(3)])
    case = case_of(tmp_path, label, rule=LabelRule(separate=True))
    voxels, known = class_counts([case], {"a": BOXES}, "ink", 3, exclusive=False)
    assert voxels.tolist() == [sum(int(crop[c].sum()) for crop in crops(label)) for c in range(3)]
    assert set(known.tolist()) == {sum(crop[0].size for crop in crops(label))}
    (tmp_path / "r").mkdir()
    map_ = random_label(4)
    regions = LabelRule(regions=((1, 2, 3), (2, 3)), unknown=None)
    voxels, _ = class_counts(
        [case_of(tmp_path / "r", map_, rule=regions)], {"a": BOXES}, "ink", 2, exclusive=False
    )
    assert voxels.tolist() == [
        sum(int(np.isin(c, values).sum()) for c in crops(map_)) for values in ((1, 2, 3), (2, 3))
    ]


def test_counts_are_cached_until_the_label_changes(tmp_path):
    case, cache = case_of(tmp_path, random_label(3)), tmp_path / "cache"
    options = {"exclusive": True, "cache_dir": cache}
    first = class_counts([case], {"a": BOXES}, "ink", 3, **options)

    class Unreadable:
        def __init__(self, volume):
            self.volume = volume

        def __getattr__(self, name):
            assert name != "read", "the label is read again"
            return getattr(self.volume, name)

    cached = OpenCase("a", case.image, {"ink": Unreadable(case.labels["ink"])}, {}, case.spacing)
    assert np.array_equal(first, class_counts([cached], {"a": BOXES}, "ink", 3, **options))
    with pytest.raises(AssertionError):
        class_counts([cached], {"a": BOXES[:1]}, "ink", 3, **options)


def test_the_formula():
    shares = [0.9, 0.09993, 0.00007]
    found = automatic_weights(shares, exclusive=True)
    expected = [1 / math.log(1.02 + p) for p in shares]
    np.testing.assert_allclose(np.divide(found, found[0]), np.divide(expected, expected[0]), rtol=1e-3)
    assert np.mean(found) == pytest.approx(1, abs=1e-3)
    assert automatic_weights([0.5, 0.25], exclusive=False) == [
        1.0, pytest.approx(math.log(1.77) / math.log(1.27), abs=1e-4)
    ]  # fmt: skip
    assert automatic_weights([0.7, 0.3, 0.0], exclusive=True)[2] == 0  # a class that cannot be learned
    assert automatic_weights([0.0], exclusive=False) == [1.0]
    assert max(automatic_weights([1 - 1e-9, 1e-9], exclusive=True)) / min(
        automatic_weights([1 - 1e-9, 1e-9], exclusive=True)
    ) < 37  # fmt: skip


def config(root, entry, **sections):
    return ConfigManager(
        dataset_dir=str(root),
        tr_config={"patch_size": [8, 8, 8]},
        dataset_config={"targets": {"ink": entry}, "val_volumes": ["b"]},
        device="cpu",
        **sections,
    )


@pytest.fixture
def folder(tmp_path):
    labels = {name: {"ink": random_label(3, seed)} for seed, name in enumerate("ab")}
    return write_tiff_folder(tmp_path / "data", labels)


def test_only_the_training_part_counts(folder):
    label = tifffile.imread(folder / "labels" / "a_ink.tif")
    shares = [(label == c).mean() for c in range(3)]
    found = config(folder, {"class_weights": "auto"})
    assert found.class_weights["ink"] == automatic_weights(shares, exclusive=True)
    assert found.snapshot()["dataset_config"]["targets"]["ink"]["class_weights"] == "auto"
    assert config(folder, {}).class_weights == {}


def test_the_loss_is_torchs_with_these_weights(folder):
    entry = {"class_weights": "auto", "losses": [{"name": "CrossEntropyLoss"}]}
    found = config(folder, entry)
    weights = torch.tensor(found.class_weights["ink"])
    logits, label = torch.randn(1, 3, 8, 8, 8), torch.randint(0, 3, (1, 1, 8, 8, 8))
    loss = MultiTaskLoss(found.loss_sections)
    batch = {"ink": label.float(), "ink_mask": torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)}
    value = loss({"ink": logits}, batch)
    torch.testing.assert_close(value, torch.nn.CrossEntropyLoss(weight=weights)(logits, label[:, 0]))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"class_weights": [1, 2]}, "expected 3 numbers, one for each class of the head"),
        ({"class_weights": [1, 2, -1]}, "class_weights\\[2\\]: expected a number of at least 0"),
        ({"class_weights": "equal"}, "class_weights: expected"),
        ({"class_weights": "auto", "losses": [{"name": "SoftDiceLoss"}]},
         "class_weights: expected a loss with weights of classes, such as CrossEntropyLoss, found SoftDiceLoss"),
        ({"class_weights": "auto", "instances": "foreground"}, "class_weights: expected a target of classes"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(folder, entry, words):
    with pytest.raises(VolumenError, match=words) as caught:
        MultiTaskLoss(config(folder, entry).loss_sections)
    assert "\n" not in str(caught.value)


def test_nothing_labelled_in_the_training_part(tmp_path):
    labels = {name: {"ink": np.full(SHAPE, 7, np.uint8)} for name in "ab"}
    labels["b"]["ink"][:, :20] = 1
    root = write_tiff_folder(tmp_path / "data", labels, images={n: image_of(random_label(2)) for n in "ab"})
    found = config(
        root, {"class_weights": "auto", "ignore_label": 7, "kind": "multiclass", "out_channels": 3}
    )
    with pytest.raises(VolumenError, match="expected labelled voxels in the training part, found none"):
        _ = found.loss_sections


def test_a_training_says_the_weights(folder, tmp_path, capsys):
    train = ["train", "-i", str(folder), "-o", str(tmp_path / "out"), *SHORT, "--patch-size", "8,8,8",
             "--set", "model_config.features_per_stage=[4, 8]", "--device", "cpu", "--batch-size", "1"]  # fmt: skip
    assert main([*train, "--set", "dataset_config.targets.ink.class_weights=auto"]) == 0
    assert "target ink: class weights background " in capsys.readouterr().err
