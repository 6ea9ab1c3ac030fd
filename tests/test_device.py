"""The choice of the device by its name."""

from __future__ import annotations

import pytest
import torch

from volumen.utils.device import choose_device, time_convolutions
from volumen.utils.errors import VolumenError


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        ("meta", 0, "meta"),
    ],
)
def test_a_device_by_its_name(monkeypatch, name, count, expected):
    _fake(monkeypatch, count)
    assert str(choose_device(name)) == expected


@pytest.mark.parametrize(
    ("name", "count", "line"),
    [
        ("gpu", 1, "--device: expected auto, cpu, cuda or cuda:N, found 'gpu'"),
        ("cuda", 0, "--device: no CUDA device on this machine; use --device cpu"),
        (
            "cuda:1",
            1,
            "--device: expected cuda:0, found 'cuda:1'; give a GPU of this machine, or use --device cpu",
        ),
        (
            "cuda:4",
            4,
            "--device: expected cuda:0 to cuda:3, found 'cuda:4'; give a GPU of this machine, or use --device cpu",
        ),
    ],
)
def test_a_missing_device_is_refused(monkeypatch, name, count, line):
    _fake(monkeypatch, count)
    with pytest.raises(VolumenError) as caught:
        choose_device(name)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("device", "deterministic", "expected"),
    [("cuda", False, True), ("cuda:1", True, False), ("cpu", False, False)],
)
def test_algorithms_are_timed_on_gpus_unless_bits_matter(monkeypatch, device, deterministic, expected):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    time_convolutions(torch.device(device), deterministic)
    assert torch.backends.cudnn.benchmark is expected


def _fake(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
