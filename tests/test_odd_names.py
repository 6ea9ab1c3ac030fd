"""Paths and names end where the user said, whatever signs MONAI's parser or a URL would give a meaning to."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import zarr
from data_folders import ball, write_tiff_folder
from monai.bundle import ConfigParser

from volumen.cli.main import main
from volumen.cli.train import shipped_sections
from volumen.config.experiment_file import parse_assignment, read_experiment
from volumen.config.manager import ConfigManager
from volumen.data.formats.opening import open_volume
from volumen.data.formats.urls import is_url
from volumen.data.layout import discover
from volumen.inference.jobs import image_paths
from volumen.utils.errors import VolumenError
from volumen.utils.verbatim import Verbatim, protect, reveal

ODD = ["run#2", "@nas", "$x", "%y", "a::b", "@experiment", "@a@#b", "a b", "@#c", "%d.yaml#e", "plain"]


@pytest.mark.parametrize("name", ODD)
def test_the_parser_hands_on_a_protected_text_as_it_is(name):
    parser = ConfigParser({"a": protect({"b": [name]}), "experiment": 1, "seen": "$@a"})
    assert reveal(parser.get_parsed_content("seen")) == {"b": [name]}
    assert reveal(parser.get_parsed_content("a")) == {"b": [name]}


@pytest.mark.parametrize("name", [name for name in ODD if " " not in name and name != "plain"])
def test_the_parser_would_change_what_is_protected(name):
    assert isinstance(protect(name), Verbatim)


def test_a_protected_text_behaves_like_a_path():
    text = protect("run#2")
    assert Path(text) / "x" == Path("run#2/x")
    assert text + "/logs" == "run#2/logs"
    assert f"{text}" == "run#2"


@pytest.mark.parametrize("name", ODD)
def test_every_setting_that_names_files_keeps_its_text(name):
    sections = shipped_sections()
    sections["tr_setup"] |= {"ckpt_out_base": name, "checkpoint_path": name}
    sections["dataset_config"] |= {"data_path": name, "volumes": [name]}
    sections["inference_config"] |= {"checkpoint_path": name, "mask": name}
    parser = ConfigParser()
    parser.read_config({**sections, "experiment": {"_target_": "volumen.config.manager.ConfigManager"}})
    parser["experiment"] |= {key: f"@{key}" for key in sections}
    for key, value in sections.items():
        parser[key] = protect(value)
    config = parser.get_parsed_content("experiment")
    assert isinstance(config, ConfigManager)
    assert (config.tr_setup.ckpt_out_base, config.tr_setup.checkpoint_path) == (name, name)
    assert (config.dataset_config.data_path, config.dataset_config.volumes) == (name, [name])
    assert (config.inference_config.checkpoint_path, config.inference_config.mask) == (name, name)
    assert type(config.output_dir) is str


def test_only_settings_that_name_files_may_begin_like_an_expression(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text('dataset_config: {data_path: "$x", volumes: ["@a"]}\n')
    assert read_experiment(path)["dataset_config"] == {"data_path": "$x", "volumes": ["@a"]}
    assert parse_assignment("inference_config.mask=$x")[1] == "$x"
    for text in ("tr_config.optimizer=$x", "dataset_config.axes=$x", "auxiliary_tasks.data_path=$x"):
        with pytest.raises(VolumenError, match="not evaluated"):
            parse_assignment(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a.zarr", True),
        ("simplecache::https://host/a.zarr", True),
        ("zip://a.zarr::/data/b.zip", True),
        ("a::b", False),
        ("/data/a::b.zarr", False),
        ("run#2/a.tif", False),
        ("a:b//c", False),
    ],
)
def test_a_url_has_a_scheme(text, expected):
    assert is_url(text) is expected


def test_an_experiment_runs_between_odd_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = (20, 24, 24)
    write_tiff_folder(Path("@d#1 x::y"), {f"$a#{k}": {"cell": ball(shape)} for k in range(2)})
    small = ["--patch-size", "16,16,16", "--steps-per-epoch", "1", "--val-steps", "1", "--workers", "0"]
    small += ["--device", "cpu", "--set", "model_config.features_per_stage=[4,8]", "--max-epochs", "1"]
    assert main(["train", "-i", "@d#1 x::y", "-o", "$r::2% #", *small]) == 0
    model = "$r::2% #/model/model_1.pth"
    assert Path(model).is_file()
    Path("%c#.yaml").write_text('inference_config: {mask: "@d#1 x::y/labels"}\n')
    words = ["-i", "@d#1 x::y", "-m", model, "-o", "@p::q#", "--config-path", "%c#.yaml"]
    assert main(["predict", *words, "--device", "cpu"]) == 0
    stored = open_volume("@p::q#/$a#0.zarr/cell")
    inside = ball(shape) > 0
    assert not stored.read((slice(None),) * 3)[0][~inside].any()  # the mask was found
    assert main(["evaluate", "-p", "@p::q#", "-l", "@d#1 x::y", "-o", "%rep::#"]) == 0
    assert Path("%rep::#/metrics.json").is_file()
    assert main(["train", "-i", "@d#1 x::y", "-o", "@o", "--finetune", model, *small]) == 0
    assert main(["train", "--config-path", "@o/model/model_config.yaml", "-o", "@o2", *small]) == 0
    made = {path.name for path in Path().iterdir()}
    assert made == {"@d#1 x::y", "$r::2% #", "%c#.yaml", "@p::q#", "%rep::#", "@o", "@o2"}


def test_what_servers_and_systems_leave_is_passed_over(tmp_path):
    data = write_tiff_folder(tmp_path / "d", {f"a{k}": {"cell": ball((8, 8, 8))} for k in range(2)})
    for part in ("images", "labels", "masks"):
        for name in ("@eaDir", "#recycle", "lost+found", "__MACOSX"):
            (data / part / name / "a0.tif").mkdir(parents=True)
        (data / part / "._a0.tif").write_bytes(b"\0\5\x16\7")
        (data / part / "Thumbs.db").write_bytes(b"x")
    assert [case.name for case in discover(data).cases] == ["a0", "a1"]
    assert [Path(path).name for path in image_paths(str(data))] == ["a0.tif", "a1.tif"]


def test_files_of_a_server_among_slices_are_no_slices(tmp_path):
    data = write_tiff_folder(tmp_path / "d", {"1": {"cell": ball((8, 8))}, "2": {"cell": ball((8, 8))}})
    (data / "images" / "@eaDir" / "1.tif").mkdir(parents=True)
    assert open_volume(data / "images").shape == (2, 8, 8)


@pytest.mark.parametrize("name", ["a.zarr.zip", "a.ozx", "a.n5"])
def test_a_damaged_container_is_named_and_not_left_out(tmp_path, name):
    data = write_tiff_folder(tmp_path / "d", {"b": {"cell": ball((8, 8, 8))}})
    (data / "images" / name).mkdir() if name.endswith("n5") else (data / "images" / name).write_bytes(
        b"PK\3\4"
    )
    with pytest.raises(VolumenError, match="expected one format"):
        discover(data)
    with pytest.raises(VolumenError, match=re.escape(name)):
        open_volume(data / "images" / name)


def test_a_nested_group_names_the_images_in_it(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    volumes = group.create_group("volumes")
    volumes.create_array("raw", data=np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(
        VolumenError, match=r"found 1 array: volumes/raw; give the path of one, such as .*a.zarr"
    ):
        open_volume(tmp_path / "a.zarr")
    assert open_volume(tmp_path / "a.zarr/volumes/raw").shape == (4, 4, 4)
    volumes.create_group("labels").create_array("ids", data=np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(VolumenError, match="2 arrays: volumes/raw, volumes/labels/ids"):
        open_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "-o", "a", "--output", "b"],
        ["tune", "-m", "a", "-m", "b"],
        ["export", "-o", "a", "--output=b"],
    ],
)
def test_a_flag_of_one_path_is_not_taken_twice(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "given twice" in capsys.readouterr().err
