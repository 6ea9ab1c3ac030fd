"""Images whose channels lie in files of their own, such as nnU-Net's CASE_0000.nii.gz, CASE_0001.nii.gz.

The path of such an image names all files at once, the differing part in braces: CASE_{0000,0001}.nii.gz.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumen.data.formats.volumes import HasGeometry, Region, Volume, describe_volume
from volumen.utils.errors import VolumenError

_BRACES = re.compile(r"(.*)\{([^{}]*,[^{}]*)\}([^{}]*)", re.DOTALL)


def joined_path(paths: Sequence[str]) -> str:
    """Return one path for several files: what they have in common, and what differs in braces."""
    if len(paths) == 1:
        return paths[0]
    start = _common_start(paths)
    end = _common_start([path[len(start) :][::-1] for path in paths])[::-1]
    middle = [path[len(start) : len(path) - len(end)] for path in paths]
    # Digits that all share are part of the number: 0000 and 0001, not 000{0,1}.
    shared = re.search(r"\d*$", start)
    digits = shared[0] if shared and all(part[:1].isdigit() for part in middle) else ""
    start = start[: len(start) - len(digits)]
    return f"{start}{{{','.join(digits + part for part in middle)}}}{end}"


def _common_start(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)
    same = next((place for place, (a, b) in enumerate(zip(least, most)) if a != b), len(least))
    return least[:same]


def channel_paths(path: str | os.PathLike) -> list[str]:
    """Return the files that a path names; one for an ordinary path, whatever its name."""
    text = os.fspath(path)
    match = _BRACES.fullmatch(text)
    if match is None or Path(text).exists():
        return [text]
    return [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")]


def name_without_channels(name: str) -> str:
    """Return the name of an image without the part in braces: CASE of CASE_{0000,0001}."""
    match = _BRACES.fullmatch(name)
    return name if match is None else (match[1].rstrip("_-.") + match[3]) or name


class ChannelFiles(HasGeometry):
    """An image whose channels are read from several volumes of the same shape.

    Args:
        path: names all files, see `joined_path`.
        volumes: the opened files, in the order of the channels.

    Raises:
        VolumenError: the files differ in shape.
    """

    def __init__(self, path: str, volumes: Sequence[Volume]) -> None:
        self.volumes = list(volumes)
        first = self.volumes[0]
        for volume in self.volumes[1:]:
            if tuple(volume.shape) != tuple(first.shape):
                raise VolumenError(
                    volume.path,
                    expected=f"shape {tuple(first.shape)} of {first.path}, the first channel",
                    found=f"{tuple(volume.shape)}",
                    remedy="resample it to the same grid",
                )
        self.path = self.source = path
        self.shape, self.chunks = tuple(first.shape), tuple(first.chunks)
        self.channels = sum(volume.channels for volume in self.volumes)
        self.dtype = np.result_type(*(volume.dtype for volume in self.volumes))
        self.geometry, self.affine = first.geometry, first.affine

    def __repr__(self) -> str:
        return describe_volume(self)

    def fingerprint(self) -> str:
        """Return a hash of all files."""
        from volumen.data.caching.fingerprints import digest

        return digest([volume.fingerprint() for volume in self.volumes])

    def read(self, region: Region) -> np.ndarray:
        return np.concatenate([volume.read(region).astype(self.dtype, copy=False) for volume in self.volumes])
