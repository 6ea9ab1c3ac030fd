"""Labels that number instances, from the file to the targets of the heads."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import tifffile
import yaml
import zarr
from conftest import ROOT
from data_folders import image_of
from monai.bundle import ConfigParser
from test_instance_distance import voronoi

from volumen.config.manager import ConfigManager
from volumen.derived.arrays.affinities import affinities
from volumen.derived.arrays.boundaries import boundary
from volumen.derived.derivation import derive_target
from volumen.utils.errors import VolumenError

SHAPE = (24, 32, 32)
HEADS = {
    "affinity": {"type": "affinities", "losses": [{"name": "BCEWithLogitsLoss"}]},
    "shape": {"type": "local_shape_descriptors", "sigma": 2.0, "losses": [{"name": "MaskedMSELoss"}]},
    "edge": {"type": "boundary", "losses": [{"name": "BCEWithLogitsLoss"}]},
}
TASKS = {name: {"source_target": "cells", **entry} for name, entry in HEADS.items()}


@pytest.fixture
def folder(tmp_path):
    """Write two volumes of touching cells, numbered beyond 32 bits, with labels in zarr."""
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for number in range(2):
        cells = voronoi(SHAPE, 30, seed=number)
        tifffile.imwrite(tmp_path / "data" / "images" / f"v{number}.tif", image_of(cells > 0))
        zarr.save_array(str(tmp_path / "data" / "labels" / f"v{number}_cells.zarr"), cells)
    return tmp_path / "data"


def parsed(folder, mode, augment=False, tasks=TASKS):
    """Return the bundle's own configuration of a training on the folder."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundle" / "configs" / "train.yaml"))
    parser.update(
        {
            "dataset_dir": str(folder),
            "tr_config#patch_size": [16, 16, 16],
            "tr_config#augment": augment,
            "model_config#features_per_stage": [4, 8],
            "dataset_config#targets": {"cells": {"instances": mode}},
            "dataset_config#cache_valid_patches": False,
            "auxiliary_tasks": tasks,
        }
    )
    return parser


def crop(sample, numbers):
    return numbers[tuple(slice(int(first), int(first) + 16) for first in sample["start"])]


@pytest.mark.parametrize("mode", ["foreground", "boundary", "interior", "distance"])
def test_the_head_learns_the_mode_and_the_tasks_see_the_numbers(folder, mode):
    dataset = parsed(folder, mode).get_parsed_content("train#dataset")
    sample = dataset[(0, 1)]
    whole = voronoi(SHAPE, 30, seed=int(sample["volume_name"][-1]))
    everywhere = np.ones(SHAPE, bool)
    edge = boundary(whole[None], everywhere, "inner")[0]
    expected = {
        "foreground": whole > 0,
        "boundary": edge,
        "interior": (whole > 0) & ~edge,
        "distance": derive_target("distance_transform", whole[None], instances=True)[0][0],
    }[mode]
    np.testing.assert_allclose(sample["cells"][0].numpy(), crop(sample, expected), atol=1e-5)
    assert sample["cells_mask"].all()
    together, _ = affinities(whole[None], everywhere, [[-1, 0, 0], [0, -1, 0], [0, 0, -1]])
    known = sample["affinity_mask"][0].numpy()
    for channel, values in enumerate(together):
        np.testing.assert_array_equal(sample["affinity"][channel].numpy()[known], crop(sample, values)[known])
    np.testing.assert_array_equal(
        sample["edge"][0].numpy(), crop(sample, boundary(whole[None], everywhere)[0])
    )
    shape, inside = derive_target("local_shape_descriptors", whole[None], sigma=2.0)
    valid = sample["shape_mask"][0].numpy()
    assert valid.sum() > 1000
    np.testing.assert_array_equal(valid, crop(sample, inside[0]))
    np.testing.assert_allclose(
        sample["shape"].numpy()[:, valid],
        np.stack([crop(sample, values) for values in shape])[:, valid],
        atol=1e-4,
    )


def test_numbers_beyond_what_floats_hold_survive_rotation(folder):
    # Numbers are 10**15 apart, so that neighbours would be equal in float32; +1 distinguishes int64 from floats.
    path = folder / "labels" / "v0_cells.zarr"
    numbers = voronoi(SHAPE, 30) * np.uint64(16)
    numbers[numbers > 0] += (np.indices(SHAPE)[2] % 2).astype(np.uint64)[numbers > 0]
    shutil.rmtree(path)
    zarr.save_array(str(path), numbers)
    parser = parsed(folder, "foreground", augment=True, tasks={})
    read = parser.get_parsed_content("train#preprocessing").transforms[:2]
    dataset = parser.get_parsed_content("train#dataset")
    case = next(case for case in dataset.cases if case.name == "v0")
    location = dataset.index.grid_location(0)
    for seed in range(6):
        sample = {"case": case, "location": location}
        for transform in read:
            if hasattr(transform, "set_random_state"):
                transform.set_random_state(seed=seed)
            sample = transform(sample)
        assert sample["cells"].dtype == np.uint64
        assert set(np.unique(sample["cells"])) <= set(np.unique(numbers)) | {0}


def config_of(tmp_path, cells, **sections):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir(exist_ok=True)
    tifffile.imwrite(tmp_path / "images" / "a.tif", image_of(cells > 0))
    tifffile.imwrite(tmp_path / "labels" / "a_cells.tif", cells)
    return ConfigManager(dataset_dir=str(tmp_path), **sections)


def test_many_numbers_are_taken_for_instances_and_logged(tmp_path, caplog):
    cells = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) // 5
    with caplog.at_level(logging.WARNING):
        target = config_of(tmp_path, cells).targets["cells"]
    assert (target.kind, target.out_channels, target.instances) == ("binary", 1, "foreground")
    assert "taken for instances" in caplog.text


def test_a_snapshot_keeps_the_mode(tmp_path):
    cells = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) // 5
    targets = {"cells": {"instances": "distance"}}
    config = config_of(tmp_path, cells, dataset_config={"targets": targets}, output_dir=str(tmp_path / "o"))
    again = ConfigManager(**config.snapshot(), dataset_dir=str(tmp_path))
    assert again.targets == config.targets
    assert again.targets["cells"].kind == "distance"
    assert again.halo == config.halo == (16, 16)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kind": "distance"}, "instances: distance with it"),
        ({"instances": "foreground", "out_channels": 3}, "expected 1 for instances: foreground"),
        ({"instances": "distance", "kind": "binary"}, "expected distance"),
        ({"instances": "distance", "activation": "sigmoid"}, "none for a distance"),
        ({"instances": "edges"}, "edges"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(tmp_path, entry, words):
    with pytest.raises(VolumenError, match=words):
        _ = config_of(
            tmp_path, np.eye(20, dtype=np.uint8), dataset_config={"targets": {"cells": entry}}
        ).targets


@pytest.mark.slow
def test_cells_train_and_predict(folder, tmp_path):
    from volumen.cli.main import main

    settings = {
        "dataset_config": {"targets": {"cells": {"instances": "distance"}}},
        "tr_config": {
            "patch_size": [16, 16, 16],
            "max_epoch": 2,
            "max_steps_per_epoch": 2,
            "max_val_steps_per_epoch": 1,
            "num_dataloader_workers": 0,
        },
        "model_config": {"features_per_stage": [4, 8], "separate_decoders": False},
        "auxiliary_tasks": TASKS,
    }
    experiment = tmp_path / "cells.yaml"
    experiment.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    assert (
        main(
            ["train", "-i", str(folder), "-o", str(out), "--config-path", str(experiment), "--device", "cpu"]
        )
        == 0
    )
    model = out / "model" / "model_best.pth"
    image = folder / "images" / "v0.tif"
    assert (
        main(["predict", "-i", str(image), "-m", str(model), "-o", str(tmp_path / "p"), "--device", "cpu"])
        == 0
    )
