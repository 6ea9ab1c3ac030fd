"""Checks whether an image's intensities resemble those of the training volumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from volumen.data.damage import UNREADABLE

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.transforms.normalize import Normalizer

logger = logging.getLogger(__name__)

SAMPLED_BLOCKS = 8


def check_intensities(config: Mapping[str, Any], normalizer: Normalizer, image: Volume) -> None:
    """Warn if an image's intensities are unlike those of the training volumes.

    A sample of blocks is compared by percentiles and mean, independent of the normalisation. Nothing is compared if
    each volume is normalised by its own statistics, or if the checkpoint, of an earlier version, lacks the statistics.

    Args:
        config: the snapshot of the training, which holds `trained_intensities`.
        normalizer: maps the image's values.
        image: what is to be predicted.
    """
    known = trained_ranges(config)
    if len(known) != image.channels or normalizer.goes_by_volume(image.dtype):
        return
    from volumen.transforms.intensity_properties import channel_statistics, is_unlike, sample_values

    try:
        sampled = sample_values(image, SAMPLED_BLOCKS)
    except UNREADABLE:
        return  # the prediction reports it
    for number, (values, trained) in enumerate(zip(sampled, known, strict=True)):
        if trained["percentile_00_5"][0] > 0:
            # 0 is then padding around the tissue, which the training volumes did not have.
            values = values[values != 0]
        found = channel_statistics(values)
        if is_unlike(found, trained):
            logger.warning(
                "%s: %sintensities of %s with mean %.4g, but the network was trained on %s with mean %s: expect little"
                " of it; train with normalize_per_volume: true (or normalization_scheme: percentile), or rescale it",
                image.path,
                f"channel {number}: " if len(known) > 1 else "",
                _span(found["percentile_00_5"], found["percentile_99_5"]),
                found["mean"],
                _span(trained["percentile_00_5"][0], trained["percentile_99_5"][1]),
                _span(*trained["mean"]),
            )


def trained_ranges(config: Mapping[str, Any]) -> list[Mapping[str, Sequence[float]]]:
    """Return the intensities of the training volumes from a snapshot, per channel; empty if it lacks them.

    Returns:
        Per channel "mean", "percentile_00_5" and "percentile_99_5", each the smallest and largest of all volumes.
    """
    dataset = config.get("dataset_config", {})
    if dataset.get("trained_intensities"):
        return list(dataset["trained_intensities"])
    # Snapshots of earlier versions hold only the statistics of the normalisation.
    channels = (dataset.get("intensity_properties") or {}).get("channels") or []
    return [
        {
            "mean": (c.get("mean", c["min"]), c.get("mean", c["max"])),
            "percentile_00_5": (c.get("percentile_00_5", c["min"]),) * 2,
            "percentile_99_5": (c.get("percentile_99_5", c["max"]),) * 2,
        }
        for c in channels
    ]


def _span(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
