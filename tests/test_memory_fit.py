"""Sizes fitted to memory: the estimate, the choice, presets, a lack of memory in the first steps."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from data_folders import SHORT, ball, write_tiff_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.engines.trainer import TrainStep
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.time_budget import fit, memory_fit
from volumen.time_budget.candidates import candidates
from volumen.time_budget.memory_estimate import LiveBytes, _network_memory, _optimizer_factors, step_memory
from volumen.time_budget.memory_fit import within_memory
from volumen.time_budget.probe import measured_peak
from volumen.utils import device_memory
from volumen.utils.errors import VolumenError

MIB = 2**20
TINY = {"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    return write_tiff_folder(root / "data", {"a": {"ball": ball((64, 96, 96))}})


def config_of(folder, **sections):
    return ConfigManager(
        dataset_dir=str(folder), output_dir=str(folder.parent / "out"), device="cpu", **sections
    )


def test_live_bytes_count_tensors_until_nothing_refers_to_them():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        assert live.now == 4000
        second = first + 1
        assert live.now == 8000
        del first, second
        assert live.now == 4000  # the view holds the first
        del view
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_the_network_s_memory_without_values_is_that_with_values(folder, amp):
    config = config_of(
        folder,
        tr_config={"patch_size": [16, 16, 16], "batch_size": 2, "amp": amp},
        model_config={"features_per_stage": [4, 8, 16]},
    )
    estimated = _network_memory(config, (2, 1, 16, 16, 16))
    network = MultiHeadDynUNet.from_config(config.network_config).train()
    image = torch.zeros(2, 1, 16, 16, 16)
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bfloat16"):
            total = sum(level.float().sum() for level in network(image)["ball"])
        features = live.now
        total.backward()
    assert estimated.weights == sum(4 * weight.numel() for weight in network.parameters())
    assert estimated.features == pytest.approx(features, rel=0.02)
    assert estimated.peak == pytest.approx(live.peak, rel=0.1)


def test_the_state_of_optimizers_is_that_of_their_definition():
    assert _optimizer_factors("AdamW", {})[0] == 2  # two moments
    assert _optimizer_factors("SGD", {"momentum": 0.9})[0] == 1
    assert _optimizer_factors("SGD", {"momentum": 0.0})[0] == 0


def test_the_estimate_grows_with_patch_batch_targets_and_width(folder):
    def total(batch=2, side=16, width=4, tasks=0, **training):
        derived = {
            f"d{number}": {
                "type": "distance_transform",
                "source_target": "ball",
                "losses": [{"name": "SignedDistanceLoss"}],
            }
            for number in range(tasks)
        }
        config = config_of(
            folder,
            tr_config={"patch_size": [side] * 3, "batch_size": batch, "amp": "off", **training},
            model_config={"features_per_stage": [width, 2 * width]},
            auxiliary_tasks=derived,
        )
        return step_memory(config).total

    small = total()
    assert small < min(total(batch=4), total(side=32), total(width=8), total(tasks=1), total(ema_decay=0.9))
    recomputed = total(side=32, activation_checkpointing=True)
    assert 0.3 * total(side=32) < recomputed < 0.9 * total(side=32)
    # Feature maps dominate, and their number is proportional to the voxels.
    work = [total(side=32, batch=batch) for batch in (2, 4, 8)]
    assert work[2] - work[1] == pytest.approx(2 * (work[1] - work[0]), rel=0.02)


@pytest.mark.slow
def test_the_estimate_is_near_the_measured_peak_of_a_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import memory_fit as benchmark

    benchmark.write_data(tmp_path, 3)
    estimate, peak = benchmark.measure(tmp_path, ([48, 48, 48], 2, {}, 0, "off"))
    assert 0.75 < estimate / peak < 1.35


@pytest.fixture
def proportional(monkeypatch):
    """An estimate that is the voxels times the width, in bytes, so that choices are quick and known."""

    def step_bytes(config):
        voxels = config.tr_config.batch_size * math.prod(config.patch_size)
        return float(voxels * config.plan.features_per_stage[0])

    monkeypatch.setattr(memory_fit, "_step_bytes", step_bytes)


def limited(monkeypatch, limit):
    for module in (memory_fit, fit):
        monkeypatch.setattr(module, "memory_limit", lambda config: limit)


@given(limit=st.integers(24**3 * 8, 2 * 64**3 * 64))
@settings(max_examples=30, deadline=None)
def test_the_choice_fits_and_is_the_default_where_that_fits(folder, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory_fit,
            "_step_bytes",
            lambda c: float(c.tr_config.batch_size * math.prod(c.patch_size) * c.plan.features_per_stage[0]),
        )
        limited(patch, limit)
        config = config_of(folder)
        fitted = within_memory(config)
        assert memory_fit._step_bytes(fitted) <= limit
        if memory_fit._step_bytes(config) <= limit:
            assert fitted is config
        else:
            assert "GiB" in fitted.tr_config.memory_choice


def test_the_user_s_settings_stay(folder, monkeypatch, proportional):
    limited(monkeypatch, 3 * 48**3 * 6)
    training = {"batch_size": 3}
    model = {"features_per_stage": [6, 12], "n_blocks_per_stage": [1, 1], "separate_decoders": False}
    fitted = within_memory(config_of(folder, tr_config=training, model_config=model))
    assert fitted.tr_config.batch_size == 3
    assert fitted.plan.features_per_stage == (6, 12)
    assert fitted.plan.blocks_per_stage == (1, 1)


def test_without_a_choice_too_large_sizes_cause_a_warning(folder, monkeypatch, proportional, caplog):
    limited(monkeypatch, 1000.0)
    config = config_of(folder, tr_config={"patch_size": [16, 16, 16], "batch_size": 1}, model_config=TINY)
    with caplog.at_level(logging.WARNING, "volumen"):
        assert within_memory(config) is config
    assert "patches of 16x16x16 in batches of 1 need about" in caplog.text


def test_nothing_that_fits_is_refused_with_what_is_needed(folder, monkeypatch, proportional):
    limited(monkeypatch, 10.0)
    with pytest.raises(
        VolumenError, match=r"for the smallest step, 1 patch of .* features, found 0.00 GiB on cpu"
    ):
        within_memory(config_of(folder))


def test_presets_grow_and_stay_within_their_memory(folder, monkeypatch):
    monkeypatch.setattr(device_memory, "main_memory", lambda: 64 * memory_fit.GIB)
    monkeypatch.setattr(
        memory_fit, "_step_bytes", lambda c: 2e3 * c.tr_config.batch_size * math.prod(c.patch_size)
    )
    needed = []
    for name, size in memory_fit.PRESETS["cpu"].items():
        fitted = within_memory(config_of(folder, tr_config={"preset": name}))
        needed.append(memory_fit._step_bytes(fitted))
        assert needed[-1] <= size * memory_fit.GIB
        assert f"preset {name}" in fitted.tr_config.memory_choice
        assert fitted.tr_config.preset is None
        # What was chosen trains the same again, and leaves nothing to a preset.
        assert within_memory(fitted) is fitted
    assert needed == sorted(needed)
    assert needed[0] < needed[-1]


def test_where_a_patch_covers_the_image_the_batch_grows(folder, monkeypatch):
    monkeypatch.setattr(device_memory, "main_memory", lambda: 64 * memory_fit.GIB)
    monkeypatch.setattr(
        memory_fit, "_step_bytes", lambda c: 100.0 * c.tr_config.batch_size * math.prod(c.patch_size)
    )
    small = write_tiff_folder(folder.parent / "small", {n: {"ball": ball((16, 24, 24))} for n in "abcdefgh"})
    fitted = within_memory(config_of(small, tr_config={"preset": "small"}))
    assert fitted.patch_size[1:] == (24, 24)
    assert fitted.tr_config.batch_size == 8  # of all data
    given = within_memory(config_of(small, tr_config={"preset": "small", "batch_size": 3}))
    assert given.tr_config.batch_size == 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tr_config": {"preset": "huge"}}, "expected one of small, medium, large or xlarge"),
        (
            {"tr_config": {"preset": "small", "patch_size": [16, 16, 16], "batch_size": 1}},
            "nothing to choose",
        ),
        ({"tr_setup": {"autoconfigure": False}, "tr_config": {"preset": "small"}}, "nothing to choose"),
        ({"tr_config": {"preset": "xlarge"}}, "expected 16 GiB of memory on cpu, found 3.0 GiB free"),
    ],
)
def test_presets_that_make_no_sense_are_refused(folder, monkeypatch, sections, message):
    monkeypatch.setattr(device_memory, "main_memory", lambda: 3 * memory_fit.GIB)
    with pytest.raises(VolumenError, match=message):
        within_memory(config_of(folder, **sections))


def test_a_probe_that_measures_more_leads_to_less(folder, monkeypatch, proportional):
    limit = 2 * 64**3 * 32
    limited(monkeypatch, limit)
    probed = []

    def probe(config):
        probed.append(config)
        return 3 * memory_fit._step_bytes(config)

    fitted = within_memory(config_of(folder), probe=probe)
    assert len(probed) > 1
    assert 3 * memory_fit._step_bytes(fitted) <= limit

    answers = iter([None, 0])
    after_failure = within_memory(config_of(folder), probe=lambda config: next(answers))
    assert memory_fit._step_bytes(after_failure) <= 0.8 * limit
    kept = config_of(folder)
    assert within_memory(kept, probe=lambda config: 1) is kept


class CountedMemory:
    """A stand-in for `torch.cuda`, whose device has room for a number of tensors."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def empty_cache(self):
        self.calls.append("empty")

    def reset_peak_memory_stats(self, device):
        self.calls.append("reset")

    def max_memory_reserved(self, device):
        self.calls.append("read")
        return 123 * MIB


def test_the_probe_runs_steps_and_reads_the_peak(folder, monkeypatch):
    from volumen.time_budget import probe, trial_step

    config = config_of(folder, tr_config={"patch_size": [16, 16, 16], "batch_size": 1}, model_config=TINY)
    steps = []
    original = trial_step.TrialStep.step
    monkeypatch.setattr(
        trial_step.TrialStep,
        "step",
        lambda self, batch: (steps.append(batch["image"].shape), original(self, batch)),
    )
    state = torch.get_rng_state()
    memory = CountedMemory()
    assert measured_peak(config, memory) == 123 * MIB
    assert steps == [(1, 1, 16, 16, 16)] * probe.STEPS
    assert memory.calls == ["empty", "reset", "read", "empty"]
    assert torch.equal(state, torch.get_rng_state())

    def fails(self, batch):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(trial_step.TrialStep, "step", fails)
    assert measured_peak(config, memory) is None


def test_the_ladder_of_a_time_budget_ends_where_the_memory_does(folder, monkeypatch, proportional):
    config = config_of(folder, tr_config={"time_budget": "1h"})
    limited(monkeypatch, 2 * 64**3 * 16 + 1.0)
    found = fit._within_memory(config)
    assert found == candidates(config)[: len(found)]
    assert 0 < len(found) < len(candidates(config))
    limited(monkeypatch, 1.0)
    assert fit._within_memory(config) == [memory_fit.smallest(config)]


def fail_above(monkeypatch, voxels, after=0):
    """Let steps of more voxels run out of memory from the step after `after` on."""
    seen = []
    original = TrainStep.__call__

    def step(self, engine, batch):
        size = math.prod(batch["image"].shape[2:]) * batch["image"].shape[0]
        seen.append(size)
        if size > voxels and len(seen) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, engine, batch)

    monkeypatch.setattr(TrainStep, "__call__", step)
    return seen


def train(folder, out, *words):
    command = [
        "train",
        "-i",
        str(folder),
        "-o",
        str(out),
        *SHORT,
        "--set",
        "model_config.features_per_stage=[4,8]",
    ]
    return main([*command, *words])


def test_out_of_memory_in_the_first_steps_halves_the_batch_once(folder, tmp_path, monkeypatch, capsys):
    seen = fail_above(monkeypatch, 16**3)
    assert train(folder, tmp_path, "--patch-size", "16,16,16") == 0
    assert seen[0] == 2 * 16**3
    assert set(seen[1:]) == {16**3}
    error = capsys.readouterr().err
    assert error.count("out of memory in the first steps: starting again with 1 patch of 16x16x16") == 1
    snapshot = yaml.safe_load((tmp_path / "model" / "model_config.yaml").read_text())
    assert snapshot["tr_config"]["batch_size"] == 1
    # The resumed run keeps the batch.
    monkeypatch.undo()
    assert (
        train(folder, tmp_path, "--patch-size", "16,16,16", "--resume", "--set", "tr_config.max_epoch=2") == 0
    )
    snapshot = yaml.safe_load((tmp_path / "model" / "model_config.yaml").read_text())
    assert snapshot["tr_config"]["batch_size"] == 1


def test_out_of_memory_halves_the_patch_where_the_batch_is_the_user_s(folder, tmp_path, monkeypatch, capsys):
    seen = fail_above(monkeypatch, 64**3 - 1)
    assert train(folder, tmp_path, "--batch-size", "1") == 0
    assert seen[0] >= 64**3
    assert seen[-1] < 64**3
    assert "starting again with 1 patch of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--patch-size", "16,16,16", "--batch-size", "2"], ["--patch-size", "16,16,16"]]
)
def test_a_second_lack_of_memory_ends_with_advice(folder, tmp_path, monkeypatch, capsys, words):
    fail_above(monkeypatch, 0)
    assert train(folder, tmp_path / "out", *words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); use a smaller --patch-size" in last
    )
    assert not (tmp_path / "out").exists()


def test_a_later_lack_of_memory_starts_nothing_again(folder, tmp_path, monkeypatch, capsys):
    seen = fail_above(monkeypatch, 0, after=12)
    assert train(folder, tmp_path, "--patch-size", "16,16,16", "--steps-per-epoch", "20") == 2
    assert len(seen) == 13
    assert "starting again" not in capsys.readouterr().err


def test_a_container_s_limit_counts(tmp_path):
    for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "inactive_file 200000\nother 1")):
        (tmp_path / name).write_text(text)
    assert device_memory._rest(tmp_path / "max", tmp_path / "current", tmp_path / "stat") == 500000
    (tmp_path / "max").write_text("max")
    assert device_memory._rest(tmp_path / "max", tmp_path / "current", tmp_path / "stat") is None
    assert device_memory._rest(tmp_path / "no", tmp_path / "current", tmp_path / "stat") is None
    assert 0 < device_memory.main_memory() < 2**50


def test_inspect_shows_what_a_preset_chooses(folder, capsys):
    assert main(["inspect", str(folder), "--preset", "small"]) == 0
    output = capsys.readouterr()
    assert "memory: preset small" in output.err
    assert "GiB" in output.out
