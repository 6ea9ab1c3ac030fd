"""`make demo`: makes a phantom, trains on it, predicts and scores another roll, and writes pictures."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.cli.running.execution import run_guarded, set_up_logging
from volumen.config.experiment_file import SECTION_NAMES
from volumen.utils.bundle_root import configs_dir
from volumen.utils.sample_keys import mask_key

# An explicit name: as the main module it would have another name and be as quiet as other libraries.
logger = logging.getLogger("volumen.cli.demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m volumen.cli.demo", description=__doc__)
    parser.add_argument(
        "-o", "--output", default="demo", help="folder for everything that is made (default: demo)"
    )
    parser.add_argument(
        "--size", type=int, default=160, help="voxels along each side of the phantom (default: 160)"
    )
    parser.add_argument("--verbose", action="store_true", help="more messages; a traceback with an error")
    parser.add_argument("--quiet", action="store_true", help="warnings and errors only")
    options = parser.parse_args(arguments)
    return run_guarded(run_demo, options)


def run_demo(options: argparse.Namespace) -> int:
    """Run the steps in sequence, each as the command that a user would type.

    A second run reuses the phantom, the finished training and the finished prediction.

    Returns:
        0, or the exit code of the first command that failed.
    """
    from volumen.phantom.volume import write_phantom

    began = time.monotonic()
    output = Path(options.output)
    data, run = output / "phantom", output / "runs" / "demo"
    if not (data / "images").is_dir():
        logger.info("writing a phantom of rolled sheets, %d voxels a side, to %s", options.size, data)
        write_phantom(data, (options.size,) * 3)
    experiment = configs_dir() / "recipes" / "demo.yaml"
    commands = [
        ["train", "-i", data, "-o", output / "runs", "--config-path", experiment, "--resume"],
        ["predict", "-i", data / "heldout", "-m", run / "demo_best.pth", "-o", output / "prediction",
         "--overlap", "0.25"],
        ["evaluate", "-p", output / "prediction", "-l", data / "heldout" / "labels", "-o", output / "report"],
    ]  # fmt: skip
    for words in commands:
        code = run_command([str(word) for word in words], options)
        if code:
            return code
    picture = draw_heldout(data / "heldout", run / "demo_best.pth", output / "demo.gif")
    logger.info("done in %.1f minutes; look at:", (time.monotonic() - began) / 60)
    for path in (picture, run / "demo_debug.gif", output / "report" / "report.html", output / "prediction"):
        logger.info("  %s", path)
    return 0


def draw_heldout(data: Path, checkpoint: Path, path: Path, *, size: int = 64) -> Path:
    """Draw truth and prediction of every target in the middle of a volume that was not trained on.

    Args:
        data: a data folder with labels everywhere.
        checkpoint: the trained network.
        path: the GIF to write.
        size: voxels along each side of the drawn part.

    Returns:
        The path.
    """
    from volumen.config.manager import ConfigManager
    from volumen.handlers.preview.handler import encode
    from volumen.handlers.preview.render import render_preview
    from volumen.inference.predictor import load_predictor, predict_array
    from volumen.transforms.derive import DeriveTargetsd
    from volumen.utils.files.atomic import write_atomically

    predictor = load_predictor(checkpoint)
    config = ConfigManager(**{name: predictor.config[name] for name in SECTION_NAMES}, dataset_dir=str(data))
    case = config.cases[0]
    whole = tuple(slice(0, extent) for extent in case.image.shape)
    image = case.image.read(whole)
    labels: dict[Hashable, Any] = {name: label.read(whole) for name, label in case.labels.items()}
    truths = DeriveTargetsd(config.derived_tasks, unit="voxel")({**labels, "spacing": case.spacing})
    # The drawing code expects the network's outputs, so probabilities are converted to logits.
    found = predict_array(predictor, image)
    found = {
        name: np.log(values + 1e-6) - np.log1p(1e-6 - values) if config.kinds[name] == "binary" else values
        for name, values in found.items()
    }
    middle = tuple(slice((extent - size) // 2, (extent + size) // 2) for extent in case.image.shape)
    inside = (slice(None), *middle)
    frames = render_preview(
        predictor.normalizer(image)[inside],
        {name: truths[name][inside] for name in config.kinds},
        {name: values[inside] for name, values in found.items()},
        {name: truths[mask_key(name)][inside] for name in config.derived_tasks},
        config.kinds,
        title="held-out roll",
        spacing=case.spacing,
        unit=case.unit,
    )
    _, content = encode(frames)
    write_atomically(path, content)
    return path


def run_command(words: list[str], options: argparse.Namespace) -> int:
    """Run one command of `volumen` in this process, and log the equivalent command line."""
    from volumen.cli.main import main as volumen

    logger.info("$ volumen %s", shlex.join(words))
    code = volumen(
        [*words, *(["--verbose"] if options.verbose else []), *(["--quiet"] if options.quiet else [])]
    )
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    return code


if __name__ == "__main__":
    sys.exit(main())
