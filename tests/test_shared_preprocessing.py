"""The transforms that training and validation share: declared once, made for each, changed in both or in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from data_folders import ball, write_tiff_folder

from volumen.utils.bundle_root import configs_dir

TASK = {"type": "distance_transform", "source_target": "ink", "losses": [{"name": "SignedDistanceLoss"}]}
SECTIONS = {
    "tr_setup": {"compute_loss_on_labeled_only": True},
    "tr_config": {"patch_size": [8, 8, 8], "num_dataloader_workers": 0},
    "model_config": {"features_per_stage": [4, 8]},
    "dataset_config": {"cache_valid_patches": False},
    "auxiliary_tasks": {"depth": TASK},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tiff_folder(tmp_path / "data", {"a": {"ink": ball((16, 16, 32))}})


def transforms_of(
    folder: Path, overlay: dict[str, Any] | None = None, *, labeled_only: bool = True
) -> tuple[list[Any], list[Any]]:
    """The transforms of training and of validation, with an overlay over the bundle's config."""
    from monai.bundle import ConfigParser

    files = [str(configs_dir() / "train.yaml")]
    if overlay:
        files.append(str(folder.parent / "overlay.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(overlay))
    parser = ConfigParser()
    parser.read_config(files)
    setup = {"compute_loss_on_labeled_only": labeled_only}
    parser.update({**SECTIONS, "tr_setup": setup, "dataset_dir": str(folder), "device_name": "cpu"})
    parts = ("train#preprocessing", "validate#preprocessing")
    return tuple(list(parser.get_parsed_content(part).transforms) for part in parts)


def names(transforms: list[Any]) -> list[str]:
    return [type(transform).__name__ for transform in transforms]


def test_both_have_the_same_transforms_but_none_is_one_object(folder):
    train, val = transforms_of(folder)
    augmentations = {name for name in names(train) if name.startswith("Rand")}
    assert [name for name in names(train) if name not in augmentations] == names(val)
    assert len(augmentations) == 7
    assert len(val) == 8
    assert not {id(transform) for transform in train} & {id(transform) for transform in val}


def test_a_disabled_one_is_left_out_of_both(folder):
    for whole, less in zip(transforms_of(folder), transforms_of(folder, labeled_only=False), strict=True):
        assert [name for name in names(whole) if name != "RestrictToLabelledd"] == names(less)
        assert len(less) == len(whole) - 1


def test_an_overlay_of_a_shared_transform_changes_both_and_one_of_a_part_this_one(folder):
    train, val = transforms_of(
        folder,
        {
            "patch_transforms#read#image_order": 3,
            "train#preprocessing#transforms#0#prob_rotation": 0.5,
            "validate#preprocessing#transforms#1": {
                "_target_": "volumen.transforms.labels.PrepareLabelsd",
                "classes": {"ink": 3},
            },
        },
    )
    assert [part.image_order for part in (train[1], val[0])] == [3, 3]
    assert train[0].prob_rotation == 0.5
    assert val[1].classes == {"ink": 3}
    assert train[2].classes == {"ink": None}
