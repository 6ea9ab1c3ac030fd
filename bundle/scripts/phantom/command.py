"""The command line of `python -m volumen.phantom`."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from volumen.phantom.volume import MASKS, PARTS, check_new, write_phantom
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of phantom.

    Args:
        about: what it shows, for the help.
        size: voxels if none are stated; empty if the size follows from the kind.
        axes: numbers of axes that it may have.
        smallest: voxels along each axis, at least.
        write: writes it, from folder, shape and parsed flags.
    """

    about: str
    size: str
    axes: tuple[int, ...]
    smallest: int
    write: Callable[[Path, tuple[int, ...], argparse.Namespace], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a phantom from the command line; return the exit code."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder, kind = Path(given.output), KINDS[given.kind]
    try:
        shape = _shape(given, kind)
        check_new(folder)
        try:
            kind.write(folder, shape, given)
        except BaseException:
            for name in PARTS:
                shutil.rmtree(folder / name, ignore_errors=True)
            raise
    except (VolumenError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m volumen.phantom",
        description="Write a data set that is computed: images, labels, and further ones in heldout/ for scoring.",
    )
    kinds = "; ".join(f"{name}: {kind.about}" for name, kind in KINDS.items())
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--kind", choices=KINDS, default="sheets", help=f"{kinds} (default: sheets)")
    sizes = ", ".join(f"{kind.size} for {name}" for name, kind in KINDS.items() if kind.size)
    parser.add_argument(
        "--size", help=f"voxels, one number, Z,Y,X, or Y,X for nuclei in 2D (default: {sizes})"
    )
    parser.add_argument("--seed", type=int, default=0, help="another number, other data (default: 0)")
    parser.add_argument(
        "--images", type=int, default=6, help="number of images of nuclei, of scans of organs (default: 6)"
    )
    parser.add_argument(
        "--noise", type=float, default=0.10, help="of sheets: 0 is none, 0.2 is hard (default: 0.10)"
    )
    parser.add_argument(
        "--labelled",
        choices=tuple(MASKS),
        default="slabs",
        help="of sheets: two slabs, 5 of every 16 slices, or all (default: slabs)",
    )
    return parser


def _shape(given: argparse.Namespace, kind: Kind) -> tuple[int, ...]:
    if not kind.size:
        if given.size is not None:
            raise VolumenError("--size", f"does not apply to {given.kind}", remedy="leave it out")
        return ()
    sizes = [int(voxels) for voxels in (given.size or kind.size).split(",")]
    shape = tuple(sizes * 3 if len(sizes) == 1 else sizes)
    if len(shape) not in kind.axes or min(shape) < kind.smallest:
        axes = " or ".join(str(number) for number in kind.axes)
        raise VolumenError(
            "--size", expected=f"{axes} axes of at least {kind.smallest} voxels", found=given.size
        )
    if given.images < 1:
        raise VolumenError("--images", expected="at least 1", found=given.images)
    return shape


def _write_sheets(folder: Path, shape: tuple[int, ...], given: argparse.Namespace) -> None:
    write_phantom(folder, shape, given.seed, noise=given.noise, labelled=given.labelled)


def _write_neurons(folder: Path, shape: tuple[int, ...], given: argparse.Namespace) -> None:
    from volumen.phantom.neurons import write_neurons

    write_neurons(folder, (shape[0], shape[1], shape[2]), given.seed)


def _write_nuclei(folder: Path, shape: tuple[int, ...], given: argparse.Namespace) -> None:
    from volumen.phantom.nuclei import write_nuclei

    write_nuclei(folder, shape, given.seed, images=given.images, heldout=max(1, given.images // 3))


def _write_organs(folder: Path, shape: tuple[int, ...], given: argparse.Namespace) -> None:
    from volumen.phantom.organ import write_organs

    write_organs(folder, given.seed, patients=given.images, heldout=max(1, given.images // 3))


KINDS = {
    "sheets": Kind(
        "a scan of a rolled sheet, sparse labels, and its exact geometry", "192", (3,), 48, _write_sheets
    ),
    "neurons": Kind("electron microscopy of numbered neurites", "48,128,128", (3,), 32, _write_neurons),
    "nuclei": Kind("fluorescence of numbered nuclei, in 2D or 3D", "160,160", (2, 3), 16, _write_nuclei),
    "organs": Kind(
        "computed tomography of the abdomen, NIfTI, several voxel sizes", "", (), 0, _write_organs
    ),
}
