"""Compares the free disk space with the size of a prediction, and names a remedy when a disk is full."""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from volumen.inference.volume_work import VolumeWork
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


@contextmanager
def telling_of_full_disk(where: str) -> Iterator[None]:
    """Turn the error of a full disk into one that names a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise VolumenError(
            where,
            "no space left on the disk",
            remedy="make room and give the same command: it goes on from here",
        ) from error


def check_space(output: Path, work: VolumeWork, share: float = 1.0) -> None:
    """Compare the free space with the size of the output.

    Args:
        output: folder of the output.
        work: the volume's prediction.
        share: share of the blocks that are not empty.

    Raises:
        VolumenError: not even a fifth of the uncompressed size is free.
    """
    voxels = math.prod(work.plan.output_shape)
    needed = sum(s.channels * s.dtype.itemsize * voxels for s in work.stored) * 8 / 7 * share
    if work.grid_plan is not None:
        grid = math.prod(work.grid_plan.output_shape)
        needed += sum(4 * s.head.blended_channels * grid for s in work.stored)
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed / 5:
        raise VolumenError(
            folder,
            expected=f"{_size_text(needed / 5)} to {_size_text(needed)} of free space",
            found=_size_text(free),
            remedy="make room, predict fewer targets, or a --region",
        )
    if free < needed:
        logger.warning(
            "%s: %s free for up to %s before compression", folder, _size_text(free), _size_text(needed)
        )


def _size_text(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
