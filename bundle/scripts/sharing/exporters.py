"""One writer per exchange format, and one reader that runs what was written.

Every writer gives a file that takes images (B, C, *space) of any batch and of any size that the network takes.
The outputs are logits and values as the network gives them; the metadata inside the file say what they mean.
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
from volumen.utils.errors import VolumenError

METADATA_FILE = "metadata.json"
METADATA_KEY = "metadata"

Run = Callable[[Tensor], dict[str, Tensor]]
"""Images in, outputs by name out."""


@dataclass(frozen=True)
class Extras:
    """What only some formats hold.

    Args:
        run_folder: the checkpoint's folder, for a picture; None: there is none.
        sample: an image whose middle becomes the test input; None: made up.
        license: SPDX identifier of the model's licence; "": not stated.
    """

    run_folder: Path | None = None
    sample: str | None = None
    license: str = ""


Writer = Callable[[Predictor, Path, Mapping[str, Any], Extras], None]


def write_torchscript(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write a TorchScript module that gives a dictionary from target to tensor.

    `monai.data.load_net_with_metadata` reads it, metadata included.
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
    """Write a program of `torch.export`; it gives a dictionary from target to tensor."""
    from torch.fx.experimental import _config

    tracing: Any = _config  # it gets `patch` as it is imported
    network = network_of(predictor)
    # Otherwise the program refuses sides of one divisor: a size of 1 in the last stage is traced as a case of its own.
    with quiet(), tracing.patch(backed_size_oblivious=True):
        program = torch.export.export(
            network, (sample(network),), dynamic_shapes={"x": dynamic_shape(network)}
        )
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def open_pt2(path: Path) -> Run:
    """Return a function that runs a `torch.export` file."""
    with quiet():
        return torch.export.load(path).module()


class TupleOfHeads(nn.Module):
    """A view of a network that returns a tuple of the targets' logits, as ONNX names outputs by position."""

    def __init__(self, network: MultiHeadDynUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one (B, out_channels, *space) tensor per target."""
        return tuple(self.network(image).values())


def write_onnx(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write an ONNX model with the input `image` and one output per target, by its name."""
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
    """Return a function that runs an ONNX file by ONNX Runtime."""
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

    A batch of 2, because a size of 1 would be taken for a constant by the tracing exporters.
    """
    sides = [step * factor for step, factor in zip(network.divisor, factors)]
    generator = torch.Generator().manual_seed(batch)
    return torch.rand((batch, network.final_config["in_channels"], *sides), generator=generator)


def dynamic_shape(network: MultiHeadDynUNet) -> dict[int, Any]:
    """Return what of the input's shape may vary: the batch, and the sides by multiples of the divisors."""
    from torch.export import Dim

    shape: dict[int, Any] = {0: Dim("batch")}
    for axis, (step, name) in enumerate(zip(network.divisor, "zyx"[-len(network.divisor) :], strict=True)):
        shape[axis + 2] = Dim(name, min=1) if step == 1 else step * Dim(name, min=1)
    return shape


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Keep the exporters' own messages back: deprecations and notes that a user can do nothing about.

    Args:
        more: further libraries.
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
    """Turn what packages say through loguru, which knows nothing of logging's levels, on or off."""
    if packages:
        import loguru

        for package in packages:
            getattr(loguru.logger, action)(package)


def need(module: str, flag: str = "--to onnx", remedy: str = "pip install 'volumen[export]'") -> Any:
    """Import a package of an extra.

    Raises:
        VolumenError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise VolumenError(flag, f"needs the package {module}", remedy=remedy) from None
