"""What is labelled in the cells of the benchmark of derived targets, and its table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from data_folders import write_tiff_folder

from volumen.config.manager import ConfigManager
from volumen.data.layout import discover, open_cases

SHARES = {"full": 1.0, "tenth": 0.1, "fiftieth": 0.02}
BOXES = {
    "volume": ((0, 96), (10, 170), (0, 160)),
    "thin": ((3, 16), (0, 512), (0, 1024)),
    "image": ((0, 584), (0, 565)),
}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.mark.parametrize("box", BOXES.values(), ids=list(BOXES))
@pytest.mark.parametrize("labels", SHARES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_labelled_share_is_about_what_its_name_says(box, labels, seed):
    import auxiliary_gain
    from auxiliary_gain import labelled

    assert auxiliary_gain.SHARES == SHARES
    known = np.zeros([stop + 5 for _, stop in box], bool)
    for part in labelled(box, SHARES[labels], np.random.default_rng(seed)):
        known[part] = True
    inside = tuple(slice(*side) for side in box)
    assert known[inside].sum() == known.sum()
    assert 0.5 * SHARES[labels] < known[inside].mean() < 1.6 * SHARES[labels] + 1e-9
    again = labelled(box, SHARES[labels], np.random.default_rng(seed))
    assert again == labelled(box, SHARES[labels], np.random.default_rng(seed))


def test_only_the_training_part_loses_labels(tmp_path):
    from auxiliary_gain import sparse_folder
    from ranking_sets import TRAIN, DataSet

    label = (np.indices((40, 20, 24)).sum(axis=0) % 7 < 3).astype("uint8")
    folder = write_tiff_folder(tmp_path / "data", {"a": {"wall": label}})
    box = ((0, 40), (0, 12), (0, 24))
    data = DataSet(str(folder), "wall", {TRAIN: {"a": [box]}}, (8, 8, 8), 1, None, "", {})
    assert sparse_folder(data, 1.0, 0, tmp_path / "full") == str(folder)
    (case,) = open_cases(discover(sparse_folder(data, 0.1, 0, tmp_path / "tenth")))
    whole = tuple(slice(0, size) for size in label.shape)
    known = np.asarray(case.masks["wall"].read(whole)).reshape(label.shape) != 0
    assert known[:, 12:].all()
    assert known[:, :12].mean() == pytest.approx(0.1, abs=0.03)
    np.testing.assert_array_equal(np.asarray(case.labels["wall"].read(whole)).reshape(label.shape), label)


def test_every_arm_is_a_valid_experiment(tmp_path):
    from auxiliary_gain import ARMS, arm_sections

    label = (np.indices((24, 24, 24)).sum(axis=0) % 7 < 3).astype("uint8")
    folder = write_tiff_folder(tmp_path / "data", {"a": {"wall": label}})
    for arm in ARMS:
        config = ConfigManager(
            **arm_sections(arm, "wall"), dataset_dir=str(folder), output_dir=str(tmp_path), device="cpu"
        )
        heads = [name for name, target in config.targets.items() if target.head]
        assert (len(heads) == 1) == (arm in ("alone", "losses")), arm
        assert len(config.fusions) == (arm == "fused"), arm


def test_the_table_compares_the_same_seeds(tmp_path):
    from auxiliary_gain import difference, table

    path = tmp_path / "rows.csv"
    scores = ("dice", "surface_dice@1", "cldice", "broken", "merged", "voi", "adapted_rand_error")
    rows = [
        {"set": "s", "labels": "tenth", "arm": arm, "seed": seed, "seconds": 20, "steps": 100}
        | dict.fromkeys(scores, value)
        for arm, seed, value in (
            ("alone", 0, 0.5),
            ("alone", 1, 0.7),
            ("alone", 2, 9.0),
            ("distance", 0, 0.6),
            ("distance", 1, 0.8),
        )
    ]
    rows[0]["adapted_rand_error"] = "nan"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with path.open(newline="", encoding="utf-8") as file:
        lines = table(list(csv.DictReader(file))).splitlines()
    assert "| distance | 2 | 100 | +0.1 (+0.1 to +0.1) |" in lines[-1]
    # A score that is undefined for one seed has no mean.
    assert lines[2].split(" | ")[-1].strip(" |") == ""
    # Student's t with 2 degrees of freedom: 4.303 * 1 / sqrt(3).
    assert difference([0.0, 1.0, 2.0]) == "+1 (-1.48 to +3.48)"
