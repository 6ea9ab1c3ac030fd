"""One writer per exchange format, and one function that runs a written file.

Every written file accepts images (B, C, *space) of any batch size and of any size that the network accepts.
The outputs are the network's logits and values; the metadata inside the file state their meaning.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from volumen.inference.predictor import Predictor
from volumen.networks.multihead import MultiHeadDynUNet, NamedHeads
from volumen.utils.compilation import compiling
from volumen.utils.errors import VolumenError

METADATA_FILE = "metadata.json"
METADATA_KEY = "metadata"
AOTI_FLAG = "--to aoti"

Run = Callable[[Tensor], dict[str, Tensor]]
"""A function from images to outputs by name."""


@dataclass(frozen=True)
class Extras:
    """Content that only some formats have.

    Args:
        run_folder: the checkpoint's folder, for a picture; None: there is none.
        sample: an image whose middle becomes the test input; None: it is generated.
        license: SPDX identifier of the model's licence; "": not stated.
    """

    run_folder: Path | None = None
    sample: str | None = None
    license: str = ""


Writer = Callable[[Predictor, Path, Mapping[str, Any], Extras], None]


def write_torchscript(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write a TorchScript module that returns a dictionary from target to tensor.

    `monai.data.load_net_with_metadata` reads the module and its metadata.
    """
    from monai.data import save_net_with_metadata

    with quiet():
        scripted = torch.jit.script(NamedHeads(network_of(predictor)).eval())
    buffer = io.BytesIO()
    save_net_with_metadata(scripted, buffer, meta_values=metadata)
    path.write_bytes(buffer.getvalue())


def open_torchscript(path: Path) -> Run:
    """Return a function that runs a TorchScript file."""
    with quiet():
        return torch.jit.load(str(path), map_location="cpu")


def write_pt2(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write a program of `torch.export` that returns a dictionary from target to tensor."""
    with _exported(network_of(predictor)) as program:
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


@contextmanager
def _exported(network: MultiHeadDynUNet) -> Iterator[torch.export.ExportedProgram]:
    """Provide the network as a program of `torch.export`, and the settings under which it is processed further."""
    from torch.fx.experimental import _config

    tracing: Any = _config  # the import defines `patch`
    # Otherwise the program refuses sides of one divisor, because tracing specialises a size of 1 in the last stage.
    with quiet(), tracing.patch(backed_size_oblivious=True):
        yield torch.export.export(network, (sample(network),), dynamic_shapes={"x": dynamic_shape(network)})


def open_pt2(path: Path) -> Run:
    """Return a function that runs a `torch.export` file."""
    with quiet():
        return torch.export.load(path).module()


def write_aoti(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write an AOTInductor package: the network as a compiled library for CPUs of this kind, without Python.

    Raises:
        VolumenError: there is no C++ compiler, or it fails.
    """
    with (
        compiling(AOTI_FLAG, torch.device("cpu"), remedy="or export --to pt2"),
        _exported(network_of(predictor)) as program,
    ):
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)}},
        )


def open_aoti(path: Path) -> Run:
    """Return a function that runs an AOTInductor package."""
    with quiet():
        return torch._inductor.aoti_load_package(str(path))


class TupleOfHeads(nn.Module):
    """Wraps a network to return a tuple of the targets' logits, since ONNX names outputs by position."""

    def __init__(self, network: MultiHeadDynUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one (B, out_channels, *space) tensor per target."""
        return tuple(self.network(image).values())


def write_onnx(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write an ONNX model with the input `image` and one output per target, named like the target."""
    onnx = need("onnx")
    need("onnxscript")
    network = network_of(predictor)
    with quiet():
        program = torch.onnx.export(
            TupleOfHeads(network).eval(),
            (sample(network),),
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=list(network.targets),
            dynamic_shapes={"image": dynamic_shape(network)},
        )
        assert program is not None
        model = program.model_proto
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise VolumenError(
            path.name, "is larger than the 2 GB that one ONNX file holds", remedy="export --to pt2 instead"
        )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def open_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file with ONNX Runtime."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(found, map(torch.from_numpy, session.run(None, {"image": images.numpy()})), strict=True)
        )

    return run


def network_of(predictor: Predictor) -> MultiHeadDynUNet:
    """Return the network to export."""
    assert isinstance(predictor.network, MultiHeadDynUNet)
    return predictor.network


def sample(network: MultiHeadDynUNet, factors: tuple[int, ...] = (2, 2, 2), batch: int = 2) -> Tensor:
    """Return random images whose sides are the network's divisors times `factors`.

    The batch size is 2 because tracing exporters treat a size of 1 as a constant.
    """
    sides = [step * factor for step, factor in zip(network.divisor, factors)]
    generator = torch.Generator().manual_seed(batch)
    return torch.rand((batch, network.final_config["in_channels"], *sides), generator=generator)


def dynamic_shape(network: MultiHeadDynUNet) -> dict[int, Any]:
    """Return the variable dimensions of the input: the batch, and the sides by multiples of the divisors."""
    from torch.export import Dim

    shape: dict[int, Any] = {0: Dim("batch")}
    for axis, (step, name) in enumerate(zip(network.divisor, "zyx"[-len(network.divisor) :], strict=True)):
        shape[axis + 2] = Dim(name, min=1) if step == 1 else step * Dim(name, min=1)
    return shape


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Suppress the exporters' messages: deprecations and notes about which a user can do nothing.

    Args:
        more: further libraries to silence.
    """
    names = ("torch.onnx", "torch._dynamo", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    _loguru("disable", more)
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _loguru("enable", more)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _loguru(action: str, packages: tuple[str, ...]) -> None:
    """Switch the messages of packages that use loguru on or off, since loguru ignores the levels of logging."""
    if packages:
        import loguru

        for package in packages:
            getattr(loguru.logger, action)(package)


def need(module: str, flag: str = "--to onnx", remedy: str = "pip install 'volumen[export]'") -> Any:
    """Import a package of an optional dependency group.

    Raises:
        VolumenError: the package is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise VolumenError(flag, f"needs the package {module}", remedy=remedy) from None
