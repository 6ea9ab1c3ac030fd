"""Reads whole images into memory, for programs that call the bundle's transforms, network and inferer themselves.

MONAI Label and the MONAI Deploy App SDK take `preprocessing`, `network_def`, `inferer` and `postprocessing` from
`inference.yaml` and pass one image through them. Their arrays have the axis order of NIfTI, (C, X, Y, Z); the network
expects (C, Z, Y, X). `ReadVolumed` reverses the axes of images, and `monai_order` reverses those of results.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from volumen.data.formats.volumes import ArrayVolume
from volumen.data.resampled import ResampledVolume
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.resampling import Resampling
from volumen.inference.resampling import (
    check_resampled,
    length_factor,
    on_stored_grid,
    resampling_to_training,
)
from volumen.utils.device_memory import main_memory
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.predictor import Predictor
    from volumen.inference.windows.heads import Head

REVERSED = "spatial_axes_reversed"
"""Key in an image's `meta`: its axes run in the opposite order to its `original_affine` and `spatial_shape`."""
UNIT = "spacing_unit"
"""In an image's `meta`: the unit of its voxel size, or None; absent where its file states no voxel size."""
_STORED_GRID = "stored_grid"
_NO_CHANNEL = "no_channel"


class ReadVolumed(MapTransform):
    """Read whole images as `MetaTensor`s (C, Z, Y, X) or (C, Y, X) of the stored type.

    A path may have any supported format. An array or tensor must have MONAI's axis order, as its loaders and the
    Deploy SDK return it: (X, Y, Z), with a channel axis where `meta["original_channel_dim"]` states it, else the last.
    A volume that is already open stays on disk, for a streamed prediction.

    The result's `affine` belongs to its own axes. In its `meta`, `spatial_shape` and `original_affine` belong to the
    axes X, Y, Z, so that reversed results have the place of the image.

    Args:
        keys: keys of the images in a sample.
        spatial_dims: 2 or 3.
        outputs: channels of the network's output, to estimate the memory of a prediction.
        allow_missing_keys: whether samples may lack an image.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        spatial_dims: int = 3,
        outputs: int = 1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_dims = spatial_dims
        self.outputs = outputs

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the images of a sample.

        Raises:
            VolumenError: an image is unreadable, has other dimensions than the network, or does not fit in memory.
        """
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = self._read(sample[key], str(key))
        return sample

    def _read(self, image: Any, key: str) -> Any:
        if isinstance(image, str | os.PathLike):
            return self._from_file(image)
        if isinstance(image, np.ndarray | Tensor):
            return self._from_array(image, key)
        return image

    def _from_file(self, path: str | os.PathLike) -> MetaTensor:
        from volumen.data.formats.opening import open_volume

        volume = open_volume(path)
        self._check_dims(len(volume.shape), volume.path)
        check_memory(volume.path, volume.shape, volume.channels + self.outputs)
        array = volume.read(tuple(slice(0, size) for size in volume.shape))
        stated = {} if volume.spacing is None else {UNIT: volume.unit}
        return with_meta(array, {"filename_or_obj": volume.path, **stated}, affine_of(volume))

    def _from_array(self, image: np.ndarray | Tensor, key: str) -> MetaTensor:
        meta = dict(image.meta) if isinstance(image, MetaTensor) else {}
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
        channel = _channel_axis(meta.get("original_channel_dim"), array.ndim, self.spatial_dims)
        array = array[None] if channel is None else np.moveaxis(array, channel, 0)
        self._check_dims(array.ndim - 1, key)
        affine = meta.get("original_affine")
        if affine is None and isinstance(image, MetaTensor):
            affine = image.affine
        return with_meta(
            reverse_axes(array), meta, None if affine is None else np.asarray(affine, dtype=np.float64)
        )

    def _check_dims(self, found: int, where: str) -> None:
        if found != self.spatial_dims:
            raise VolumenError(
                where, expected=f"a {self.spatial_dims}D image, as the network's", found=f"{found}D"
            )


class ResampleToTrainingd(MapTransform):
    """Resample normalised images to the voxel size of the training, where the network was trained at one size.

    The postprocessing brings the outputs back to the voxels of the image, see `to_stored_grid`. An opened volume is
    left as it is: streamed prediction resamples it while it is read.

    Args:
        predictor: the network.
        keys: of the images in a sample.
        allow_missing_keys: whether samples may lack an image.
    """

    def __init__(
        self, predictor: Predictor, keys: KeysCollection = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.predictor = predictor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample the images of a sample.

        Raises:
            VolumenError: a voxel size of another unit, or a target whose channels count voxels.
        """
        sample = dict(data)
        for key in self.key_iterator(sample):
            if isinstance(sample[key], MetaTensor):
                sample[key] = self._resampled(sample[key])
        return sample

    def _resampled(self, image: MetaTensor) -> MetaTensor:
        volume = ArrayVolume(
            image.detach().cpu().numpy(),
            axes="c" + "zyx"[-(image.ndim - 1) :],
            geometry=_geometry_of(image),
            path=str(image.meta.get("filename_or_obj", "image")),
        )
        trained = self.predictor.trained_grid
        grid = resampling_to_training(trained, volume)
        if grid is None or trained is None:
            return image
        check_resampled(volume, self.predictor.heads())
        view = ResampledVolume(volume, grid)
        values = view.read(tuple(slice(0, size) for size in view.shape))
        kept = {name: value for name, value in image.meta.items() if name != "affine"}
        spacing = list(trained.spacing_of(volume) or ())
        stored = {"shape": list(grid.shape), "step": list(grid.step), "spacing": spacing}
        meta = {**kept, _STORED_GRID: stored}
        return MetaTensor(torch.from_numpy(values), affine=image.affine, meta=meta)


def _geometry_of(image: MetaTensor) -> Geometry:
    """Return the voxel size of an image (C, *space) from its affine, whose first column is that of its first axis."""
    spatial = image.ndim - 1
    matrix = np.asarray(image.affine, dtype=np.float64)
    # The matrix of the file's own order of axes is the identity where nothing was stated.
    stored = np.asarray(image.meta.get("original_affine", matrix), dtype=np.float64)
    if UNIT not in image.meta and np.array_equal(stored, np.eye(len(stored))):
        return Geometry()
    return stated_geometry(np.linalg.norm(matrix[:spatial, :spatial], axis=0).tolist(), image.meta.get(UNIT))


def to_stored_grid(blend: Tensor, head: Head, image: Any) -> Tensor:
    """Return blended values (channels, *space) at the voxels of the image that was resampled for them.

    Args:
        blend: blended values of a head, before the activation.
        head: the head.
        image: the result of `ResampleToTrainingd`; for any other image the values stay as they are.
    """
    said = (getattr(image, "meta", None) or {}).get(_STORED_GRID)
    if said is None:
        return blend
    grid = Resampling(tuple(said["shape"]), tuple(said["step"]))
    region = tuple(slice(0, size) for size in grid.shape)
    values = on_stored_grid(blend.detach().cpu().numpy(), grid, region)
    if head.kind == "distance":
        values *= np.float32(length_factor(grid, said["spacing"]))
    return torch.from_numpy(values)


def with_meta(array: np.ndarray, meta: Mapping[str, Any], affine: np.ndarray | None) -> MetaTensor:
    """Return an image with the metadata that MONAI's tools require.

    Args:
        array: (C, Z, Y, X) or (C, Y, X).
        meta: more entries.
        affine: affine of the axes X, Y(, Z); None: unknown, voxel size 1.
    """
    spatial = array.ndim - 1
    original = np.eye(spatial + 1) if affine is None else affine
    entries = {
        **{name: value for name, value in meta.items() if name != "affine"},
        "original_affine": original,
        "spatial_shape": np.asarray(array.shape[:0:-1]),
        "original_channel_dim": _NO_CHANNEL if len(array) == 1 else 0,
        REVERSED: True,
    }
    return MetaTensor(
        torch.from_numpy(np.ascontiguousarray(array)),
        affine=torch.from_numpy(reverse_columns(original, spatial)),
        meta=entries,
    )


def monai_order(result: np.ndarray, image: Any) -> Tensor:
    """Return a result (K, Z, Y, X) in the axis order of its image, as MONAI's tools expect it.

    Args:
        result: a prediction.
        image: the image from `ReadVolumed` that was predicted; for any other object the order does not change.

    Returns:
        A `MetaTensor` (K, X, Y, Z) with the image's affine, or a tensor.
    """
    meta = getattr(image, "meta", None) or {}
    if not meta.get(REVERSED):
        return torch.from_numpy(np.ascontiguousarray(result))
    copied = {
        name: meta[name] for name in ("filename_or_obj", "original_affine", "spatial_shape") if name in meta
    }
    return MetaTensor(
        torch.from_numpy(reverse_axes(result)),
        affine=torch.as_tensor(np.asarray(meta["original_affine"])),
        meta={**copied, "original_channel_dim": 0},
    )


def reverse_axes(array: np.ndarray) -> np.ndarray:
    """Return (C, X, Y, Z) for (C, Z, Y, X), and the other way round."""
    return np.ascontiguousarray(array.transpose(0, *range(array.ndim - 1, 0, -1)))


def reverse_columns(affine: np.ndarray, spatial: int) -> np.ndarray:
    """Return the affine of the first `spatial` axes in the opposite order."""
    turned = np.array(affine, dtype=np.float64)
    turned[:, :spatial] = turned[:, :spatial][:, ::-1]
    return turned


def affine_of(volume: Volume) -> np.ndarray | None:
    """Return the affine of a volume over (X, Y, Z): the file's, else from its voxel size; None if it states neither."""
    if volume.affine is not None and len(volume.shape) == 3:
        return np.asarray(volume.affine, dtype=np.float64)
    if volume.spacing is None:
        return None
    return np.diag([*volume.spacing[::-1], 1.0])


def check_memory(where: str, shape: tuple[int, ...], channels: int) -> None:
    """Refuse an image if its prediction does not fit in this machine's memory.

    Args:
        where: name of the image.
        shape: its spatial shape.
        channels: channels of the image and of the network's outputs together, as float32.

    Raises:
        VolumenError: states the memory needed and the memory available.
    """
    needed, free = 4 * channels * int(np.prod(shape, dtype=np.int64)), main_memory()
    if free is not None and needed > free:
        raise VolumenError(
            where,
            "is too large to be predicted in memory",
            expected=f"{free / 2**30:.1f} GiB or less",
            found=f"{needed / 2**30:.1f} GiB",
            remedy="predict it with volumen predict, or with run of this config, which stream it",
        )


def _channel_axis(stated: Any, ndim: int, spatial_dims: int) -> int | None:
    """Return the channel axis of an array; None if it has none."""
    if ndim <= spatial_dims or stated == _NO_CHANNEL:
        return None
    # MONAI writes NaN if a reader found no channel axis.
    return int(stated) if stated is not None and np.isfinite(float(stated)) else -1
