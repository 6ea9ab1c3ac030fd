"""Long-range offsets by voxel size and object size, and the sizes that are read off labels."""

from __future__ import annotations

import numpy as np
import pytest
from data_folders import write_tiff_folder

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.derived.derivation import derive_target
from volumen.derived.long_range import chord_counts, long_range_offsets

NEAREST = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]


@pytest.mark.parametrize(
    ("spacing", "width", "long"),
    [
        ((1, 1, 1), None, [(0, 3), (1, 3), (2, 3), (0, 9), (1, 9), (2, 9), (0, 27), (1, 27), (2, 27)]),
        ((1, 1, 1), (9, 9, 8), [(0, 3), (1, 3), (2, 3), (0, 9), (1, 9)]),
        # Sections ten times as thick as pixels: 27 pixels are 3 sections, 9 pixels less than 2.
        ((40, 4, 4), (9, 40, 40), [(1, 3), (2, 3), (1, 9), (2, 9), (0, 3), (1, 27), (2, 27)]),
        ((8e-6, 8e-6, 8e-6), (2, 2, 2), []),
    ],
)
def test_offsets_are_lengths_no_longer_than_objects(spacing, width, long):
    expected = NEAREST + [[-step * (axis == other) for other in range(3)] for axis, step in long]
    assert long_range_offsets(spacing, width) == expected


def test_chords_are_those_of_loops():
    labels = np.random.default_rng(0).integers(0, 3, (6, 7, 8))
    voxels, runs = chord_counts(labels)
    assert voxels == (labels > 0).sum()
    for axis in range(3):
        count = 0
        for line in np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis]):
            count += sum(v > 0 and (i == 0 or line[i - 1] != v) for i, v in enumerate(line))
        assert runs[axis] == count


def _boxes_volume(shape: tuple[int, ...], size: tuple[int, ...], gap: int) -> np.ndarray:
    """Boxes of one size on a grid, each with its own number."""
    labels = np.zeros(shape, np.uint16)
    for number, start in enumerate(np.ndindex(*[n // (s + gap) for n, s in zip(shape, size)]), start=1):
        labels[tuple(slice(k * (s + gap), k * (s + gap) + s) for k, s in zip(start, size))] = number
    return labels


def test_a_training_settles_them_by_its_labels(tmp_path):
    cells = _boxes_volume((64, 60, 72), (4, 10, 18), 2)
    data = write_tiff_folder(tmp_path / "data", {"a": {"cell": cells}})
    sections = {
        "dataset_config": {"targets": {"cell": {"instances": "foreground"}}},
        "auxiliary_tasks": {
            "aff": {
                "type": "affinities",
                "source_target": "cell",
                "offsets": "auto",
                "losses": [{"name": "BCEWithLogitsLoss"}],
            }
        },
    }

    def configured(more: dict) -> ConfigManager:
        return ConfigManager(**merge(shipped_sections(), more), dataset_dir=str(data), device="cpu")

    config = configured(sections)
    offsets = config.derived_tasks["aff"]["offsets"]
    assert offsets == [*NEAREST, [-3, 0, 0], [0, -3, 0], [0, 0, -3], [0, -9, 0], [0, 0, -9]]
    assert config.targets["aff"].out_channels == 8
    assert max(config.halo) >= 9
    task = config.targets["aff"].snapshot()
    assert (
        configured({**sections, "auxiliary_tasks": {"aff": task}}).derived_tasks["aff"]["offsets"] == offsets
    )


def test_without_a_training_auto_means_all_lengths():
    values, _ = derive_target("affinities", np.ones((1, 32, 32), np.uint8), offsets="auto")
    assert len(values) == 2 + 6
