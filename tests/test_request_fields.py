"""A setting of prediction or evaluation is one field: flag, help, YAML and record follow from it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from prediction import save_checkpoint

from volumen.cli.evaluate import add_evaluate_arguments
from volumen.cli.flags import add_field_flags, given_fields, help_of
from volumen.cli.predict import add_predict_arguments, request_from
from volumen.config.described import Described, choices_of, plain_hint, setting_fields
from volumen.config.prediction import HOW, RESULT, WHAT, InferenceConfig, PredictionSettings
from volumen.config.sections import SECTIONS
from volumen.config.validation import check_section
from volumen.evaluation.request import EvaluateRequest
from volumen.inference.output.block_log import read_provenance
from volumen.inference.predict import predict
from volumen.inference.record.reproduce import settings_to_reproduce
from volumen.inference.request import SEVERAL, PredictRequest
from volumen.inference.rules import InstanceRules
from volumen.inference.settings import RECORDED_ELSEWHERE, recorded_settings, settings_of_record
from volumen.utils.bundle_root import configs_dir
from volumen.utils.errors import VolumenError

GROUPS = (WHAT, HOW, SEVERAL, RESULT)
FLAGS = {
    "predict": "-i --input -m --checkpoint -o --output --like --config-path --targets --mask --region --axes --level "
    "--overlap --patch-size --batch-size --compile --tta --device --amp --workers --no-skip-empty --on-corrupt "
    "--nonfinite --nworkers --scheduler --dtype --threshold --min-size --keep-largest --fill-holes --instances "
    "--format --compress --no-fuse --no-pyramid --overwrite",
    "evaluate": "-p --predictions -l --labels -o --output --masks --targets --metrics --instances --threshold "
    "--tolerance --spacing --worst --ignore-label --require-all --seed --connectivity --surface-border "
    "--no-diagnostics",
}
ADD = {"predict": add_predict_arguments, "evaluate": add_evaluate_arguments}


def section_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((configs_dir() / f"{name}.yaml").read_text(encoding="utf-8"))[f"{name}_config"]


def default_in_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_are_those_of_the_users_scripts(command):
    parser = argparse.ArgumentParser(add_help=False)
    ADD[command](parser)
    assert {flag for action in parser._actions for flag in action.option_strings} == set(
        FLAGS[command].split()
    )


@pytest.mark.parametrize("cls", [PredictRequest, EvaluateRequest])
def test_every_field_is_described_and_its_default_told(cls):
    described = list(setting_fields(cls))
    assert {item.name for item in described} == {item.name for item in fields(cls)}
    for item in described:
        if item.default is MISSING or item.default is False:
            continue
        said = help_of(item)
        if item.default is None and item.name in (
            "like",
            "scheduler",
        ):  # without them there is nothing to say
            continue
        assert "(default: " in said, item.name
        if not isinstance(item.default, bool | None | tuple):
            assert said.endswith(f"(default: {item.default})")


@pytest.mark.parametrize("cls", [PredictRequest, EvaluateRequest])
def test_help_lists_every_field(cls):
    _, _, listed = cls.__doc__.partition("Args:\n")
    assert [line.strip().partition(": ")[0] for line in listed.splitlines()] == [
        item.name for item in fields(cls)
    ]


def test_inference_yaml_holds_every_setting_with_its_default():
    """With the keys of the section, which is less the checkpoint's, and nothing that is no field."""
    shipped = section_of("inference")
    by_key = {item.key: item for item in setting_fields(PredictRequest)}
    assert {item.name for item in fields(InferenceConfig)} - {"checkpoint_path", "load_strict"} <= set(
        shipped
    )
    for key, value in shipped.items():
        assert value == by_key[key].default, key


def test_evaluate_yaml_holds_every_setting_with_its_default():
    expected = {
        item.name: default_in_yaml(item.default)
        for item in setting_fields(EvaluateRequest)
        if item.default is not MISSING
    }
    assert section_of("evaluate") == expected


def test_fields_that_yaml_names_otherwise_have_the_same_default():
    defaults = {item.name: item.default for item in fields(InferenceConfig)}
    shared = [item for item in setting_fields(PredictRequest) if item.key in defaults]
    assert len(shared) == len(defaults) - len({"load_strict"})
    for item in shared:
        assert item.default in (defaults[item.key], MISSING), item.name
    assert SECTIONS["inference_config"] is InferenceConfig


def test_a_new_setting_is_one_field():
    @dataclass(frozen=True)
    class Wider(PredictRequest):
        sharpen: Annotated[float, Described("Sharpen by this much; more is noisier.", "PIXELS", HOW)] = 0.5
        tags: Annotated[tuple[str, ...] | None, Described("Tags; null: 100 % of them.", group=WHAT)] = None
        smooth: Annotated[bool, Described("Smooth; false: leave edges.", group=RESULT)] = True

    parser = argparse.ArgumentParser()
    add_field_flags(parser, Wider, GROUPS, optional=("input", "checkpoint", "output"))
    assert given_fields(parser.parse_args([]), Wider) == {}
    words = ["--sharpen", "2", "--tags", "a,b", "--no-smooth"]
    assert given_fields(parser.parse_args(words), Wider) == {
        "sharpen": 2.0,
        "tags": ("a", "b"),
        "smooth": False,
    }
    told = " ".join(parser.format_help().split())
    assert "--sharpen PIXELS sharpen by this much; more is noisier (default: 0.5)" in told
    assert "tags, by commas (default: 100 % of them)" in told
    assert "--no-smooth leave edges (default: smooth)" in told


@pytest.mark.parametrize(
    ("cls", "words", "found"),
    [
        (PredictRequest, ["--targets", "ink, normals"], {"targets": ("ink", "normals")}),
        (PredictRequest, ["--patch-size", "8,16,24"], {"patch_size": (8, 16, 24)}),
        (PredictRequest, ["--tta"], {"tta": "mirror"}),
        (PredictRequest, ["--tta", "rotate"], {"tta": "rotate"}),
        (PredictRequest, ["--no-pyramid", "--overwrite"], {"pyramid": False, "overwrite": True}),
        (
            PredictRequest,
            ["--keep-largest", "0"],
            {"keep_largest": 0},
        ),  # a wrong number is told later, not dropped
        (PredictRequest, ["--overlap", "0"], {"overlap": 0.0}),
        (EvaluateRequest, ["--spacing", "2,0.5,1"], {"spacing": (2.0, 0.5, 1.0)}),
        (EvaluateRequest, ["--metrics", "dice,iou"], {"metrics": ("dice", "iou")}),
        (EvaluateRequest, ["--seed", "0"], {"seed": 0}),
    ],
)
def test_text_becomes_the_fields_type(cls, words, found):
    parser = argparse.ArgumentParser()
    needed = [item.name for item in setting_fields(cls) if item.default is MISSING]
    add_field_flags(parser, cls, GROUPS, optional=needed)
    given = given_fields(parser.parse_args(words), cls)
    assert given == found
    assert {name: type(value) for name, value in given.items()} == {
        name: type(value) for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("cls", "words", "said"),
    [
        (
            PredictRequest,
            ["--patch-size", "8,x"],
            "--patch-size: expected whole numbers by commas, found '8,x'",
        ),
        (EvaluateRequest, ["--spacing", "1,,2"], "--spacing: expected numbers by commas, found '1,,2'"),
    ],
)
def test_a_text_that_cannot_be_read_names_the_flag(cls, words, said):
    parser = argparse.ArgumentParser()
    needed = [item.name for item in setting_fields(cls) if item.default is MISSING]
    add_field_flags(parser, cls, GROUPS, optional=needed)
    with pytest.raises(VolumenError, match=said):
        given_fields(parser.parse_args(words), cls)


def test_the_sections_values_are_checked_as_before():
    assert check_section(InferenceConfig, {"amp": False}, "a.yaml").amp == "off"  # a bare off of YAML 1.1
    for key, value, said in (
        ("overlap", 1.0, "a number below 1, found 1.0"),
        ("overlap", -0.1, "a number of at least 0"),
        ("threshold", float("nan"), "found nan"),
        ("threshold", 1.5, "a number of at most 1"),
        ("batch_size", 0, "a number of at least 1"),
        ("batch_size", True, "a number, found true"),
        ("patch_size", 8, "a list, found 8"),
        ("patch_size", [8, 0, 8], r"patch_size\[1\]: expected a number of at least 1"),
        ("amp", "bf16", "one of auto, off, float16 or bfloat16, found 'bf16'; did you mean bfloat16"),
        ("tta", "mirorr", "did you mean mirror"),
    ):
        with pytest.raises(VolumenError, match=said):
            check_section(InferenceConfig, {key: value}, "a.yaml")


def another(item: Any) -> Any:
    """Return a value of a field's type that is not its default."""
    choices = choices_of(item.hint)
    if choices:
        return next(choice for choice in choices if choice != item.default)
    return {bool: not item.default, int: 3, float: 0.25, str: "a"}[plain_hint(item.hint)]


def test_a_record_gives_every_setting_back():
    request = PredictRequest(
        "i", "m", "o", **{item.name: another(item) for item in setting_fields(PredictionSettings)}
    )
    record = json.loads(json.dumps(recorded_settings(request)))
    assert settings_of_record(record) == {
        item.name: getattr(request, item.name)
        for item in fields(PredictionSettings)
        if item.name not in RECORDED_ELSEWHERE
    }


def test_a_predictions_record_gives_its_request_back(tmp_path, monkeypatch):
    """So no other entry of the record takes a setting's place."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # the compiler takes half a minute
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 11), dtype=np.uint8)
    for name, content in (("a", image), ("mask", np.ones_like(image))):
        array = zarr.create_array(
            tmp_path / f"{name}.zarr", shape=image.shape, chunks=(8, 8, 8), dtype="uint8"
        )
        array[...] = content
    settings = {item.name: another(item) for item in setting_fields(PredictionSettings)}
    settings |= {"mask": str(tmp_path / "mask.zarr"), "amp": "off", "device": "cpu", "patch_size": (8, 8, 8)}
    settings |= {"targets": ("ink",), "nonfinite": "refuse", "region": ((0, 9), (2, 12), (0, 11))}
    where = [str(tmp_path / "a.zarr"), str(save_checkpoint(tmp_path / "m.pth")), str(tmp_path / "o.zarr")]
    predict(PredictRequest(*where, **settings))
    record = read_provenance(tmp_path / "o.zarr")
    assert settings_to_reproduce(record) == {
        "input": where[0], "checkpoint": where[1], "instances": None, "axes": None, "level": 0, **settings,
    }  # fmt: skip


OLD_RECORD = json.loads(
    """{
    "input": {"path": "a.zarr", "array": "a.zarr", "fingerprint": "97", "content": "45", "axes": "zyx", "level": 1,
              "dtype": "uint8", "shape": [13, 24, 19], "geometry": {"spacing": null}},
    "mask": {"path": "mask.zarr", "fingerprint": "bd", "content": "d0"},
    "model": {"path": "m.pth", "sha256": "c7", "epoch": 3},
    "targets": {"ink": {"channels": 1, "activation": "sigmoid", "kind": "binary", "dtype": "uint8"},
                "ink_instances": {"channels": 1, "activation": "none", "kind": "instances", "dtype": "uint32"}},
    "windows": {"patch_size": [8, 8, 8], "overlap": 0.25, "count": 24, "batch_size": 3,
                "weights": "gaussian, sigma 1/8", "tile": [1, 64, 64]},
    "region": [[0, 9], [0, 24], [0, 19]], "blocks": [8, 8, 8], "tta": "mirror", "precision": "float32",
    "device": "cpu", "skip_empty": false, "on_corrupt": "skip", "dtype": "uint8", "threshold": 0.4, "format": "zarr",
    "clean": {"min_size": 4, "keep_largest": 5, "fill_holes": 3}, "compress": "gzip", "pyramid": false,
    "instances": {"boundary": null, "foreground": "ink", "affinities": null, "threshold": 0.5,
                  "merge_threshold": 0.5, "min_size": 2, "block": [], "halo": 32},
    "versions": {"volumen": "0.1.0"}, "machine": {"threads": 1, "device": "cpu"}, "made_of": {}
}"""
)
"""As the version before wrote it; `nonfinite` was not yet recorded."""
OF_OLD_RECORD = {
    "input": "a.zarr", "checkpoint": "m.pth", "targets": ("ink",), "overlap": 0.25, "batch_size": 3,
    "patch_size": (8, 8, 8), "device": "cpu", "amp": "off", "tta": "mirror", "mask": "mask.zarr",
    "region": ((0, 9), (0, 24), (0, 19)), "skip_empty": False, "dtype": "uint8", "threshold": 0.4,
    "compress": "gzip", "min_size": 4, "keep_largest": 5, "fill_holes": 3,
    "instances": InstanceRules(foreground="ink", min_size=2, halo=32), "pyramid": False, "on_corrupt": "skip",
    "nonfinite": None, "axes": "zyx", "level": 1,
}  # fmt: skip


def test_an_old_record_reads_as_before():
    assert settings_to_reproduce(OLD_RECORD) == OF_OLD_RECORD
    older = {key: value for key, value in OLD_RECORD.items() if key != "on_corrupt"}
    assert PredictRequest(output="o", **settings_to_reproduce(older)).on_corrupt == "stop"


def test_flags_go_before_a_record(tmp_path):
    parser = argparse.ArgumentParser()
    add_predict_arguments(parser)
    old = tmp_path / "old.zarr"
    old.mkdir()
    attributes = {"attributes": {"volumen": {"recipe": OLD_RECORD}}}
    (old / "zarr.json").write_text(json.dumps(attributes))
    request = request_from(parser.parse_args(["--like", str(old), "-o", "new.zarr", "--overlap", "0.75"]))
    assert request == PredictRequest(
        **{**OF_OLD_RECORD, "overlap": 0.75, "output": "new.zarr", "like": str(old)}
    )


def test_the_parser_needs_no_pydantic():
    code = (
        "import sys; from volumen.cli.main import build_parser; build_parser().format_help(); "
        "print([name for name in ('pydantic', 'numpy', 'torch', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1] / "bundle", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
