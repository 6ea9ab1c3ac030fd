"""The computation of a huge training and prediction: it follows from counts that are made here by hand."""

from __future__ import annotations

import pytest
from conftest import ROOT


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

    return scale


def test_a_training_reads_eight_chunks_of_image_and_label_per_patch(scale):
    costs = scale.Costs(
        step_ms=100, decode_ms=1, draw_ms=4, image_ratio=2, label_ratio=16, batch=2, request_s=0.1
    )
    need = scale.training(costs, 4)
    assert need.patches == 80  # four GPUs, ten steps a second, two patches each
    assert need.stored_bytes == 80 * 8 * 128**3 * (1 / 2 + 1 / 16)
    assert need.cores == pytest.approx(80 * (16 * 8 + 4) / 1000)
    assert need.requests == pytest.approx(80 * 16 * 0.1)
    assert need.workers == pytest.approx(80 * (0.2 + 0.132))


def test_a_prediction_computes_every_window_once_on_some_gpu(scale):
    costs = scale.Costs(forward_ms=50, window_ms=1, decode_ms=0, gpu_hour=2)
    one, eight = (scale.prediction(costs, 1024.0**3, gpus) for gpus in (1, 8))
    assert one.windows == 16**3  # a window of 128 covers 64 new voxels per axis
    assert one.hours == pytest.approx(16**3 * 0.05 / 3600)
    assert eight.hours == pytest.approx(one.hours / 8)
    assert eight.price == pytest.approx(one.price) == pytest.approx(2 * one.hours)
    assert one.cores == pytest.approx(16**3 * 8e-3 / (16**3 * 0.05))
    assert one.read_bytes == 1024**3 / costs.image_ratio


def test_the_tables_have_a_row_for_each_number_of_gpus(scale):
    text = scale.Tables(scale.Costs()).text(10, [1, 8, 64])
    assert text.count("\n| 8 | ") == 2
    assert len([line for line in text.splitlines() if line.startswith("| 64 |")]) == 2
