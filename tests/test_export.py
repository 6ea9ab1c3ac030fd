"""An exported file computes what the network computes, at any size, and says what it is."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from prediction import save_checkpoint
from scripts.command import run_guarded
from scripts.errors import VolumenError
from scripts.inference.predictor import load_predictor
from scripts.sharing import export as export_module
from scripts.sharing.command import EXPORT_FORMATS, add_export_arguments, run_export
from scripts.sharing.export import export
from scripts.sharing.exporters import WRITERS


def need(to: str) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def outputs_of(path, to, images):
    """Run a file by its own runtime alone: none of our code."""
    if to == "torchscript":
        joined = torch.jit.load(str(path))(images)
        return dict(zip(("ink", "tissue", "normals"), torch.split(joined, [1, 3, images.ndim - 2], dim=1)))
    if to == "pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"image": images.numpy()}))))


def metadata_in(path, to):
    if to == "torchscript":
        from monai.data import load_net_with_metadata

        return load_net_with_metadata(str(path))[1]
    if to == "pt2":
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        return json.loads(files["metadata.json"])
    import onnx

    return json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["metadata"])


def test_the_command_offers_every_format():
    assert tuple(WRITERS) == EXPORT_FORMATS


@pytest.mark.parametrize(
    ("to", "ndim"),
    [
        ("torchscript", 2),
        ("torchscript", 3),
        ("pt2", 3),
        ("onnx", 3),
        pytest.param("pt2", 2, marks=pytest.mark.slow),
        pytest.param("onnx", 2, marks=pytest.mark.slow),
    ],
)
def test_a_file_agrees_with_the_network_at_sizes_it_was_not_made_with(tmp_path, to, ndim):
    need(to)
    checkpoint = save_checkpoint(tmp_path / "m.pth", ndim, (8,) * ndim, in_channels=ndim - 1)
    path = tmp_path / f"file.{to}"
    report = export(checkpoint, path, to)
    assert report.worst <= 1e-4
    assert report.size == path.stat().st_size
    network = load_predictor(checkpoint).network
    images = torch.rand(5, ndim - 1, *(10, 4, 6)[:ndim])
    with torch.inference_mode():
        expected, found = network(images), outputs_of(path, to, images)
    assert list(found) == list(expected) == ["ink", "tissue", "normals"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    metadata = metadata_in(path, to)
    declared = metadata["network_data_format"]["outputs"]
    assert [declared[name]["num_channels"] for name in expected] == [v.shape[1] for v in expected.values()]
    assert metadata["inference"]["targets"]["tissue"]["activation"] == "softmax"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m.pth", path.name])


def test_a_file_that_computes_something_else_is_refused_and_not_left_behind(tmp_path, monkeypatch):
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    honest = export_module.OPENERS["torchscript"]

    def shifted(path, names):
        run = honest(path, names)
        return lambda images: {name: value + 2e-4 * value.abs().max() for name, value in run(images).items()}

    monkeypatch.setitem(export_module.OPENERS, "torchscript", shifted)
    with pytest.raises(VolumenError, match=r"target 'ink' of the exported network differs"):
        export(checkpoint, tmp_path / "a.ts", "torchscript")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    path = tmp_path / "a.ts"
    path.write_text("precious")
    with pytest.raises(VolumenError, match="exists already; give --overwrite"):
        export(checkpoint, path, "torchscript")
    assert path.read_text() == "precious"
    export(checkpoint, path, "torchscript", overwrite=True)
    torch.jit.load(str(path))


@pytest.mark.parametrize(
    ("output", "to", "line"),
    [
        ("a.ts", "tensorrt", "--to: expected one of torchscript, onnx, pt2, found 'tensorrt'"),
        ("no/a.ts", "pt2", "no: there is no such folder; make it, or give another -o"),
        (".", "pt2", "expected a file's name, found a folder; give another -o"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, output, to, line):
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    with pytest.raises(VolumenError) as caught:
        export(checkpoint, tmp_path / output, to)
    assert line in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(VolumenError, match=r"needs the package onnx; pip install 'volumen\[export\]'"):
        export(save_checkpoint(tmp_path / "m.pth"), tmp_path / "a.onnx", "onnx")


def test_the_command_prints_the_agreement(tmp_path, caplog):
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    checkpoint = save_checkpoint(tmp_path / "m.pth", 2, (8, 8))
    words = ["-m", str(checkpoint), "--to", "torchscript", "-o", str(tmp_path / "a.ts")]
    caplog.set_level("INFO", logger="scripts")
    assert run_export(parser.parse_args(words)) == 0
    assert "differs from the network by ink" in caplog.text
    options = parser.parse_args(words)
    options.verbose = options.quiet = False
    assert run_guarded(run_export, options) == 2
