"""Measures how many labelled voxels teach each derived target, for `volumen inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.utils.sample_keys import counted_voxels, mask_key

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager
    from volumen.data.index.patch_index import PatchIndex

MOST_PATCHES = 6
"""Patches that are derived; more would take seconds each."""


def teaching_shares(config: ConfigManager, index: PatchIndex) -> dict[str, tuple[float, float]]:
    """Return per derived target the share of labelled voxels that count in losses, and that of exact values.

    A few patches of the training part are read and derived as in training, without augmentation.

    Returns:
        name -> (counting, exact); empty without patches or derived targets.
    """
    from volumen.transforms.derive import DeriveTargetsd
    from volumen.transforms.labels import PrepareLabelsd
    from volumen.transforms.read import ReadPatchd

    tasks = config.derived_tasks
    if not tasks or not len(index):
        return {}
    read = ReadPatchd(
        list(config.primary_targets),
        halo=config.halo,
        normalization_scheme="none",
        ignore_labels=config.ignore_labels,
        label_channels=config.label_channels,
    )
    prepare = PrepareLabelsd(classes=config.label_classes)
    derive = DeriveTargetsd(tasks, config.halo, unit="voxel", instances=list(config.instances))
    totals = {name: np.zeros(3) for name in tasks}
    for number in np.unique(np.linspace(0, len(index) - 1, MOST_PATCHES).astype(int)):
        location = index.grid_location(int(number))
        sample = derive(prepare(read({"case": config.cases[location.case], "location": location})))
        for name, task in tasks.items():
            totals[name] += _counts(config, sample, name, task["source_target"])
    return {
        name: (counting / labelled, exact / labelled) if labelled else (0.0, 0.0)
        for name, (labelled, counting, exact) in totals.items()
    }


def _counts(config: ConfigManager, sample: Any, name: str, source: str) -> list[int]:
    """Return the number of labelled voxels in a patch, those that count for a target, and those that are exact."""
    halo = config.halo
    known = sample[mask_key(source)]
    core = known[(0, *(slice(edge, size - edge) for edge, size in zip(halo, known.shape[1:], strict=True)))]
    counts, exact = counted_voxels(sample, name), sample[mask_key(name)]
    return [int(core.sum()), int((counts[0] & core).sum()), int((exact[0] & core).sum())]
