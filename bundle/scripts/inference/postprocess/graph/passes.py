"""Orders the passes between fragments, so that every flooding has one result.

A pass is the height over which water flows from one fragment to another. Of equal heights the face that comes first in
the volume is the lower pass. No two passes are equal then, so that the minimum spanning forest is unique, and can be
computed in parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from volumen.utils.errors import VolumenError

FACE_BITS = 46
"""Bits of the number of a face. The height lies above them and has 17 bits: up to 65535, or 65536 plus the wall where
affinities state one between two voxels."""
NO_PASS = (1 << 63) - 1
"""Above all passes: of fragments that do not touch."""


def check_faces(shape: Sequence[int]) -> None:
    """Check that the faces of a volume can be numbered.

    Raises:
        VolumenError: it has too many voxels.
    """
    most = ((1 << FACE_BITS) - 1) // 3
    if math.prod(shape) > most:
        raise VolumenError(
            "--instances",
            expected=f"a volume of at most {most} voxels",
            found="x".join(map(str, shape)),
            remedy="predict parts by --region",
        )
