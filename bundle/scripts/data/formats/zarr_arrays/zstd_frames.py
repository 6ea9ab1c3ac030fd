"""The first blocks of a Zstandard frame as a frame of their own, so that the rest need not be decoded."""

from __future__ import annotations

from typing import Any

BLOCK = 128 * 1024
"""Most bytes that a block decodes to; encoders fill all but the last, unless they split blocks."""

_MAGIC = b"\x28\xb5\x2f\xfd"
_SINGLE_SEGMENT = 0x20
_RLE, _RESERVED = 1, 3
_BLOCK_LOG = 17


def first_blocks(frame: Any, size: int, wanted: int) -> bytes | None:
    """Return a frame of whole blocks that decodes to at least the first `wanted` bytes of a frame, and not to all.

    Blocks are only counted, not decoded, so a decoder may still find that the frame holds less than it says; that is
    the case where the encoder filled blocks unevenly (RFC 8878, section 3.1.1).

    Args:
        frame: bytes or a memory view of them.
        size: what the whole frame decodes to, in bytes.
        wanted: how many of them are needed.

    Returns:
        None where the whole frame has to be decoded: nothing can be left out, it has a checksum, is cut off, is
        followed by something else, or does not say its size.
    """
    count = -(-size // BLOCK)
    kept = max(-(-wanted // BLOCK), 1)
    if kept >= count or len(frame) < 16 or bytes(frame[:4]) != _MAGIC:
        return None
    descriptor = frame[4]
    # The flags of a size of 4 or 8 bytes; a checksum, a dictionary and the reserved bit must be absent.
    width = {2: 4, 3: 8}.get(descriptor >> 6)
    if width is None or descriptor & 0x0F:
        return None
    start = 5 if descriptor & _SINGLE_SEGMENT else 6
    if start == 6 and frame[5] >> 3 < _BLOCK_LOG - 10:
        return None  # with a window smaller than a block, blocks are smaller too
    if int.from_bytes(frame[start : start + width], "little") != size:
        return None
    ends = _block_ends(frame, start + width)
    if ends is None or len(ends) != count or ends[-1] != len(frame):
        return None
    last = ends[kept - 2] if kept > 1 else start + width
    return b"".join(
        (
            frame[:start],
            (kept * BLOCK).to_bytes(width, "little"),
            frame[start + width : last],
            bytes((frame[last] | 1,)),
            frame[last + 1 : ends[kept - 1]],
        )
    )


def _block_ends(frame: Any, place: int) -> list[int] | None:
    """Return where each block ends, None where there is no last one."""
    ends: list[int] = []
    while place + 3 <= len(frame):
        header = frame[place] | frame[place + 1] << 8 | frame[place + 2] << 16
        kind = header >> 1 & 3
        if kind == _RESERVED:
            return None
        place += 3 + (1 if kind == _RLE else header >> 3)
        ends.append(place)
        if header & 1:
            return ends
    return None
