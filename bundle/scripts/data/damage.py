"""Finds stored data that cannot be read, before a training or a prediction needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from volumen.data.formats.volumes import Region, Volume
from volumen.data.index.label_values import storage_blocks, stored_regions
from volumen.utils.boxes import box_of, box_text
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.progress import hidden
from volumen.utils.threads import in_threads

# Errors that reading may raise: ours, those of the system, and those of a library that cannot decode the content.
UNREADABLE = (VolumenError, OSError, ValueError, RuntimeError)


class Damage(NamedTuple):
    """A part of a volume that cannot be read.

    Attributes:
        path: path of the volume.
        region: the part, in voxels.
        reason: message of the error that reading it raised, in one line.
    """

    path: str
    region: Region
    reason: str

    def __str__(self) -> str:
        """Return one readable line."""
        if self.path in self.reason:
            return self.reason
        return f"{self.path}: voxels {box_text(box_of(self.region))}: {self.reason}"


def find_damage(volumes: Sequence[Volume], *, num_threads: int = 1, progress: bool = False) -> list[Damage]:
    """Read every stored block of some volumes once, and return the parts that cannot be read.

    A chunk that is not stored holds the fill value and is not damage. A damaged part is as small as the storage
    allows: one chunk of a zarr array, one page or tile of a TIFF.

    Args:
        volumes: opened volumes.
        num_threads: threads that read.
        progress: show a progress bar.

    Returns:
        The parts, in the order of the volumes and of their voxels.
    """
    from tqdm import tqdm

    stored = [stored_regions(volume)[0] for volume in volumes]
    total = sum(len(regions) for regions in stored)
    blocks = ((number, region) for number, regions in enumerate(stored) for region in regions)

    def read(block: tuple[int, Region]) -> list[tuple[int, Damage]]:
        number, region = block
        return [(number, damage) for damage in _damage_in(volumes[number], region)]

    found: list[tuple[int, Damage]] = []
    with tqdm(total=total, desc="reading", unit="block", disable=hidden(progress), leave=False) as bar:
        for damaged in in_threads(read, blocks, num_threads):
            found += damaged
            bar.update()
    return [damage for _, damage in sorted(found, key=lambda entry: (entry[0], box_of(entry[1].region)))]


def _damage_in(volume: Volume, region: Region) -> Iterator[Damage]:
    """Yield the chunks that cannot be read of a part of a volume; the part begins at the border of a chunk."""
    try:
        volume.read(region)
        return
    except UNREADABLE:
        pass
    for chunk in storage_blocks(tuple(part.stop - part.start for part in region), volume.chunks, voxels=1):
        here = tuple(slice(c.start + part.start, c.stop + part.start) for c, part in zip(chunk, region))
        try:
            volume.read(here)
        except UNREADABLE as error:
            yield Damage(str(volume.path), here, " ".join(str(error).split()))
