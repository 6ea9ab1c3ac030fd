"""`volumen package` and `volumen export`: convert flags to requests."""

from __future__ import annotations

import argparse
import logging

from volumen.cli.flags import add_field_flags, given_fields
from volumen.sharing.request import ABOUT, BIOIMAGEIO, CARD, SHARING, ExportRequest, PackageRequest
from volumen.utils.terminal.text import by

logger = logging.getLogger(__name__)


def add_package_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen package` to a parser: one for each field of `PackageRequest`."""
    add_field_flags(parser, PackageRequest, (CARD, SHARING))


def run_package(arguments: argparse.Namespace) -> int:
    """Run `volumen package`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.sharing.package import package

    report = package(PackageRequest(**given_fields(arguments, PackageRequest)))
    logger.info("%s: %d files, %.1f MB", report.path, report.files, report.size / 1e6)
    if report.url:
        logger.info("pushed to %s", report.url)
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen export` to a parser: one for each field of `ExportRequest`."""
    add_field_flags(parser, ExportRequest, (ABOUT, BIOIMAGEIO))


def run_export(arguments: argparse.Namespace) -> int:
    """Run `volumen export`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.sharing.export import export

    given = given_fields(arguments, ExportRequest)
    report = export(sample_image=given.pop("sample", None), **given)
    for one in report.agreement:
        differences = ", ".join(f"{name} {difference:.1e}" for name, difference in one.difference.items())
        logger.info("input %s: differs from the network by %s", by(one.shape), differences)
    logger.info("%s: %s, %.1f MB", report.path, report.to, report.size / 1e6)
    return 0
