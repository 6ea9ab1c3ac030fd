"""Volumes, cases and locations in memory, for tests of the patch transforms."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import gaussian_filter


class RecordingVolume:
    """A volume in memory that refuses to be read outside `allowed` and remembers what was read.

    Args:
        array: (*spatial) or (C, *spatial) with `channels`.
        channels: the first axis holds channels.
        allowed: (start, stop) per axis.
    """

    def __init__(self, array, *, channels=False, allowed=None, path="memory", chunk=16):
        self.data = np.asarray(array) if channels else np.asarray(array)[None]
        self.shape = self.data.shape[1:]
        self.channels = len(self.data)
        self.dtype = self.data.dtype
        self.chunks = tuple(min(chunk, size) for size in self.shape)
        self.spacing = None
        self.path = path
        self.allowed = allowed or tuple((0, size) for size in self.shape)
        self.regions = []

    def read(self, region):
        for span, (start, stop) in zip(region, self.allowed, strict=True):
            assert span.step is None
            assert start <= span.start < span.stop <= stop, f"{region} leaves {self.allowed}"
        self.regions.append(region)
        return self.data[(slice(None), *region)]


@dataclass
class StubCase:
    """What `OpenCase` offers."""

    image: RecordingVolume
    labels: dict = field(default_factory=dict)
    masks: dict = field(default_factory=dict)
    spacing: tuple = (1.0, 1.0, 1.0)
    name: str = "case"


@dataclass(frozen=True)
class StubLocation:
    """What `PatchLocation` offers."""

    start: tuple
    size: tuple
    bounds: tuple
    case: int = 0


def case_of(image, labels=None, masks=None, *, channels=False, spacing=None, allowed=None):
    """A case over arrays (*spatial), or (C, *spatial) for the image with `channels`."""
    ndim = np.ndim(image) - int(channels)
    return StubCase(
        RecordingVolume(image, channels=channels, allowed=allowed),
        {name: RecordingVolume(array, allowed=allowed) for name, array in (labels or {}).items()},
        {name: RecordingVolume(array, allowed=allowed) for name, array in (masks or {}).items()},
        spacing or (1.0,) * ndim,
    )


def sample_of(case, start, size, *, bounds=None, spatial=None):
    """A sample as the data set hands it to the transforms."""
    bounds = bounds or tuple((0, extent) for extent in case.image.shape)
    sample = {"case": case, "location": StubLocation(tuple(start), tuple(size), tuple(bounds))}
    if spatial is not None:
        sample["spatial"] = spatial
    return sample


def smooth(shape, seed=0, sigma=2.0):
    """A smooth random float32 image in [0, 1]."""
    image = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma).astype(np.float32)
    return (image - image.min()) / (image.max() - image.min())
