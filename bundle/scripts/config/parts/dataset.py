"""The section `dataset_config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from volumen.config.parts.common import STRICT_KEYS
from volumen.config.value_types import (
    NAMES_FILE,
    Amount,
    Count,
    PatchSize,
    Share,
)

FOLD = r"^\d+/\d+$"
"""Pattern of the number of a fold and how many there are."""
Scheme = Literal["unit", "percentile", "zscore", "ct", "none"]


@dataclass(frozen=True)
class DatasetConfig:
    """`dataset_config`: which data, how they are read, which patches count."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    data_path: Annotated[
        str | list[str] | None,
        NAMES_FILE,
        Field(
            description="Data folder where `-i` is not given, or a list of folders; NAME=FOLDER names one of several."
        ),
    ] = None
    format: Annotated[
        Literal[
            "zarr",
            "tif",
            "nifti",
            "png",
            "hdf5",
            "mrc",
            "nrrd",
            "precomputed",
            "n5",
            "metaimage",
            "dicom",
            "webknossos",
            "napari",
        ]
        | None,
        Field(description="Data format; null: by content."),
    ] = None
    targets: Annotated[
        dict[str, Any], Field(description="Targets by name; empty: every target found under labels/.")
    ] = field(default_factory=dict)
    volumes: Annotated[
        list[str] | None, NAMES_FILE, Field(description="Names of the images to use; null: all of them.")
    ] = None
    val_volumes: Annotated[
        list[str] | None,
        NAMES_FILE,
        Field(
            description="Names of the images that validate, also with * and ?; all others train. null: chosen by "
            "`tr_setup.tr_val_split`."
        ),
    ] = None
    val_path: Annotated[
        str | None,
        NAMES_FILE,
        Field(description="Data folder whose images all validate, and none of which trains; null: none."),
    ] = None
    split_path: Annotated[
        str | None,
        NAMES_FILE,
        Field(
            description="File that says which images or regions train and validate, such as the `_split.json` of "
            "a run; null: none."
        ),
    ] = None
    fold: Annotated[
        str | None,
        Field(
            pattern=FOLD,
            description="Part of the data that validates: 0/5 is the first of five parts, 4/5 the last; null: none.",
        ),
    ] = None
    group_by: Annotated[
        str | None,
        NAMES_FILE,
        Field(
            description="Images of one group never stand on both sides: a regular expression whose first (...) is "
            "the group in an image's name, or a .csv file with the columns volume and group; null: no groups."
        ),
    ] = None
    axes: Annotated[
        str | None,
        Field(description="Axes of the images where metadata do not say, such as zyx, czyx or yxc."),
    ] = None
    spacing: Annotated[
        list[Annotated[float, Field(gt=0)]] | None,
        Field(description="Voxel size per spatial axis; null: from metadata, else 1."),
    ] = None
    target_spacing: Annotated[
        Literal["auto"] | list[Annotated[float, Field(gt=0)]] | None,
        Field(
            description="Voxel size per spatial axis to which volumes are resampled while they are read, in the data's"
            " unit; auto: nnU-Net's rule (the median); null: volumes are used as stored."
        ),
    ] = None
    trained_spacing: Annotated[
        list[Annotated[float, Field(gt=0)]] | None,
        Field(
            description="Written by a run: the median voxel size of its data, which prediction compares with its"
            " image's; null: no file told one."
        ),
    ] = None
    trained_unit: Annotated[
        str | None,
        Field(description="Written by a run: the unit of trained_spacing; null: no file states one."),
    ] = None
    trained_orientation: Annotated[
        str | None,
        Field(
            description="Written by a run: where the axes of its volumes run to, such as SAR (superior, anterior,"
            " right); a volume with other axes is turned for the network. null: no file states it."
        ),
    ] = None
    min_labeled_ratio: Annotated[
        Share | None,
        Field(
            description="Least labelled share of a training patch (masks first, else labels); null: 0.10, or half "
            "of an image's best share where none of its patches reaches that."
        ),
    ] = None
    min_bbox_percent: Annotated[
        Share,
        Field(description="Least share of the patch that the bounding box of the labelled voxels fills."),
    ] = 0.0
    patch_stride: Annotated[
        PatchSize | None, Field(description="Grid of candidate patches in voxels; null: half a patch.")
    ] = None
    skip_patch_validation: Annotated[bool, Field(description="Take every patch of the grid.")] = False
    cache_valid_patches: Annotated[
        bool, Field(description="Keep the index of valid patches in the user's cache.")
    ] = True
    chunk_cache_mib: Annotated[
        Count,
        Field(description="Decoded chunks that each worker keeps for the next patches, in MiB; 0: none."),
    ] = 128
    valid_patch_find_resolution: Annotated[
        Count, Field(description="OME-Zarr level of the labels at which patches are looked for.")
    ] = 0
    ome_zarr_resolution: Annotated[Count, Field(description="OME-Zarr level that is read.")] = 0
    allow_unlabeled_data: Annotated[
        bool, Field(description="Accept images that lack some target; its loss is masked there.")
    ] = False
    bg_sampling_enabled: Annotated[bool, Field(description="Also train on patches without foreground.")] = (
        False
    )
    bg_to_fg_ratio: Annotated[Amount, Field(description="Background patches per foreground patch.")] = 0.5
    class_oversampling: Annotated[
        Share | Literal["auto"],
        Field(
            description="Share of the patches drawn for what they hold: each class, or target, as often; auto: up to"
            " half, the rarer a class is among the patches and the lower its score at the last validation the more."
        ),
    ] = 0.0
    normalization_scheme: Annotated[
        Scheme | Annotated[list[Scheme], Field(min_length=1)],
        Field(
            description="unit ([0, 1]), percentile, zscore, ct or none; or a list with one for each channel."
        ),
    ] = "unit"
    normalize_per_volume: Annotated[
        bool | None,
        Field(
            description="Each volume by its own statistics; null: where their ranges differ by more than 3 times, or"
            " one is brighter than all of another."
        ),
    ] = None
    intensity_properties: Annotated[
        dict[str, Any], Field(description="Statistics of the images; filled by sampling when empty.")
    ] = field(default_factory=dict)
    trained_intensities: Annotated[
        list[dict[str, Any]],
        Field(
            description="Written by a run: the range of its volumes' intensities per channel, which prediction compares"
            " with its image's."
        ),
    ] = field(default_factory=list)
    nonfinite: Annotated[
        Literal["zero", "refuse"], Field(description="NaN or infinity in an image: replace by 0, or stop.")
    ] = "zero"
    no_spatial: Annotated[bool, Field(description="No spatial augmentation at all.")] = False
    rotation_axes: Annotated[
        list[Literal["x", "y", "z"]] | None,
        Field(description="Axes to rotate about (x, y, z); null: all, or the thin one."),
    ] = None
