"""Exports a trained network to a file that runs without this program."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from volumen.checkpoints.file import writing_failed
from volumen.inference.predictor import Predictor, load_predictor
from volumen.sharing.exchange_formats import OPENERS, SUFFIXES, WRITERS
from volumen.sharing.exporters import Extras, Run, network_of, sample
from volumen.sharing.metadata import build_metadata, read_metrics, training_summary
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import sync_file, sync_folder

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
_CHECKED = (((3, 2, 2), 1), ((2, 3, 3), 3), ((2, 1, 1), 1))
"""Multiples of the divisor per axis, and batch sizes, that differ from the tracing sample; the last is the smallest
valid input."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of an exported file with the network on one input.

    Args:
        shape: shape of the input.
        difference: by target, the largest difference divided by the largest value, or by 1 if values are smaller.
    """

    shape: tuple[int, ...]
    difference: dict[str, float]


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Args:
        path: the file.
        to: its format.
        size: its size in bytes.
        agreement: one entry per checked input.
    """

    path: Path
    to: str
    size: int
    agreement: tuple[Agreement, ...]

    @property
    def worst(self) -> float:
        """Largest difference over all inputs and targets."""
        return max(max(one.difference.values()) for one in self.agreement)


def export(
    checkpoint: str | Path,
    output: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    description: str = "",
    authors: str = "",
    sample_image: str | None = None,
    license: str = "",
) -> ExportReport:
    """Export a checkpoint's network, and compare the outputs of the file with those of the network.

    The comparison runs on the CPU in float32, on inputs of other sizes and batches than the tracing sample. The file
    appears under its name only after it has passed.

    Args:
        checkpoint: trained network.
        output: the file to write.
        to: "torchscript", "onnx", "pt2", "aoti" or "bioimageio".
        overwrite: whether an existing file may be replaced.
        description: purpose of the model; "" for a sentence generated from its targets.
        authors: authors of the model.
        sample_image: an image whose middle becomes the test input, "bioimageio" only; None: it is generated.
        license: SPDX identifier of the model's licence, "bioimageio" only; "": not stated.

    Raises:
        VolumenError: the format is unknown, the file exists or cannot be written, a package is missing, or outputs
            differ by more than 1e-4.
    """
    if to not in WRITERS:
        raise VolumenError("--to", expected=f"one of {', '.join(WRITERS)}", found=repr(to))
    output = Path(output)
    check_output(output, overwrite)
    suffix = SUFFIXES.get(to)
    if suffix is not None and output.suffix != suffix:
        raise VolumenError("-o/--output", expected=f"a name that ends in {suffix}", found=output.name)
    predictor = load_predictor(checkpoint)
    folder = Path(checkpoint).resolve().parent
    metadata = build_metadata(
        predictor,
        name=output.name.partition(".")[0],
        description=description,
        authors=authors,
        metrics=read_metrics(folder, predictor.epoch),
        training=training_summary(predictor, folder),
        joined=False,
    )
    with scratch_folder(output) as scratch:
        written = scratch / output.name
        WRITERS[to](predictor, written, metadata, Extras(folder, sample_image, license))
        agreement = compare(predictor, OPENERS[to](written))
        report = ExportReport(output, to, written.stat().st_size, agreement)
        _refuse_disagreement(report)
        publish(written, output)
    return report


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists already or whose folder does not exist.

    Raises:
        VolumenError: one of both is the case.
    """
    if output.is_dir():
        raise VolumenError(output, expected="a file's name", found="a folder", remedy="give another -o")
    if output.exists() and not overwrite:
        raise VolumenError(output, "exists already", remedy="give --overwrite to replace it")
    if not output.absolute().parent.is_dir():
        raise VolumenError(output.parent, "there is no such folder", remedy="make it, or give another -o")


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Provide a temporary folder beside the output, so that a rename moves the finished file; remove it afterwards.

    Raises:
        VolumenError: the disk is full or cannot be written.
    """
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        yield folder
    except OSError as error:
        raise writing_failed(output, error, go_on="give the same command again") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def publish(written: Path, output: Path) -> None:
    """Rename a finished file to its final name after its content has been flushed to disk."""
    sync_file(written)
    written.replace(output)
    sync_folder(output.absolute().parent)


@torch.inference_mode()
def compare(predictor: Predictor, run: Run) -> tuple[Agreement, ...]:
    """Compare a file's outputs with the network's on inputs of several sizes and batches."""
    network = network_of(predictor)
    results = []
    for factors, batch in _CHECKED:
        images = sample(network, factors, batch)
        expected, found = network(images), run(images)
        results.append(Agreement(tuple(images.shape), _differences(expected, found)))
    return tuple(results)


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float((found[name] - value).abs().max() / value.abs().max().clamp_min(1.0))
        if found[name].shape == value.shape
        else float("inf")
        for name, value in expected.items()
    }


def _refuse_disagreement(report: ExportReport) -> None:
    for one in report.agreement:
        for name, difference in one.difference.items():
            # This form of the comparison also refuses NaN.
            if not difference <= TOLERANCE:
                raise VolumenError(
                    report.path,
                    f"target {name!r} of the exported network differs for an input of {one.shape}",
                    expected=f"at most {TOLERANCE:g} of the largest value",
                    found=f"{difference:.3g}",
                    remedy="export to another format",
                )
