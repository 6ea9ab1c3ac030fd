"""Shortened Zstandard frames against whole ones, decoded by the library; frames of several encoders and by hand."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from numcodecs.zstd import Zstd

from volumen.data.formats.zarr_arrays.zstd_frames import BLOCK, first_blocks

RNG = np.random.default_rng(0)
CONTENTS = {
    "noise": lambda size: RNG.integers(0, 256, size, np.uint8).tobytes(),
    "few values": lambda size: RNG.integers(0, 40, size, np.uint8).tobytes(),
    "zeros": bytes,
    "repeats": lambda size: (b"abc" * size)[:size],
    "mixed": lambda size: (bytes(BLOCK) + RNG.integers(0, 9, size, np.uint8).tobytes())[:size],
}
ENCODERS = {
    "numcodecs": lambda data: Zstd(level=3).encode(data),
    "numcodecs fast": lambda data: Zstd(level=-3).encode(data),
    "numcodecs high": lambda data: Zstd(level=19).encode(data),
    "imagecodecs": lambda data: imagecodecs.zstd_encode(data, 5),
}


def frame_of(*blocks: bytes, size: int, single: bool = True, window: int = 10, eighths: int = 0) -> bytes:
    """Build a frame of raw blocks as RFC 8878 says."""
    header = b"\x28\xb5\x2f\xfd" + (b"\xa0" if single else bytes((0x80, window - 10 << 3 | eighths)))
    body = b""
    for number, block in enumerate(blocks):
        body += (len(block) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") + block
    return header + size.to_bytes(4, "little") + body


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_shortened_frame_decodes_to_the_beginning(content, encoder):
    shortened = 0
    for size in (2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1, 5 * BLOCK + 777):
        data = CONTENTS[content](size)
        frame = ENCODERS[encoder](data)
        for wanted in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, size - BLOCK - 1, size - 1, size):
            short = first_blocks(memoryview(frame), size, wanted)
            if short is None:
                continue
            shortened += 1
            assert len(short) < len(frame)
            found = bytes(Zstd().decode(short))
            assert wanted <= len(found) < size
            assert found == data[: len(found)]
    if encoder != "numcodecs high":  # which splits blocks, so that nobody knows what they hold
        assert shortened >= 10


def test_what_is_not_needed_as_a_whole_only():
    data = CONTENTS["few values"](3 * BLOCK)
    frame = Zstd().encode(data)
    assert first_blocks(frame, len(data), BLOCK) is not None
    assert first_blocks(frame, len(data), 2 * BLOCK + 1) is None
    assert first_blocks(Zstd().encode(data[:BLOCK]), BLOCK, 1) is None
    assert first_blocks(Zstd().encode(b"x"), 1, 1) is None


def test_only_plain_sound_frames_are_shortened():
    data = CONTENTS["few values"](2 * BLOCK)
    frame = Zstd().encode(data)
    assert first_blocks(Zstd(checksum=True).encode(data), len(data), 1) is None
    assert first_blocks(frame, len(data) + 1, 1) is None
    assert first_blocks(frame + b"\0", len(data), 1) is None
    assert first_blocks(frame + frame, len(data), 1) is None
    assert all(
        first_blocks(frame[:end], len(data), 1) is None for end in (*range(40), *range(41, len(frame), 501))
    )
    assert first_blocks(b"\0" + frame[1:], len(data), 1) is None
    assert first_blocks(imagecodecs.blosc_encode(data), len(data), 1) is None


def test_frames_by_hand():
    noise = CONTENTS["noise"](2 * BLOCK)
    whole = frame_of(noise[:BLOCK], noise[BLOCK:], size=2 * BLOCK)
    assert bytes(Zstd().decode(first_blocks(whole, 2 * BLOCK, 5))) == noise[:BLOCK]
    windowed = frame_of(noise[:BLOCK], noise[BLOCK:], size=2 * BLOCK, single=False, window=17)
    assert bytes(Zstd().decode(first_blocks(windowed, 2 * BLOCK, 5))) == noise[:BLOCK]
    # Blocks are no larger than the window; and an empty one at the end is one more.
    assert first_blocks(frame_of(*[noise[:1024]] * 256, size=2 * BLOCK, single=False), 2 * BLOCK, 5) is None
    assert first_blocks(frame_of(noise[:BLOCK], noise[BLOCK:], b"", size=2 * BLOCK), 2 * BLOCK, 5) is None
    # 120 KiB each, in a window of as much: two blocks, as many as of 128 KiB, but not these.
    shorter = [noise[:122_880], noise[122_880:245_760]]
    frame = frame_of(*shorter, size=245_760, single=False, window=16, eighths=7)
    assert bytes(Zstd().decode(frame)) == noise[:245_760]
    assert first_blocks(frame, 245_760, 5) is None
    # Nobody can tell that the first block is not full but the decoder, which refuses.
    uneven = frame_of(noise[:1000], noise[1000:BLOCK], size=BLOCK + 1)
    with pytest.raises(RuntimeError):
        Zstd().decode(first_blocks(uneven, BLOCK + 1, 5))


def test_noise_instead_of_frames_never_fails():
    for number in range(300):
        frame = bytearray(Zstd().encode(bytes(3 * BLOCK)) + RNG.integers(0, 256, 40, np.uint8).tobytes())
        for place in RNG.integers(4, len(frame), 3):
            frame[place] = RNG.integers(0, 256)
        short = first_blocks(bytes(frame), 3 * BLOCK, number * 1000)
        assert short is None or len(short) < len(frame)
