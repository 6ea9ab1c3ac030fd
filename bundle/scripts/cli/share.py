"""`volumen package` and `volumen export`: convert flags to requests."""

from __future__ import annotations

import argparse
import logging

from volumen.cli.flags import Once
from volumen.utils.terminal.text import by

logger = logging.getLogger(__name__)

EXPORT_FORMATS = ("torchscript", "onnx", "pt2", "bioimageio")


def _add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--checkpoint",
        action=Once,
        metavar="MODEL.pth",
        required=True,
        help="trained network: a .pth file, or a bundle's model.pt",
    )


def add_package_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen package` to a parser."""
    _add_model_argument(parser)
    parser.add_argument(
        "-o", "--output", action=Once, required=True, metavar="NAME.zip", help="the bundle to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle if it is there")
    about = parser.add_argument_group("for the model card")
    about.add_argument("--description", default="", help="what the model does (default: from its targets)")
    about.add_argument("--authors", default="", help="who made it (default: not stated)")
    about.add_argument(
        "--data-license", metavar="TXT", help="licence of the training data (default: said to be not stated)"
    )
    share = parser.add_argument_group("sharing")
    share.add_argument(
        "--hf",
        metavar="USER/NAME",
        help="also push to the Hugging Face Hub, with the token of `hf auth login`",
    )
    share.add_argument(
        "--public", action="store_true", help="make the Hub's repository public (default: private)"
    )
    share.add_argument(
        "--weights-url",
        metavar="URL",
        help="where models/model.pt will lie, for large_files.yml (default: only in the zip)",
    )


def run_package(arguments: argparse.Namespace) -> int:
    """Run `volumen package`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.sharing.package import PackageRequest, package

    report = package(
        PackageRequest(
            checkpoint=arguments.checkpoint,
            output=arguments.output,
            overwrite=arguments.overwrite,
            description=arguments.description,
            authors=arguments.authors,
            data_license=arguments.data_license,
            hf=arguments.hf,
            public=arguments.public,
            weights_url=arguments.weights_url,
        )
    )
    logger.info("%s: %d files, %.1f MB", report.path, report.files, report.size / 1e6)
    if report.url:
        logger.info("pushed to %s", report.url)
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen export` to a parser."""
    _add_model_argument(parser)
    parser.add_argument("--to", required=True, choices=EXPORT_FORMATS, help="format of the file")
    parser.add_argument("-o", "--output", action=Once, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    about = parser.add_argument_group("for the description")
    about.add_argument("--description", default="", help="what the model does (default: from its targets)")
    about.add_argument("--authors", default="", help="who made it (default: not stated)")
    zoo = parser.add_argument_group("with --to bioimageio")
    zoo.add_argument(
        "--sample", metavar="IMAGE", help="its middle becomes the test input (default: smooth noise)"
    )
    zoo.add_argument(
        "--license", default="", metavar="SPDX", help="of the model, such as CC-BY-4.0 (default: not stated)"
    )


def run_export(arguments: argparse.Namespace) -> int:
    """Run `volumen export`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.sharing.export import export

    report = export(
        arguments.checkpoint,
        arguments.output,
        arguments.to,
        overwrite=arguments.overwrite,
        description=arguments.description,
        authors=arguments.authors,
        sample_image=arguments.sample,
        license=arguments.license,
    )
    for one in report.agreement:
        differences = ", ".join(f"{name} {difference:.1e}" for name, difference in one.difference.items())
        logger.info("input %s: differs from the network by %s", by(one.shape), differences)
    logger.info("%s: %s, %.1f MB", report.path, report.to, report.size / 1e6)
    return 0
