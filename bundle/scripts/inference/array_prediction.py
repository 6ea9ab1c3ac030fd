"""Prediction of an image in memory by a network that prepares whole images, such as those of nnU-Net."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.jobs import Job
from volumen.inference.output.ome_zarr import target_group
from volumen.inference.predict import output_spec, predict_volume
from volumen.inference.predictor import Predictor
from volumen.inference.request import PredictRequest
from volumen.utils.errors import VolumenError


def predict_prepared_array(
    predictor: Predictor,
    image: np.ndarray,
    *,
    targets: Sequence[str] | None = None,
    patch_size: Sequence[int] | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
    precision: str = "float32",
    spacing: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """Predict an image in memory as from a file, through temporary files, without test-time augmentation.

    Args:
        predictor: the network, with a `preparation`.
        image: raw image, shape (C, *space).
        targets, patch_size, overlap, batch_size, precision, spacing: as for `predict_array`.

    Returns:
        Per target a float32 array (K, *space): probabilities.

    Raises:
        VolumenError: a patch size, target or spacing that does not fit.
    """
    ndim = image.ndim - 1
    if spacing is not None and len(spacing) != ndim:
        raise VolumenError("spacing", expected=f"{ndim} values", found=str(list(spacing)))
    volume = ArrayVolume(
        image,
        axes="c" + "zyx"[-ndim:],
        spacing=None if spacing is None else tuple(float(size) for size in spacing),
        path="image",
    )
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "image.zarr")
        request = PredictRequest(
            "image",
            predictor.path,
            output,
            targets=None if targets is None else tuple(targets),
            patch_size=None if patch_size is None else tuple(patch_size),
            overlap=overlap,
            batch_size=batch_size,
            amp="off" if precision == "float32" else precision,  # type: ignore[arg-type]
            dtype="float32",
            skip_empty=False,
            pyramid=False,
        )
        predict_volume(predictor, Job(volume, Path(output)), request)
        result = {}
        for head in predictor.heads(request.targets):
            stored = open_volume(f"{output}/{target_group(output_spec(head, request))}")
            result[head.name] = stored.read(tuple(slice(0, size) for size in stored.shape))
        return result
