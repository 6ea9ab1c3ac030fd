"""`volumen pretrain`: converts flags and experiment file to overrides of the bundle's configs, and runs these."""

from __future__ import annotations

import argparse
import logging
import os

from volumen.cli.flags import Once
from volumen.utils.bundle_root import configs_dir
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

MODEL_NAME = "pretrained"
"""Name of the run's folder and files unless `--model-name` is given; that of the settings names the training."""


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `volumen pretrain`. A missing option has the experiment file's value, else the default."""
    parser.description = (
        "Train the encoder on images without labels: blocks of a patch are hidden, and the network completes them."
        " `volumen train --finetune OUT/pretrained/pretrained_final.pth` starts from it."
    )
    data = parser.add_argument_group("data and output")
    data.add_argument(
        "-i", "--input", action="append", metavar="DATA",
        help="folder with images/; labels are not read (repeatable; NAME=DATA names one)",
    )  # fmt: skip
    data.add_argument(
        "-o", "--output", action=Once, metavar="OUT", help="output folder; the run goes to OUT/<model name>"
    )
    data.add_argument("--format", metavar="FORMAT", help="data format, such as zarr (default: by content)")
    data.add_argument(
        "--config-path", metavar="YAML",
        help="experiment file: that of the later training, so that network and normalisation agree",
    )  # fmt: skip
    data.add_argument(
        "--config-file", metavar="YAML", action="append", default=[],
        help="bundle config on top of pretrain.yaml; it is code: declares MONAI objects (repeatable)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-name", metavar="NAME", help=f"name of the run's folder and files (default: {MODEL_NAME})"
    )
    model.add_argument(
        "--patch-size", metavar="Z,Y,X", help="patch in voxels, e.g. 64,64,64 (default: from the data)"
    )
    model.add_argument(
        "--mask-ratio", type=float, metavar="SHARE",
        help="share of a patch that is hidden, 0 to 1 (default: 0.75 in 3D, 0.6 in 2D)",
    )  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch-size", type=int, metavar="N", help="patches per step (default: 2, or what fits a GPU)"
    )
    training.add_argument("--max-epochs", type=int, metavar="N", help="epochs (default: 1000)")
    training.add_argument("--steps-per-epoch", type=int, metavar="N", help="steps per epoch (default: 250)")
    training.add_argument(
        "--time-budget", metavar="TIME",
        help="train for this long, e.g. 35m or 12h: network, patch and steps are chosen to fit (default: no limit)",
    )  # fmt: skip
    training.add_argument(
        "--seed", type=int, metavar="N", help="seed of weights, sampling and hidden blocks (default: 0)"
    )
    training.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="go on from the newest checkpoint of the run, or from FILE",
    )  # fmt: skip
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    machine.add_argument(
        "--amp", choices=("auto", "off", "float16", "bfloat16"), help="mixed precision (default: auto)"
    )
    machine.add_argument(
        "--workers", type=int, metavar="N",
        help="processes that prepare patches (default: cores less 1, at most 8)",
    )  # fmt: skip
    machine.add_argument(
        "--nproc", type=int, default=1, metavar="N",
        help="processes on this machine, one per GPU (default: 1)",
    )  # fmt: skip
    parser.add_argument_group("any setting").add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="any key of any section, e.g. tr_config.pretrain_empty_below=0.2 (repeatable)",
    )  # fmt: skip


def run_pretrain(options: argparse.Namespace) -> int:
    """Pretrain with the given options.

    Args:
        options: the parsed options of `volumen pretrain`.

    Returns:
        Exit code: 0 when the run finished, 130 or 143 when a signal stopped it.

    Raises:
        VolumenError: the options, the experiment file or the data are wrong.
    """
    from volumen.cli.train import (
        bundle_overrides,
        check_early,
        check_overlay,
        experiment_sections,
        run_processes,
    )

    if options.nproc < 1:
        raise VolumenError("--nproc", expected="at least 1", found=options.nproc)
    if options.nproc > 1 and "RANK" not in os.environ:
        return run_processes(options.nproc, options.words)
    sections, origin = experiment_sections(options)
    sections["tr_setup"]["model_name"] = options.model_name or MODEL_NAME
    if options.mask_ratio is not None:
        sections["tr_config"]["pretrain_mask_ratio"] = options.mask_ratio
    check_early(sections, origin)
    overrides = bundle_overrides(options, sections, origin, "pretraining on %s, without labels")
    for overlay in options.config_file:
        check_overlay(overlay, ("train.yaml", "pretrain.yaml"))
    from volumen.run import run_bundle

    return run_bundle("train.yaml", [str(configs_dir() / "pretrain.yaml"), *options.config_file], overrides)
