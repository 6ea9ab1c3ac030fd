"""`volumen mesh`: flags in, files of meshes out."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen mesh` to a parser."""
    parser.add_argument(
        "volume", metavar="VOLUME", help="labels or instances, or probabilities with --threshold"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="folder for the files, NUMBER.ply; with --format precomputed the folder of the segmentation",
    )
    parser.add_argument("--ids", metavar="N,N", help="objects to mesh (default: all, at most 20000)")
    parser.add_argument(
        "--threshold", type=float, metavar="V", help="mesh the surface of what is at least this stored value"
    )
    parser.add_argument(
        "--format", choices=("ply", "obj", "precomputed"), default="ply", help="format (default: ply)"
    )
    parser.add_argument("--level", type=int, default=0, metavar="N", help="level of the volume (default: 0)")


def run_mesh(arguments: argparse.Namespace) -> int:
    """Run `volumen mesh`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.data.formats.opening import open_volume
    from volumen.viewing.mesh_files import write_meshes
    from volumen.viewing.meshes import Meshes

    volume = open_volume(arguments.volume, level=arguments.level, labels=arguments.threshold is None)
    with Meshes(volume, _ids(arguments.ids), arguments.threshold) as meshes:
        files = write_meshes(meshes, volume, Path(arguments.output), arguments.format)
    logger.info("%s: %d meshes", arguments.output, len(files))
    return 0


def _ids(text: str | None) -> set[int] | None:
    if text is None:
        return None
    try:
        return {int(part) for part in text.split(",")}
    except ValueError:
        raise VolumenError("--ids", expected="numbers, by commas", found=repr(text)) from None
