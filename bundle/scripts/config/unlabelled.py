"""The unlabelled patches of an experiment: found, drawn, and compared with the labelled volumes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.index.patches import find_valid_patches
from volumen.data.pseudo_labels import pseudo_layout, with_pseudo_labels
from volumen.data.resampled import stored_volume
from volumen.data.sampling.dataset import PatchDataset
from volumen.data.sampling.unlabelled import UnlabelledStream, samples_needed
from volumen.data.unlabelled import UNLABELLED, UnlabelledVolume, has_no_label, unlabelled_case
from volumen.transforms.intensity_properties import (
    channel_statistics,
    is_unlike,
    sample_values,
    volume_ranges,
)
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager
    from volumen.data.index.patch_index import PatchIndex
    from volumen.data.layout import OpenCase
    from volumen.data.sampling.sampler import PatchSampler

logger = logging.getLogger(__name__)

_SEED_OFFSET = 0x756E6C61
"""Added to the seed, so that unlabelled patches are not drawn with the random numbers of the labelled ones."""
_SAMPLED_BLOCKS = 8
_MOST_COMPARED = 64
"""Volumes without labels that are compared with the labelled ones; more would delay the start of a training."""


def unlabelled_stream(
    config: ConfigManager,
    transform: Callable[[dict], Any],
    sampler: PatchSampler,
    labelled: Callable[[dict], Any] | None = None,
) -> UnlabelledStream | None:
    """Return the unlabelled patches of the training part; None if the network learns from labels alone.

    Args:
        config: the experiment.
        transform: makes the views of a patch for a mean teacher, see `WeakAndStrongd`.
        sampler: of the labelled patches.
        labelled: transforms a labelled patch, for patches with pseudo-labels.

    Raises:
        VolumenError: no patch of the training part is unlabelled, or a target has that name.
    """
    per_batch = config.unlabelled_per_batch
    if not per_batch:
        return None
    if config.unlabelled.pseudo_labels is not None:
        cases, index = find_pseudo_labelled_patches(config)
        return UnlabelledStream(_patches(config, cases, index, labelled, sampler), per_batch)
    if UNLABELLED in config.targets:
        raise VolumenError(
            f"target {UNLABELLED!r}",
            "has the name of what is learned from unlabelled patches",
            remedy="rename it",
        )
    warn_of_unlike(config)
    found = find_unlabelled_patches(config)
    return UnlabelledStream(_patches(config, config.cases, found, transform, sampler), per_batch)


def _patches(
    config: ConfigManager,
    cases: Sequence[OpenCase],
    index: PatchIndex,
    transform: Callable[[dict], Any] | None,
    sampler: PatchSampler,
) -> PatchDataset:
    return PatchDataset(
        (),
        index,
        transform,
        seed=config.tr_setup.seed + _SEED_OFFSET,
        samples_per_epoch=samples_needed(sampler, config.unlabelled_per_batch),
        chunk_cache_mib=config.dataset_config.chunk_cache_mib,
        cases=cases,
    )


def find_unlabelled_patches(config: ConfigManager) -> PatchIndex:
    """Return the patches of the training part that are unlabelled and not empty, found as valid patches are.

    Raises:
        VolumenError: there is none.
    """
    settings, targets = config.unlabelled, tuple(config.primary_targets)
    searched = [
        unlabelled_case(
            case,
            UnlabelledVolume(
                case,
                targets,
                ignore_labels=config.ignore_labels,
                labelled_only=config.tr_setup.compute_loss_on_labeled_only,
                min_contrast=settings.min_contrast,
                deviation=_deviation,
            ),
        )
        for case in config.search_cases or config.cases
    ]
    index = find_valid_patches(
        config.cases,
        config.split.train,
        config.patch_size,
        targets=(UNLABELLED,),
        min_labeled_ratio=settings.min_unlabelled,
        stride=config.dataset_config.patch_stride,
        jitter=True,
        search_cases=searched,
        cache_dir=config.cache_dir,
        allow_empty=True,
        part=UNLABELLED,
    )
    if not len(index):
        raise VolumenError(
            "tr_config.unlabelled",
            expected=f"patches of the training part that are unlabelled and not empty in {settings.min_unlabelled:.0%}",
            found="none",
            remedy="add images without labels, masks that say what is labelled, or targets.<target>.ignore_label;"
            " or leave unlabelled out",
        )
    return index


def find_pseudo_labelled_patches(config: ConfigManager) -> tuple[list[OpenCase], PatchIndex]:
    """Return the cases with pseudo-labels beside a person's, and the patches of the training part that have some.

    Raises:
        VolumenError: there is none, or the volumes are resampled, on whose grid pseudo-labels do not lie.
    """
    folder, settings = Path(config.unlabelled.pseudo_labels or ""), config.unlabelled
    if config.dataset_config.target_spacing is not None:
        raise VolumenError(
            "tr_config.unlabelled.pseudo_labels",
            "lie on the stored voxels, and dataset_config.target_spacing resamples them",
            remedy="leave target_spacing out, or learn by a mean teacher",
        )
    layout = pseudo_layout(folder, config.layout)
    if not any(case.labels for case in layout.cases):
        raise VolumenError(
            folder, expected="labels/<image>_<target>.zarr and masks/ of images of the data", found="none"
        )
    pseudo = replace(config.data, given_layout=layout, given_cases=None).cases
    index = find_valid_patches(
        config.cases,
        config.split.train,
        config.patch_size,
        targets=tuple(config.primary_targets),
        min_labeled_ratio=settings.min_unlabelled,
        stride=config.dataset_config.patch_stride,
        jitter=True,
        search_cases=pseudo,
        cache_dir=config.cache_dir,
        relax=True,
        part="pseudo-labelled",
    )
    joined = [
        with_pseudo_labels(case, other, config.ignore_labels)
        for case, other in zip(config.cases, pseudo, strict=True)
    ]
    return joined, index


def warn_of_unlike(config: ConfigManager) -> None:
    """Warn of volumes without labels whose intensities are unlike those of the labelled ones.

    Samples of blocks are compared by percentiles and mean, as prediction does. Nothing is compared where each volume is
    normalised by its own statistics. (Another voxel size is warned of when volumes are opened.)
    """
    from volumen.transforms.normalize import Normalizer

    targets = tuple(config.primary_targets)
    bare = [case for case in config.cases if has_no_label(case, targets)][:_MOST_COMPARED]
    labelled = [case for case in config.cases if not has_no_label(case, targets)][:_MOST_COMPARED]
    normalizer = Normalizer(config.dataset_config.normalization_scheme, config.intensity_properties)
    if not bare or not labelled or normalizer.goes_by_volume(stored_volume(bare[0].image).dtype):
        return
    known = volume_ranges([_statistics(case.image) for case in labelled])
    for case in bare:
        for number, (found, trained) in enumerate(zip(_statistics(case.image), known, strict=True)):
            if is_unlike(found, trained):
                logger.warning(
                    "%s: %sintensities of %.4g to %.4g with mean %.4g, but those of the labelled volumes are %.4g to"
                    " %.4g with means %.4g to %.4g: little can be learned from it; set normalize_per_volume: true (or"
                    " normalization_scheme: percentile), or leave it out",
                    case.image.path,
                    f"channel {number}: " if len(known) > 1 else "",
                    found["percentile_00_5"],
                    found["percentile_99_5"],
                    found["mean"],
                    trained["percentile_00_5"][0],
                    trained["percentile_99_5"][1],
                    *trained["mean"],
                )


def _statistics(image: Any) -> list[dict[str, float]]:
    return [channel_statistics(values) for values in sample_values(stored_volume(image), _SAMPLED_BLOCKS)]


def _deviation(image: Any) -> np.ndarray:
    """Return the standard deviation of an image per channel, from a sample of its blocks, without outliers."""
    deviations = []
    for values in sample_values(stored_volume(image), 4 * _SAMPLED_BLOCKS):
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 0.0)
        deviations.append(float(np.clip(finite, low, high).std()) if finite.size else 0.0)
    return np.array(deviations)
