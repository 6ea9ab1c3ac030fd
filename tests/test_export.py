"""An exported file computes what the network computes, at any size, and says what it is."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import tifffile
import torch
from prediction import make_predictor, save_checkpoint

from volumen.cli.running.execution import run_guarded
from volumen.cli.share import add_export_arguments, run_export
from volumen.inference.predictor import load_predictor, predict_array
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.sharing import export as export_module
from volumen.sharing.bioimageio import check_packages, halo, least_size, tensor_ids
from volumen.sharing.exchange_formats import WRITERS
from volumen.sharing.export import export
from volumen.sharing.input_steps import input_steps
from volumen.sharing.request import ExportRequest
from volumen.transforms.normalize import Normalizer
from volumen.utils.errors import VolumenError


def need(to: str) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def outputs_of(path, to, images):
    """Run a file by its own runtime alone: none of our code."""
    if to == "torchscript":
        return torch.jit.load(str(path))(images)
    if to == "pt2":
        return torch.export.load(path).module()(images)
    if to == "aoti":
        return torch._inductor.aoti_load_package(str(path))(images)
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
    if to == "aoti":
        return json.loads(torch._inductor.aoti_load_package(str(path)).get_metadata()["metadata"])
    import onnx

    return json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["metadata"])


def test_the_command_offers_every_format():
    assert tuple(WRITERS) == get_args(get_type_hints(ExportRequest)["to"])


@pytest.mark.parametrize(
    ("to", "ndim"),
    [
        ("torchscript", 2),
        ("torchscript", 3),
        ("pt2", 3),
        ("onnx", 3),
        pytest.param("pt2", 2, marks=pytest.mark.slow),
        pytest.param("onnx", 2, marks=pytest.mark.slow),
        pytest.param("aoti", 2, marks=pytest.mark.slow),
        pytest.param("aoti", 3, marks=pytest.mark.slow),
    ],
)
def test_a_file_agrees_with_the_network_at_sizes_it_was_not_made_with(tmp_path, to, ndim):
    need(to)
    checkpoint = save_checkpoint(tmp_path / "m.pth", ndim, (8,) * ndim, in_channels=ndim - 1)
    path = tmp_path / ("file.pt2" if to == "aoti" else f"file.{to}")
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
    # The smallest image is two divisors long on one axis and one on the others.
    for long in range(ndim):
        images = torch.rand(1, ndim - 1, *(4 if axis == long else 2 for axis in range(ndim)))
        with torch.inference_mode():
            expected, found = network(images), outputs_of(path, to, images)
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

    def shifted(path):
        run = honest(path)
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
        (
            "a.ts",
            "tensorrt",
            "--to: expected one of torchscript, onnx, pt2, aoti, bioimageio, found 'tensorrt'",
        ),
        ("a.rdf", "bioimageio", "-o/--output: expected a name that ends in .zip, found a.rdf"),
        ("a.aoti", "aoti", "-o/--output: expected a name that ends in .pt2, found a.aoti"),
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


def test_a_missing_compiler_is_named(tmp_path, without_compiler):
    with pytest.raises(VolumenError) as caught:
        export(save_checkpoint(tmp_path / "m.pth"), tmp_path / "a.pt2", "aoti")
    assert str(caught.value) == (
        "--to aoti: expected a C++ compiler, which compiles the network, found none; "
        "install one, such as g++, or export --to pt2"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_the_command_prints_the_agreement(tmp_path, caplog):
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    checkpoint = save_checkpoint(tmp_path / "m.pth", 2, (8, 8))
    words = ["-m", str(checkpoint), "--to", "torchscript", "-o", str(tmp_path / "a.ts")]
    caplog.set_level("INFO", logger="volumen")
    assert run_export(parser.parse_args(words)) == 0
    assert "differs from the network by ink" in caplog.text
    options = parser.parse_args(words)
    options.verbose = options.quiet = False
    assert run_guarded(run_export, options) == 2


def anisotropic_checkpoint(path, separate, squeeze, ndim=3):
    """Save a network of uneven strides and kernels, with shared or separate decoders."""
    torch.manual_seed(0)
    heads = {
        name: {"out_channels": channels, "separate_decoder": separate}
        for name, channels in (("ink", 1), ("tissue", 3), ("normals", ndim))
    }
    strides, kernels = [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [1, 3, 3], [3, 3, 3]]
    network = MultiHeadDynUNet(
        ndim, 2, heads, [4, 6, 8], [s[-ndim:] for s in strides], kernel_sizes=[k[-ndim:] for k in kernels],
        n_blocks_per_stage=1, squeeze_excitation=squeeze,
    )  # fmt: skip
    assert network.divisor == (2, 4, 4)[-ndim:]
    config = {
        "tr_config": {"patch_size": [16] * ndim},
        "dataset_config": {
            "normalization_scheme": "unit",
            "targets": {
                "ink": {"activation": "sigmoid", "kind": "binary"},
                "tissue": {"activation": "softmax", "kind": "multiclass"},
            },
        },
        "auxiliary_tasks": {"normals": {"type": "surface_normals", "source_target": "ink"}},
    }
    state = {
        "model": network.state_dict(),
        "model_config": network.final_config,
        "config": config,
        "epoch": 1,
    }
    torch.save(state, path)
    return path


@pytest.mark.parametrize("to", ["torchscript", "pt2", "onnx"])
@pytest.mark.parametrize(
    ("separate", "squeeze"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in ((False, False), (True, False), (False, True))],
)
def test_every_architecture_is_dynamic_in_every_format(tmp_path, to, separate, squeeze):
    """Uneven strides: batches and sizes that neither the export nor its own check has seen."""
    need(to)
    checkpoint = anisotropic_checkpoint(tmp_path / "m.pth", separate, squeeze)
    path = tmp_path / f"file.{to}"
    export(checkpoint, path, to)
    network = load_predictor(checkpoint).network
    for shape in ((1, 2, 4, 8, 20), (4, 2, 10, 12, 8)):
        images = torch.rand(shape)
        with torch.inference_mode():
            expected, found = network(images), outputs_of(path, to, images)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


# The BioImage Model Zoo.

PROPERTIES = {
    "dtypes": ["uint16"],
    "channels": [
        {
            "min": 10.0,
            "max": 900.0,
            "mean": 300.0,
            "std": 90.0,
            "percentile_00_5": 40.0,
            "percentile_99_5": 800.0,
        },
        {
            "min": 0.0,
            "max": 400.0,
            "mean": 100.0,
            "std": 30.0,
            "percentile_00_5": 5.0,
            "percentile_99_5": 350.0,
        },
    ],
}


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore", "ct", "none"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_steps_are_the_normalisation(scheme, dtype):
    normalizer = Normalizer(scheme, PROPERTIES)
    raw = (
        np.random.default_rng(0).integers(0, 1000 if dtype != "uint8" else 256, (3, 2, 5, 6, 7)).astype(dtype)
    )
    steps = input_steps(normalizer, raw.dtype, 2)
    expected = np.stack([normalizer(image) for image in raw])
    np.testing.assert_allclose(steps.apply(raw), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scheme", ["unit", "percentile", "zscore"])
def test_steps_by_the_volume_s_own_statistics(scheme):
    normalizer = Normalizer(scheme, {**PROPERTIES, "per_volume": True})
    raw = np.random.default_rng(0).normal(500, 100, (1, 2, 12, 13, 14)).astype(np.float32)
    found = input_steps(normalizer, raw.dtype, 2).apply(raw)[0]
    expected = normalizer.for_array(raw[0])(raw[0])
    assert np.abs(found - expected).max() < 0.02  # percentiles are sampled there, exact here


def test_names_become_identifiers_all_different():
    found = tensor_ids(["Ink", "ink", "2nd class", "image", "normals", "for"])
    assert len(set(found.values())) == 6
    assert all(name.isidentifier() and name == name.lower() for name in found.values())
    assert found["normals"] == "normals"
    assert found["image"] == "target_image"


@pytest.mark.parametrize("patch", [(16, 16), (20, 48), (128, 96), (192, 256)])
@pytest.mark.parametrize("divisor", [(1, 1), (4, 8), (2, 16), (3, 6)])
def test_an_image_padded_by_the_halo_suits_the_network(patch, divisor):
    predictor = replace(make_predictor(2, patch), divisor=divisor)
    for border, least, step in zip(halo(predictor), least_size(predictor), divisor):
        assert border >= 1
        assert (2 * border) % step == 0
        assert least % step == 0
        assert least > 2 * border


@pytest.mark.slow
@pytest.mark.parametrize("ndim", [2, 3])
def test_the_zoo_s_own_test_passes(tmp_path, ndim):
    """The zip as bioimageio.core sees it: from a path, in every weight format, outputs as ours from raw values."""
    core = pytest.importorskip("bioimageio.core")
    need("onnx")
    try:
        (tmp_path / "any.md").write_text("any")
        check_packages(tmp_path / "any.md")
    except VolumenError as error:
        pytest.skip(str(error))
    checkpoint = anisotropic_checkpoint(tmp_path / "m.pth", separate=False, squeeze=False, ndim=ndim)
    sample = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 40)[: ndim + 1], dtype=np.uint8)
    tifffile.imwrite(tmp_path / "sample.tif", sample, metadata={"axes": "CZYX" if ndim == 3 else "CYX"})
    path = tmp_path / "sheets model.zip"
    report = export(
        checkpoint, path, "bioimageio", sample_image=str(tmp_path / "sample.tif"), authors="A. Person",
        license="CC-BY-4.0",
    )  # fmt: skip
    assert report.worst <= 1e-4

    summary = core.test_model(path, devices=["cpu"])
    assert summary.status == "passed"
    tested = " ".join(detail.name for detail in summary.details)
    for weights in ("torchscript", "onnx"):
        assert weights in tested
    model = core.load_model_description(path)
    assert [str(axis.id) for axis in model.inputs[0].axes] == ["batch", "channel", *"zyx"[-ndim:]]
    assert [str(output.id) for output in model.outputs] == ["ink", "tissue", "normals"]
    assert [axis.size.step for axis in model.inputs[0].axes[2:]] == [2, 4, 4][-ndim:]
    assert {axis.halo for output in model.outputs for axis in output.axes[2:]} == {2}
    assert model.documentation is not None
    assert model.covers

    # A prediction by bioimageio.core of raw values equals ours, at a size that the file does not name.
    images = np.ascontiguousarray(sample[(None, slice(None), *(slice(0, n) for n in (12, 16, 24)[-ndim:]))])
    given = core.digest_spec.create_sample_for_model(model, inputs={"image": images})
    with core.create_prediction_pipeline(model) as pipeline:
        found = pipeline.predict_sample_without_blocking(
            given, skip_input_padding=True, skip_output_cropping=True
        ).members
    # As its users call it: padded by the halo, cropped again.
    padded = core.prediction.predict(model=model, inputs={"image": images}).members
    assert {np.asarray(value.data).shape[2:] for value in padded.values()} == {images.shape[2:]}
    expected = predict_array(load_predictor(checkpoint), images[0], patch_size=images.shape[2:])
    for name, values in expected.items():
        np.testing.assert_allclose(np.asarray(found[name].data)[0], values, atol=1e-4)


def test_a_full_disk_is_told_with_what_fits_an_export(tmp_path):
    with (
        pytest.raises(
            VolumenError, match=r"m\.onnx was not written; free space and give the same command again$"
        ),
        export_module.scratch_folder(tmp_path / "m.onnx"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
