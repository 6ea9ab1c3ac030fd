"""Exports a trained network for the BioImage Model Zoo (bioimage.io): one zip that the tools of the zoo can run.

The zip contains `rdf.yaml`, the weights as TorchScript and ONNX, a test input with the expected outputs, a cover and a
README. Normalisation and activation are steps of the description, so that inputs are raw images and outputs are
probabilities. Directions are normalised to unit length inside the weights, since the description has no such step.
"""

from __future__ import annotations

import json
import keyword
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from volumen.inference.predictor import Predictor
from volumen.inference.windows.heads import Head
from volumen.networks.multihead import MultiHeadDynUNet, NamedHeads
from volumen.sharing.exporters import Extras, Run, dynamic_shape, need, quiet, sample
from volumen.sharing.input_steps import InputSteps, input_steps
from volumen.sharing.metadata import NOT_STATED, channel_names, find_preview, meaning
from volumen.sharing.zoo_card import zoo_card
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

_HINT = "pip install 'volumen[bioimageio]'"
_INPUT = "image"
_NNUNET = (
    "Isensee et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
    "10.1038/s41592-020-01008-z",
)


class SeparateHeads(nn.Module):
    """Wraps a network for the zoo: returns a tuple of outputs, with directions normalised to unit length.

    Args:
        network: the network.
        heads: outputs of the network, in order.
    """

    def __init__(self, network: MultiHeadDynUNet, heads: tuple[Head, ...]) -> None:
        super().__init__()
        self.named = NamedHeads(network, [head.name for head in heads])
        self.unit = {head.name: head.kind in ("vector", "axis") for head in heads}

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one (B, out_channels, *space) tensor per target."""
        parts: list[Tensor] = []
        for name, part in self.named(image).items():
            parts.append(torch.nn.functional.normalize(part, dim=1, eps=1e-12) if self.unit[name] else part)
        return parts


def write_bioimageio(predictor: Predictor, path: Path, metadata: Mapping[str, Any], extras: Extras) -> None:
    """Write the zip, and run the zoo's test on it.

    Args:
        predictor: the network and the content of its checkpoint.
        path: the zip.
        metadata: result of `build_metadata`.
        extras: sample image, licence, and the run's folder for a cover.

    Raises:
        VolumenError: a package is missing, the sample does not fit, or the zoo's test fails.
    """
    spec = need("bioimageio.spec", "--to bioimageio", _HINT)
    need("bioimageio.core", "--to bioimageio", _HINT)
    folder = path.with_name("model")
    folder.mkdir()
    (folder / "README.md").write_text(zoo_card(predictor, metadata), encoding="utf-8")
    check_packages(folder / "README.md")
    network: Any = predictor.network
    heads = tuple(predictor.targets.values())
    view = SeparateHeads(network, heads).eval()
    raw = test_input(predictor, extras.sample)
    steps = input_steps(predictor.normalizer, raw.dtype, predictor.in_channels)
    np.save(folder / "test_input.npy", raw)
    ids = tensor_ids([head.name for head in heads])
    for head, values in zip(heads, expected_outputs(view, heads, steps, raw), strict=True):
        np.save(folder / f"test_{ids[head.name]}.npy", values)
    weights = _write_weights(view, network, list(ids.values()), folder)
    with quiet("bioimageio"):
        model = _describe(predictor, metadata, extras, folder, steps, ids, weights)
        spec.save_bioimageio_package(model, output_path=path)
        _test(path)


def check_packages(file: Path) -> None:
    """Refuse incompatible package versions: bioimageio.spec 0.5.12 cannot write files with pydantic 2.14.

    Args:
        file: any file.

    Raises:
        VolumenError: the versions are incompatible.
    """
    v0_5 = need("bioimageio.spec.model.v0_5", "--to bioimageio", _HINT)
    try:
        v0_5.FileDescr(source=file).model_dump(mode="json")
    except Exception as error:  # errors of pydantic, and any error of a package that it calls
        raise VolumenError(
            "--to bioimageio", "the installed pydantic and bioimageio.spec do not fit together", remedy=_HINT
        ) from error


def open_bioimageio(path: Path) -> Run:
    """Return a function that runs the network of the zip's TorchScript weights, without pre- or postprocessing."""
    with zipfile.ZipFile(path) as archive, archive.open("weights.pt") as file, quiet():
        return torch.jit.load(file, map_location="cpu").named


def halo(predictor: Predictor) -> tuple[int, ...]:
    """Return the number of voxels that consumers should crop at each border: about an eighth of the training patch.

    Consumers first pad the image by the same number, so twice the halo is a multiple of the divisor.
    """
    units = [step // 2 if step % 2 == 0 else step for step in predictor.divisor]
    return tuple(
        unit * max(1, round(side / 8 / unit)) for side, unit in zip(predictor.patch_size, units, strict=True)
    )


def least_size(predictor: Predictor) -> tuple[int, ...]:
    """Return the smallest input size: a multiple of the divisor, at least twice it, that is larger than both halos."""
    return tuple(
        step * max(2, 2 * border // step + 1)
        for step, border in zip(predictor.divisor, halo(predictor), strict=True)
    )


def test_input(predictor: Predictor, image: str | None) -> np.ndarray:
    """Return a raw test image (1, C, *space): the middle of `image`, else smooth noise in the training's range.

    The sides differ, so that swapped axes are noticed.

    Raises:
        VolumenError: the image does not fit the network or is too small.
    """
    shape = tuple(
        least + number * step
        for number, (least, step) in enumerate(zip(least_size(predictor), predictor.divisor, strict=True))
    )
    if image is not None:
        return _middle_of(image, predictor, shape)
    dtype, bounds = _raw_range(predictor)
    rng = np.random.default_rng(0)
    from scipy.ndimage import gaussian_filter

    channels = []
    for low, high in bounds:
        noise = gaussian_filter(rng.standard_normal(shape), 1.5)
        noise = (noise - noise.min()) / np.ptp(noise)
        channels.append((low + noise * (high - low)).astype(dtype))
    return np.stack(channels)[None]


def expected_outputs(
    view: SeparateHeads, heads: tuple[Head, ...], steps: InputSteps, raw: np.ndarray
) -> list[np.ndarray]:
    """Return the activated outputs of the network for raw images (B, C, *space), float32."""
    with torch.inference_mode():
        outputs = view(torch.from_numpy(steps.apply(raw)))
    return [_activated(head, output).numpy() for head, output in zip(heads, outputs, strict=True)]


def tensor_ids(names: list[str]) -> dict[str, str]:
    """Return unique identifiers in the form that the zoo allows (lower case), by target name."""
    ids: dict[str, str] = {}
    for name in names:
        text = re.sub(r"\W", "_", name.lower(), flags=re.ASCII)
        if not text.isidentifier() or keyword.iskeyword(text) or text == _INPUT:
            text = f"target_{text}"
        while text in ids.values():
            text += "_"
        ids[name] = text
    return ids


def _activated(head: Head, output: Tensor) -> Tensor:
    if head.activation == "sigmoid":
        return torch.sigmoid(output)
    return torch.softmax(output, dim=1) if head.activation == "softmax" else output


def _raw_range(predictor: Predictor) -> tuple[np.dtype, list[tuple[float, float]]]:
    """Return the type of the training images and the range of each channel."""
    properties = predictor.normalizer.properties or {}
    known = properties.get("channels") or []
    fallback = "uint8" if predictor.normalizer.scheme == "unit" and not known else "float32"
    dtype = np.dtype((properties.get("dtypes") or [fallback])[0])
    if dtype == np.bool_ or dtype.name in ("float16",):
        dtype = np.dtype("uint8" if dtype == np.bool_ else "float32")
    if known:
        return dtype, [(float(entry["min"]), float(entry["max"])) for entry in known]
    high = float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0
    return dtype, [(0.0, high)] * predictor.in_channels


def _middle_of(image: str, predictor: Predictor, shape: tuple[int, ...]) -> np.ndarray:
    from volumen.data.formats.opening import open_volume
    from volumen.inference.checks.image import check_image

    volume = open_volume(image)
    check_image(predictor, volume)
    if any(side < least for side, least in zip(volume.shape, shape, strict=True)):
        raise VolumenError(image, expected=f"at least {shape} voxels for the test input", found=volume.shape)
    starts = [(side - extent) // 2 for side, extent in zip(volume.shape, shape, strict=True)]
    values = volume.read(tuple(slice(a, a + extent) for a, extent in zip(starts, shape, strict=True)))
    native = values.astype(values.dtype.newbyteorder("="))
    return (native.astype(np.uint8) if native.dtype == np.bool_ else native)[None]


def _write_weights(
    view: SeparateHeads, network: MultiHeadDynUNet, ids: list[str], folder: Path
) -> dict[str, Any]:
    """Write the weights; return their entry for the description."""
    v0_5 = need("bioimageio.spec.model.v0_5", "--to bioimageio", _HINT)
    onnx = need("onnx", "--to bioimageio", _HINT)
    need("onnxscript", "--to bioimageio", _HINT)
    version = torch.__version__.partition("+")[0]
    with quiet():
        torch.jit.script(view).save(str(folder / "weights.pt"))
        program = torch.onnx.export(
            view,
            (sample(network),),
            dynamo=True,
            verbose=False,
            input_names=[_INPUT],
            output_names=ids,
            dynamic_shapes={"image": dynamic_shape(network)},
        )
        assert program is not None
        model = program.model_proto
    onnx.checker.check_model(model)
    (folder / "weights.onnx").write_bytes(model.SerializeToString())
    return {
        "torchscript": v0_5.TorchscriptWeightsDescr(source=folder / "weights.pt", pytorch_version=version),
        "onnx": v0_5.OnnxWeightsDescr(
            source=folder / "weights.onnx", opset_version=model.opset_import[0].version, parent="torchscript"
        ),
    }


def _describe(
    predictor: Predictor,
    metadata: Mapping[str, Any],
    extras: Extras,
    folder: Path,
    steps: InputSteps,
    ids: Mapping[str, str],
    weights: Mapping[str, Any],
) -> Any:
    """Return the model's description."""
    v0_5 = need("bioimageio.spec.model.v0_5", "--to bioimageio", _HINT)
    ndim = len(predictor.patch_size)
    count = sum(weight.numel() for weight in predictor.network.parameters())
    cover = _cover(extras, predictor, folder)
    try:
        return v0_5.ModelDescr(
            name=_name(metadata["name"]),
            description=metadata["description"][:1024],
            authors=[v0_5.Author(name=metadata["authors"])] if metadata["authors"] != NOT_STATED else [],
            cite=[v0_5.CiteEntry(text=_NNUNET[0], doi=_NNUNET[1])],
            **({"license": extras.license} if extras.license else {}),
            covers=[v0_5.FileDescr(source=cover)],
            documentation=v0_5.FileDescr(source=folder / "README.md"),
            tags=[f"{ndim}d", "unet", "pytorch", "semantic-segmentation", "multi-task", "volumen"],
            version=metadata["version"],
            inputs=[_describe_input(v0_5, predictor, folder, steps)],
            outputs=[
                _describe_output(v0_5, predictor, head, ids[head.name], folder)
                for head in predictor.targets.values()
            ],
            weights=v0_5.WeightsDescr(**weights),
            config=v0_5.Config(
                bioimageio=v0_5.BioimageioConfig(
                    architecture_type="residual U-Net", model_parameter_count=count, task="segmentation"
                ),
                volumen=json.loads(json.dumps(metadata["inference"])),
            ),
        )
    except ValueError as error:  # pydantic's report has one line per fault
        message = " ".join(str(error).split())[:400]
        raise VolumenError(
            "--to bioimageio", f"the description is not valid: {message}", remedy="correct the texts given"
        ) from error


def _describe_input(v0_5: Any, predictor: Predictor, folder: Path, steps: InputSteps) -> Any:
    names = [f"channel{number}" for number in range(predictor.in_channels)]
    axes = _axis_names(predictor)
    return v0_5.InputTensorDescr(
        id=_INPUT,
        description="raw image",
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=names),
            *(
                v0_5.SpaceInputAxis(
                    id=name,
                    size=v0_5.ParameterizedSize(min=least, step=step),
                    scale=scale,
                    concatenable=True,
                )
                for name, least, step, scale in zip(
                    axes, least_size(predictor), predictor.divisor, _scales(predictor), strict=True
                )
            ),
        ],
        data=v0_5.IntervalOrRatioDataDescr(type=steps.dtype.name),
        preprocessing=steps.described(v0_5, axes),
        test_tensor=v0_5.FileDescr(source=folder / "test_input.npy"),
    )


def _describe_output(v0_5: Any, predictor: Predictor, head: Head, name: str, folder: Path) -> Any:
    post = {
        "sigmoid": [v0_5.SigmoidDescr()],
        "softmax": [v0_5.SoftmaxDescr(kwargs=v0_5.SoftmaxKwargs(axis="channel"))],
        "none": [],
    }[head.activation]
    channels = channel_names(head, predictor.config)
    if head.is_probability:
        channels = [text.replace("logit", "probability") for text in channels]
    return v0_5.OutputTensorDescr(
        id=name,
        description=meaning(head, predictor.config)[:128],
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=channels),
            *(
                v0_5.SpaceOutputAxisWithHalo(
                    id=axis,
                    halo=border,
                    scale=scale,
                    size=v0_5.SizeReference(tensor_id=_INPUT, axis_id=axis),
                )
                for axis, border, scale in zip(
                    _axis_names(predictor), halo(predictor), _scales(predictor), strict=True
                )
            ),
        ],
        data=v0_5.IntervalOrRatioDataDescr(
            type="float32", range=(0.0, 1.0) if head.is_probability else (None, None)
        ),
        postprocessing=post,
        test_tensor=v0_5.FileDescr(source=folder / f"test_{name}.npy"),
    )


def _axis_names(predictor: Predictor) -> str:
    return "zyx"[-len(predictor.patch_size) :]


def _scales(predictor: Predictor) -> tuple[float, ...]:
    return predictor.spacing or (1.0,) * len(predictor.patch_size)


def _name(text: str) -> str:
    """Return a name in the form that the zoo allows: 5 to 128 letters, digits and some other characters."""
    plain = re.sub(r"[^A-Za-z0-9_+\- ()]", " ", text)[:128].strip()
    return plain if len(plain) >= 5 else f"model {plain}"


def _cover(extras: Extras, predictor: Predictor, folder: Path) -> Path:
    """Draw the cover, twice as wide as high: the run's preview, else the test input beside the first output."""
    from PIL import Image

    sheet = Image.new("RGB", (800, 400))
    frame = _preview(extras, predictor)
    if frame is not None:
        frame.thumbnail(sheet.size)
        sheet.paste(frame.getpixel((0, 0)), (0, 0, *sheet.size))
        sheet.paste(frame, ((sheet.width - frame.width) // 2, (sheet.height - frame.height) // 2))
    else:
        first = tensor_ids(list(predictor.targets))[next(iter(predictor.targets))]
        for number, name in enumerate(("test_input", f"test_{first}")):
            plane = np.load(folder / f"{name}.npy")[0].astype(np.float32)
            plane = plane[-1]  # for a softmax, the last class rather than the background
            plane = plane[len(plane) // 2] if plane.ndim == 3 else plane
            grey = (255 * (plane - plane.min()) / max(float(np.ptp(plane)), 1e-8)).astype(np.uint8)
            sheet.paste(Image.fromarray(grey).resize((400, 400)), (400 * number, 0))
    cover = folder / "cover.png"
    sheet.quantize(colors=128).save(cover, optimize=True)
    return cover


def _preview(extras: Extras, predictor: Predictor) -> Any:
    """Return the middle frame of the run's preview, or None."""
    from PIL import Image

    preview = find_preview(extras.run_folder, predictor) if extras.run_folder else None
    if preview is None:
        return None
    with Image.open(preview) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        return picture.convert("RGB")


def _test(path: Path) -> None:
    """Run the zoo's test: validity of the description, outputs, other sizes and batches, every weight format.

    Raises:
        VolumenError: the test fails.
    """
    core = need("bioimageio.core", "--to bioimageio", _HINT)
    summary = core.test_model(path, devices=["cpu"])
    if summary.status != "passed":
        faults = [f"{detail.name}: {fault.msg}" for detail in summary.details for fault in detail.errors]
        raise VolumenError(
            "--to bioimageio",
            f"the zoo's own test does not pass: {' '.join('; '.join(faults).split())[:400]}",
            remedy="export to another format",
        )
    logger.info("tested by bioimageio.core: %s", summary.status)
