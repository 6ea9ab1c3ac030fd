"""The arrays of one volume's prediction: the final ones, and temporary ones below its state folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from volumen.data.space.geometry import GRID
from volumen.inference.output.block_log import STATE_FOLDER
from volumen.inference.output.exports import MULTISCALE
from volumen.inference.output.ome_zarr import ZarrOutput
from volumen.inference.output.stored import OutputSpec, StoredBlend, instance_specs

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.volume_work import VolumeWork


def final_arrays(work: VolumeWork) -> ZarrOutput:
    """Return the final arrays of a prediction."""
    stored = (*work.stored, *instance_specs(work.request.instances))
    export = work.job.export
    pyramid = work.request.pyramid and (export is None or export.kind in MULTISCALE)
    return _arrays(work, work.job.output, stored, pyramid=pyramid)


def cleaned_specs(work: VolumeWork) -> tuple[OutputSpec, ...]:
    """Return the label maps that are cleaned."""
    return () if work.rules.does_nothing else tuple(item for item in work.stored if item.is_labels)


def raw_arrays(work: VolumeWork) -> ZarrOutput:
    """Return the arrays of label maps before cleaning, so that cleaning can be repeated after an interruption."""
    return _arrays(work, work_folder(work) / "raw", cleaned_specs(work))


def filled_arrays(work: VolumeWork) -> ZarrOutput:
    """Return the arrays of label maps with filled holes, before small components are removed."""
    return _arrays(work, work_folder(work) / "filled", cleaned_specs(work))


def block_sinks(work: VolumeWork) -> dict[str, ZarrOutput]:
    """Return where the blocks of each target are written: label maps that are cleaned go to arrays of their own."""
    final = final_arrays(work)
    sinks = {item.head.name: final for item in work.stored}
    if cleaned := cleaned_specs(work):
        raw = raw_arrays(work)
        sinks.update({item.head.name: raw for item in cleaned})
    return sinks


def grid_arrays(work: VolumeWork) -> ZarrOutput:
    """Return the blended values on the network's grid, of an image that is resampled."""
    plan = work.window_plan
    return ZarrOutput(
        work_folder(work) / "grid",
        [StoredBlend(item.head) for item in work.stored],
        plan.output_shape,
        plan.block_shape,
        spacing=work.window_image.spacing or (1.0,) * plan.ndim,
        unit=work.window_image.unit,
        compress="lz4",
        pyramid=False,
    )


def local_arrays(work: VolumeWork) -> ZarrOutput:
    """Return the array of the numbers of fragments' pieces, which are unique within a block only."""
    return _arrays(work, work_folder(work) / "instances", instance_specs(work.request.instances))


def work_folder(work: VolumeWork) -> Path:
    """Return the folder of temporary data, which is removed when the prediction is finished."""
    return work.job.output / STATE_FOLDER


def _arrays(
    work: VolumeWork, root: Path, stored: Sequence[OutputSpec], *, pyramid: bool = False
) -> ZarrOutput:
    geometry = work.job.image.geometry
    return ZarrOutput(
        root,
        stored,
        work.plan.output_shape,
        work.plan.block_shape,
        spacing=geometry.spacing or (1.0,) * work.plan.ndim,
        unit=geometry.unit,
        place=geometry.origin if geometry.frame == GRID else None,
        source=_image_group(work.job.image),
        classes=work.classes,
        origin=tuple(start for start, _ in work.plan.box),
        compress=work.request.compress,
        pyramid=pyramid,
    )


def _image_group(image: Volume) -> str | None:
    """Return the path of an image's OME-Zarr group on this machine, or None for an image of another kind."""
    source = Path(image.source)
    is_group = (
        "://" not in image.source and image.source != image.path and image.path.startswith(image.source)
    )
    return str(source.absolute()) if is_group and source.is_dir() else None
