"""`volumen new`: the file says what was found, changes nothing by itself, and each of its choices loads."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tifffile
import yaml

from volumen.cli.main import main
from volumen.config.experiment_file import merge, read_experiment, shipped_sections
from volumen.config.manager import ConfigManager


@pytest.fixture(params=["binary", "classes", "two dimensions", "masked", "odd name"])
def data(request, tmp_path):
    """Folders of two images with one label each."""
    shape = (64, 80) if request.param == "two dimensions" else (24, 64, 80)
    target = "true" if request.param == "odd name" else "sheet"
    rng = np.random.default_rng(0)
    for name in ("images", "labels", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(2):
        label = (rng.random(shape) < 0.3).astype(np.uint8) * rng.integers(
            1, 3 + (request.param == "classes"), shape
        )
        label = label if request.param == "classes" else (label > 0).astype(np.uint8)
        tifffile.imwrite(
            tmp_path / "data" / "images" / f"v{number}.tif", rng.integers(0, 255, shape, np.uint8)
        )
        tifffile.imwrite(tmp_path / "data" / "labels" / f"v{number}_{target}.tif", label.astype(np.uint8))
        if request.param == "masked":
            tifffile.imwrite(
                tmp_path / "data" / "masks" / f"v{number}_{target}.tif", np.ones(shape, np.uint8)
            )
    return tmp_path / "data"


def configure(data, path=None) -> ConfigManager:
    sections = merge(shipped_sections(), read_experiment(path)) if path else shipped_sections()
    return ConfigManager(**sections, dataset_dir=str(data))


def test_the_file_trains_what_would_be_trained_without_it(data, tmp_path):
    path = tmp_path / "mine.yaml"
    assert main(["new", str(path), "-i", str(data), "--quiet"]) == 0
    with_file, without = configure(data, path), configure(data)
    assert with_file.network_config == without.network_config
    assert with_file.patch_size == without.patch_size
    assert with_file.loss_sections == without.loss_sections
    assert with_file.split == without.split
    assert with_file.tr_setup.model_name == "mine"


def test_every_choice_loads_once_its_comment_sign_is_gone(data, tmp_path):
    path = tmp_path / "mine.yaml"
    main(["new", str(path), "-i", str(data), "--quiet"])
    lines = path.read_text().splitlines()
    choices = [i for i, line in enumerate(lines) if re.match(r"  +# [a-z_]+: \S", line)]
    assert len(choices) >= 7
    for place in choices:
        changed = list(lines)
        changed[place] = changed[place].replace("# ", "", 1).replace("[NAME]", "[v1]")
        (tmp_path / "changed.yaml").write_text("\n".join(changed))
        configure(data, tmp_path / "changed.yaml")


def test_suggested_targets_load_once_their_comment_signs_are_gone(data, tmp_path):
    path = tmp_path / "mine.yaml"
    main(["new", str(path), "-i", str(data), "--quiet"])
    before, _, tasks = path.read_text().partition("auxiliary_tasks:\n")
    (tmp_path / "changed.yaml").write_text(before + "auxiliary_tasks:\n" + re.sub(r"(?m)^  # ", "  ", tasks))
    config = configure(data, tmp_path / "changed.yaml")
    binary = [name for name, target in config.primary_targets.items() if target.kind == "binary"]
    assert sorted(config.derived_tasks) == sorted(
        f"{n}_{what}" for n in binary for what in ("distance", "normals")
    )


def test_it_says_what_was_found(data, tmp_path):
    path = tmp_path / "mine.yaml"
    main(["new", str(path), "-i", str(data), "--quiet"])
    text, config = path.read_text(), configure(data)
    assert f"2 images (tif), voxels: {'x'.join(map(str, config.cases[0].image.shape))}" in text
    assert "assumed, as no file states one" in text
    assert f"# patch_size: {list(config.patch_size)}" in text
    assert f"Validated on: {', '.join(name for name, boxes in config.split.val.items() if boxes)}" in text
    assert list(yaml.safe_load(text)["dataset_config"]["targets"]) == list(config.primary_targets)


def test_given_keys_are_in_the_file(data, tmp_path, capsys):
    """Without one of them these data cannot be read at all."""
    path = tmp_path / "mine.yaml"
    next((data / "labels").glob("v1_*")).unlink()
    assert main(["new", str(path), "-i", str(data)]) == 2
    assert "allow_unlabeled_data" in capsys.readouterr().err
    patch = [16] * len(tifffile.imread(data / "images" / "v0.tif").shape)
    words = (
        "dataset_config.allow_unlabeled_data=true",
        "inference_config.overlap=0.25",
        f"tr_config.patch_size={patch}",
    )
    flags = [word for text in words for word in ("--set", text)]
    assert main(["new", str(path), "-i", str(data), "--quiet", *flags]) == 0
    config = configure(data, path)
    assert config.dataset_config.allow_unlabeled_data
    assert config.inference_config.overlap == 0.25
    assert list(config.patch_size) == patch


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["{data}/x.txt", "-i", "{data}"], "a name that ends in .yaml"),
        (["{data}/none/x.yaml", "-i", "{data}"], "there is no such folder"),
        (["{data}/there.yaml", "-i", "{data}"], "exists already"),
        (["{data}/x.yaml", "-i", "{data}/images"], "images"),
        (["{data}/x.yaml", "-i", "{data}", "--set", "dataset_config.targets.x=1"], "SECTION.KEY=VALUE"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(words, found, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "there.yaml").write_text("mine: 1")
    assert main(["new", *(word.format(data=tmp_path) for word in words)]) == 2
    assert found in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine: 1"
    assert not (tmp_path / "x.yaml").exists()
