"""Writes the model card of a trained model, in the order of MONAI's model zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volumen.inference.predictor import Predictor
from volumen.inference.windows.heads import Head
from volumen.sharing.metadata import channel_names
from volumen.sharing.preprocessing import preprocessing_code


def model_card(
    predictor: Predictor, metadata: Mapping[str, Any], *, picture: str | None, parameters: int
) -> str:
    """Return the text of `docs/README.md`.

    Args:
        predictor: the network and its settings.
        metadata: result of `build_metadata`.
        picture: file name of the preview beside the card, or None.
        parameters: number of the network's weights.
    """
    training = metadata["training"]
    parts = [
        f"# {metadata['name']}",
        metadata["description"],
        *([f"![Input, then truth and prediction of every target]({picture})"] if picture else []),
        "## Data",
        data_section(training),
        "## Training configuration",
        training_section(predictor, training, parameters) + "\n\nAll settings are in `configs/train.yaml`.",
        "## Input",
        _input(predictor, metadata),
        "## Output",
        _output(predictor),
        "## Performance",
        performance_section(metadata["eval_metrics"], predictor.epoch),
        "## Speed",
        "Not measured: it depends on the machine. `volumen export` gives TorchScript, ONNX and `torch.export` files.",
        "## MONAI bundle commands",
        _commands(metadata),
        "## Without MONAI",
        _runtime(predictor, metadata),
        "## References",
        "\n".join(f"{number}. {text}" for number, text in enumerate(metadata["references"], 1)),
        "## Authors",
        metadata["authors"][:1].upper() + metadata["authors"][1:] + ".",
        "## License",
        "Code: Apache-2.0, see `LICENSE`. Training data, which bind the weights: see `docs/data_license.txt`.",
    ]
    return "\n\n".join(parts) + "\n"


def data_section(training: Mapping[str, Any]) -> str:
    """Return the training and validation data as a list."""
    lines = []
    for part, word in (("train", "trained"), ("val", "validated")):
        if part in training:
            volumes, voxels = training[part]["volumes"], training[part]["voxels"]
            lines.append(
                f"- {word} on {voxels:,} voxels of {len(volumes)} volume(s), format {training['format']}"
            )
    lines.append("- no voxel is in both parts" if len(lines) == 2 else "- the split is not recorded")
    return "\n".join(lines)


def training_section(predictor: Predictor, training: Mapping[str, Any], parameters: int) -> str:
    """Return the settings of the training as a table."""
    rows = {
        "epochs": training["epochs"],
        "patch": " x ".join(map(str, training["patch_size"])),
        "batch size": training["batch_size"],
        "optimizer": f"{training['optimizer']}, learning rate {training['learning_rate']}",
        "seed": training["seed"],
        "parameters": f"{parameters:,}",
        "voxel size": "not stated" if predictor.spacing is None else _voxel_size(predictor),
    }
    listed = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| setting | value |\n| --- | --- |\n{listed}"


def _voxel_size(predictor: Predictor) -> str:
    sizes = " x ".join(map(str, predictor.spacing or ()))
    return f"{sizes} {predictor.unit}" if predictor.unit else sizes


def _input(predictor: Predictor, metadata: Mapping[str, Any]) -> str:
    facts = metadata["inference"]
    axes = ", ".join(facts["axes"].upper())
    divisors = " x ".join(map(str, predictor.divisor))
    steps = "\n".join(f"- {line}" for line in facts["preprocessing"])
    return (
        f"One image, float32, `(batch, {predictor.in_channels}, {axes})`, normalised by the scheme"
        f" `{facts['normalization_scheme']}`:\n\n{steps}\n\nSides are multiples of {divisors}: extend"
        " smaller images by reflection to the next one, never by zeros, which the normalisation of features would see."
        " `configs/inference.yaml` takes volumes of any size (zarr, OME-Zarr, TIFF, NIfTI), normalises them and cuts"
        " windows itself."
    )


def _output(predictor: Predictor) -> str:
    rows = "\n".join(_row(head, predictor) for head in predictor.targets.values())
    return (
        "The network gives one tensor, `pred`, with the targets joined on channels in this order;"
        f" prediction writes each target by itself.\n\n| target | kind | channels |\n| --- | --- | --- |\n{rows}"
    )


def _row(head: Head, predictor: Predictor) -> str:
    return f"| {head.name} | {head.kind} | {', '.join(channel_names(head, predictor.config))} |"


def performance_section(metrics: Mapping[str, float], epoch: int | None) -> str:
    """Return the validation's metrics as a table."""
    if not metrics:
        return "Not recorded. `volumen evaluate` scores predictions against labels."
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return f"On the validation part, after epoch {epoch}.\n\n| metric | value |\n| --- | --- |\n{rows}"


def _commands(metadata: Mapping[str, Any]) -> str:
    return f"""The packages that it was made with:

```bash
{pip_line(metadata)}
```

From the bundle's folder:

```bash
python -m monai.bundle run --config_file configs/inference.yaml --dataset_dir IMAGES --output_dir PREDICTIONS
python -m monai.bundle run --config_file configs/evaluate.yaml --predictions PREDICTIONS --dataset_dir DATA \\
    --output_dir REPORT
python -m monai.bundle run training --config_file configs/train.yaml --dataset_dir DATA --output_dir OUT
```

In Python, with the bundle's folder in `sys.path`:

```python
network = monai.bundle.load(NAME, bundle_dir=FOLDER, workflow_type="inference")
```"""


def pip_line(metadata: Mapping[str, Any]) -> str:
    """Return the command that installs the package versions in the metadata."""
    versions = {
        "torch": metadata["pytorch_version"],
        "monai": metadata["monai_version"],
        "numpy": metadata["numpy_version"],
        **metadata["required_packages_version"],
    }
    # "any" means that the version of the package was not known.
    return "pip install " + " ".join(
        name if number == "any" else f"{name}=={number}" for name, number in versions.items()
    )


def _runtime(predictor: Predictor, metadata: Mapping[str, Any]) -> str:
    return f"""With ONNX Runtime, from the file that `volumen export -m models/model.pt --to onnx -o model.onnx` writes.
It takes an image that fits into memory; larger ones go through it in overlapping windows.

```python
{runtime_code(predictor)}
```"""


def runtime_code(predictor: Predictor) -> str:
    """Return Python code that applies `model.onnx` to an image with only ONNX Runtime and NumPy.

    Its input is `image`, raw, (Z, Y, X) or with channels first; its result is `outputs`, by target.
    """
    ndim = len(predictor.patch_size)
    channel = "[None]" if predictor.in_channels == 1 else ""
    shown = "(Z, Y, X)" if ndim == 3 else "(Y, X)"
    shape = shown if predictor.in_channels == 1 else f"(C, {shown[1:]}"
    activations = {
        "sigmoid": "1 / (1 + np.exp(-outputs[{name!r}]))  # probability",
        "softmax": "outputs[{name!r}].argmax(axis=0)  # class",
    }
    results = [
        f"outputs[{head.name!r}] = {activations[head.activation].format(name=head.name)}"
        for head in predictor.targets.values()
        if head.activation in activations
    ]
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f"# image: raw values, {shape}",
        "image = image.astype(np.float32)",
        f"values = ({preprocessing_code(predictor)})",
        f"values = values.astype(np.float32){channel}",
        f"divisor = {tuple(predictor.divisor)}",
        "padding = [(0, -size % step) for size, step in zip(values.shape[1:], divisor)]",
        'padded = np.pad(values, [(0, 0), *padding], mode="reflect")',
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        "names = [output.name for output in session.get_outputs()]",
        'found = session.run(None, {"image": padded[None]})',
        "inside = (slice(None), *(slice(size) for size in values.shape[1:]))",
        "outputs = {name: output[0][inside] for name, output in zip(names, found)}",
        *results,
    ]
    return "\n".join(lines)
