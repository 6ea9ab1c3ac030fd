"""`volumen instances`: flags in, the instances of an edited prediction out."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def add_instances_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen instances` to a parser."""
    parser.add_argument(
        "prediction", metavar="NAME.zarr", help="prediction with instances, whose heads were edited"
    )
    parser.add_argument(
        "--edited",
        metavar="Z:Z,Y:Y,X:X",
        help="region that was edited, in voxels of the prediction (default: the chunks that were written since "
        "the last call)",
    )
    parser.add_argument(
        "--agglomerates",
        metavar="OUT.webknossos",
        help="also write a WEBKNOSSOS dataset: the regions that instances consist of, and an agglomerate file that "
        "joins them (default: none)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="threads that compute blocks (default: 1)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the instances of the prediction; always needed"
    )


def run_instances(arguments: argparse.Namespace) -> int:
    """Run `volumen instances`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.cli.flags import open_box
    from volumen.inference.edited_instances import update_instances

    if not arguments.overwrite:
        raise VolumenError(
            "--overwrite",
            f"the instances in {arguments.prediction} are replaced, with all corrections made in them",
            remedy="add --overwrite",
        )
    if arguments.workers < 1:
        raise VolumenError("--workers", expected="at least 1", found=arguments.workers)
    edited = None if arguments.edited is None else open_box(arguments.edited, "--edited")
    found = update_instances(
        Path(arguments.prediction),
        edited,
        agglomerates=None if arguments.agglomerates is None else Path(arguments.agglomerates),
        workers=arguments.workers,
    )
    if found.changed is None:
        done = "all blocks computed"
    else:
        done = f"{len(found.changed)} changed regions" if found.changed else "nothing had changed"
    logger.info("%s: %s, %d instances; %s", arguments.prediction, found.name, found.instances, done)
    return 0
