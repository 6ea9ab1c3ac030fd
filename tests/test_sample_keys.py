"""Names of targets that a sample cannot hold together are refused, whoever declares them."""

from __future__ import annotations

import re

import pytest
from data_folders import shells, write_tiff_folder

from volumen.config.manager import ConfigManager
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import RESERVED, check_names, labelled_key, mask_key


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_names_are_refused(name):
    with pytest.raises(VolumenError, match=f"my.yaml: target '{name}': the name is reserved"):
        check_names(["ink", name], "my.yaml")


@pytest.mark.parametrize(("key", "what"), [(mask_key, "mask"), (labelled_key, "labels")])
def test_the_key_of_another_target_is_refused(key, what):
    other = key("membrane")
    with pytest.raises(VolumenError, match=re.escape(f"that of the {what} of the target 'membrane'")):
        check_names(["membrane", other], "my.yaml")
    check_names([other], "my.yaml")  # alone it overwrites nothing


def test_usual_names_are_taken():
    check_names(["ink", "surface", "label", "mask", "mean", "ink_2", "masked"], "my.yaml")


@pytest.mark.parametrize(
    ("targets", "tasks"),
    [
        (["image"], []),
        (["cell", "cell_mask"], []),
        (["cell"], ["cell_mask"]),
        (["cell"], ["spacing"]),
    ],
)
def test_an_experiment_with_such_names_is_refused(tmp_path, targets, tasks):
    label = shells((16, 16, 16))
    write_tiff_folder(tmp_path, {"a": dict.fromkeys(targets, label)})
    entry = {"type": "distance_transform", "source_target": targets[0], "losses": [{"name": "MaskedMSELoss"}]}
    config = ConfigManager(
        dataset_dir=str(tmp_path), auxiliary_tasks=dict.fromkeys(tasks, entry), device="cpu"
    )
    with pytest.raises(VolumenError, match="rename"):
        _ = config.targets
