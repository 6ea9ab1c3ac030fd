"""Training within a given time: durations, the choice, the schedule, and a resumed run."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from data_folders import ball, write_tiff_folder
from hypothesis import given
from hypothesis import strategies as st
from two_processes import in_two_processes

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.time_budget import fit
from volumen.time_budget import measure as measure_module
from volumen.time_budget.candidates import PRESETS, Candidate, candidates
from volumen.time_budget.duration import format_duration, parse_duration
from volumen.time_budget.heads import decoder_line, left_out
from volumen.time_budget.measure import Cost, measure
from volumen.utils.errors import VolumenError

SMALL = Candidate((16, 16, 16), 2, (4, 8), (1, 1), 0.003)


@pytest.fixture
def folder(tmp_path):
    label = ball((24, 48, 48))
    return write_tiff_folder(tmp_path / "data", {"a": {"ball": label.astype("uint8")}})


def config_of(folder, **sections):
    return ConfigManager(
        dataset_dir=str(folder), output_dir=str(folder.parent / "out"), device="cpu", **sections
    )


def measured(parameters: int, seconds: float, steps: int) -> fit.Measured:
    return fit.Measured(SMALL, Cost(seconds, 0.0, seconds / 3, parameters), seconds, steps)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("35m", 2100),
        ("12h", 43200),
        ("1h30m", 5400),
        ("1.5 h", 5400),
        ("90s", 90),
        ("1d", 86400),
        ("2H 5M", 7500),
    ],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "35", "m", "35 minutes", "-5m", "0m", "1h?"])
def test_other_texts_are_no_durations(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.integers(60, 10**6))
def test_a_written_duration_is_read_back_to_its_precision(seconds):
    assert parse_duration(format_duration(seconds)) == pytest.approx(
        seconds, abs=0.5 if seconds < 3600 else 30.5
    )


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(10**5, 10**8)), min_size=1, max_size=6),
    st.floats(10, 1e6),
)
def test_the_choice_has_enough_steps_where_any_has_and_the_most_capacity_among_those(costs, budget):
    entries = [measured(parameters, seconds, int(budget / seconds)) for seconds, parameters in sorted(costs)]
    chosen = fit.choose(entries)
    sufficient = [entry for entry in entries if entry.steps >= entry.needed]
    if sufficient:
        assert chosen.steps >= chosen.needed
        assert chosen.seconds == max(entry.seconds for entry in sufficient)
    else:
        assert all(chosen.steps / chosen.needed >= entry.steps / entry.needed for entry in entries)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_augmentation_grows_with_the_passes_over_the_data(one, other):
    low, high = sorted((one, other))
    assert 0 <= fit.augment_strength(low) <= fit.augment_strength(high) <= 1


def test_augmentation_is_none_in_a_short_run_and_full_in_a_long_one():
    assert fit.augment_strength(20) == 0
    assert fit.augment_strength(2000) == 1


def test_time_per_step_counts_the_preparation_of_patches():
    cost = Cost(step=1.0, patch=0.25, forward=0.3, parameters=1)
    # In the training process the preparation and the step follow each other.
    assert cost.per_step(2, workers=0, cpu_threads=1, cores=4) == 1.5
    # A worker on its own core prepares during the step ...
    assert cost.per_step(2, workers=1, cpu_threads=1, cores=2) == 1.0
    # ... but not if the network uses all cores: then the worker delays all of the network's threads, ...
    assert cost.per_step(2, workers=1, cpu_threads=2, cores=2) == 1.5
    assert cost.per_step(2, workers=2, cpu_threads=4, cores=4) == 1.25
    # ... nor if patches take longer than the step on a GPU.
    assert cost.per_step(16, workers=2, cpu_threads=0, cores=8) == 2.0
    # Each of four processes on eight cores has two cores for its workers, and the GPU needs none of them.
    assert cost.per_step(16, workers=4, cpu_threads=0, cores=2) == 2.0
    # Two processes use one core, so a patch and a step were both measured at half the speed.
    assert cost.per_step(2, workers=2, cpu_threads=1, cores=0.5) == 1.5


def test_candidates_grow_and_leave_the_user_s_settings(folder):
    free = candidates(config_of(folder))
    assert len(free) > 1
    assert free[0].features_per_stage[0] == PRESETS[3][0].features
    fixed = candidates(
        config_of(
            folder,
            tr_config={"patch_size": [16, 16, 16], "batch_size": 3, "initial_lr": 0.01},
            model_config={"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1]},
        )
    )
    assert fixed == [Candidate((16, 16, 16), 3, (4, 8), (1, 1), 0.01)]


@pytest.mark.parametrize("given", [12, 32])
def test_candidates_have_the_user_s_features_of_the_first_stage(folder, given):
    own = candidates(config_of(folder, model_config={"base_features": given}))
    assert {candidate.features_per_stage[0] for candidate in own} == {given}
    assert len({candidate.features_per_stage[0] for candidate in candidates(config_of(folder))}) > 1
    assert config_of(folder).plan.features_per_stage[0] == 32


def test_small_networks_share_a_decoder_where_there_are_several_targets(folder):
    task = {"type": "distance_transform", "source_target": "ball", "losses": [{"name": "SmoothL1Loss"}]}
    assert all(candidate.separate_decoders for candidate in candidates(config_of(folder)))
    several = candidates(config_of(folder, auxiliary_tasks={"distance": task}))
    assert not several[0].separate_decoders
    assert several[-1].separate_decoders
    kept = several[0].applied_to(
        config_of(folder, auxiliary_tasks={"distance": {**task, "separate_decoder": True}})
    )
    assert [head["separate_decoder"] for head in kept.network_config["heads"].values()] == [False, True]


def test_without_autoconfigure_only_the_steps_are_chosen(folder):
    config = config_of(folder, tr_setup={"autoconfigure": False}, tr_config={"patch_size": [16, 16, 16]})
    (only,) = candidates(config)
    assert only.features_per_stage == config.plan.features_per_stage
    assert only.blocks_per_stage == config.plan.blocks_per_stage


def test_measuring_times_the_run_s_own_objects_and_leaves_random_numbers_alone(folder):
    import torch

    before = torch.get_rng_state()
    cost = measure(config_of(folder), SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert cost is not None
    assert min(cost.step, cost.patch, cost.forward) > 0
    assert cost.parameters == sum(weight.numel() for weight in network_of(folder).parameters())


def network_of(folder):
    from volumen.networks.multihead import MultiHeadDynUNet

    return MultiHeadDynUNet.from_config(SMALL.applied_to(config_of(folder)).network_config)


@given(st.floats(30, 10**6), st.floats(0.001, 5), st.sampled_from([64, 640, 6400]))
def test_the_schedule_fills_the_time_and_no_more(seconds, step, length):
    entry = measured(10**6, step, 1)
    config = Scheduled()
    config.split = SimpleNamespace(val={"a": [((0, 40), (0, 64), (0, length))]})
    plan = fit.plan_schedule(config, entry, seconds)
    training = plan["max_epoch"] * plan["max_steps_per_epoch"] * step
    validations = math.ceil(plan["max_epoch"] / plan["val_every_n"])
    validation = validations * plan["max_val_steps_per_epoch"] * entry.cost.forward * fit.VALIDATION_FACTOR
    most, whole = plan["max_val_steps_per_epoch"], fit._validation_batches(config)[2]
    ending = min(plan["final_val_steps"] or whole, whole)
    assert most <= ending
    # The last and the best epoch are scored again if this covers more of the validation part.
    validation += 2 * ending * entry.cost.forward * fit.VALIDATION_FACTOR if ending > most else 0
    assert plan["warmup_epochs"] < plan["max_epoch"]
    if seconds > 100 * step:
        assert training + validation <= seconds * 1.001
        assert training >= 0.75 * seconds


class Scheduled:
    """The attributes of a configuration that planning a schedule needs."""

    validates = True
    world_size = 1
    patch_size = (16, 16, 16)
    tr_config = SimpleNamespace(batch_size=2, max_val_steps_per_epoch=50, final_val_steps=None)
    split = SimpleNamespace(val={"a": [((0, 40), (0, 64), (0, 64))]})


def test_a_run_within_a_budget_and_its_resumption(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fit, "candidates", lambda config: [SMALL])
    monkeypatch.setattr(fit, "measure", lambda *_, **__: asked.append(1) or Cost(0.5, 0.01, 0.1, 10**4))
    monkeypatch.setattr(fit, "EPOCHS", 3)
    command = [
        "train",
        "-i",
        str(folder),
        "-o",
        str(tmp_path / "out"),
        "--time-budget",
        "4s",
        "--workers",
        "0",
    ]
    command += ["--quiet", "--device", "cpu"]
    assert main(command) == 0
    run = tmp_path / "out" / "model"
    snapshot = yaml.safe_load((run / "model_config.yaml").read_text())
    assert snapshot["tr_config"]["time_budget"] is None
    assert "4s" in snapshot["tr_config"]["time_budget_choice"]
    assert snapshot["model_config"]["features_per_stage"] == [4, 8]
    epochs = snapshot["tr_config"]["max_epoch"]
    with (run / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == epochs
    assert main([*command, "--resume"]) == 0  # already finished: nothing is trained or measured again
    assert asked == [1]
    assert yaml.safe_load((run / "model_config.yaml").read_text()) == snapshot
    command[command.index("4s")] = "8s"  # twice the time: as many epochs again
    for _ in range(2):  # the second finds that all of the time is planned already
        assert main([*command, "--resume"]) == 0
        with (run / "metrics.csv").open() as file:
            assert [int(row["epoch"]) for row in csv.DictReader(file)] == [*range(1, 2 * epochs + 1)]
    longer = yaml.safe_load((run / "model_config.yaml").read_text())["tr_config"]
    assert longer["time_budget_choice"].startswith(f"8s on cpu: {2 * epochs} x ")
    assert asked == [1]


@pytest.mark.parametrize(
    ("budget", "epochs"), [("4s", 10), ("3s", 10), ("4.3s", 10), ("4.5s", 11), ("6s", 15), ("1m", 150)]
)
def test_a_larger_budget_adds_epochs_at_the_planned_rate(budget, epochs):
    kept = {
        "tr_config": {
            "max_epoch": 10,
            "time_budget_choice": "4s on cpu: 10 x 5 steps of 0.07 s",
            "batch_size": 2,
        }
    }
    found = fit.extended(kept, parse_duration(budget))["tr_config"]
    assert found["max_epoch"] == epochs
    assert found["time_budget_choice"].endswith(f" on cpu: {epochs} x 5 steps of 0.07 s")
    assert found["batch_size"] == 2


def _choose(rank: int, folder: Path, out: Path) -> None:
    seconds = measure_module._seconds
    delay = 0.2 * rank  # one process is slower than the other

    def slow(work, device):
        time.sleep(delay)
        return delay + seconds(work, device)

    fit.candidates = lambda config: [SMALL, replace(SMALL, features_per_stage=(8, 16))]
    measure_module._seconds = slow
    config = fit.within_budget(
        config_of(folder, tr_config={"time_budget": "40s", "num_dataloader_workers": 0})
    )
    settings = {"tr_config": asdict(config.tr_config), "model_config": asdict(config.model_config)}
    (out / f"{rank}.json").write_text(json.dumps(settings))


def test_several_processes_choose_alike_and_by_the_slowest(folder, tmp_path):
    assert in_two_processes(_choose, folder, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    choice = first["tr_config"]["time_budget_choice"]
    assert "on 2 x cpu" in choice
    assert float(choice.split(" of ")[1].split()[0]) >= 0.2


def _overflow(rank: int, folder: Path, out: Path) -> None:
    import torch

    def full(work, device):
        raise torch.OutOfMemoryError

    if rank:
        measure_module._seconds = full
    cost = measure(config_of(folder, tr_config={"num_dataloader_workers": 0}), SMALL)
    (out / f"{rank}.txt").write_text(str(cost))


def test_a_network_too_large_for_the_memory_of_one_process_is_out_for_all(folder, tmp_path):
    assert in_two_processes(_overflow, folder, tmp_path) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["None", "None"]


def test_validation_is_planned_for_one_process_s_part_of_the_blocks():
    config = Scheduled()
    alone = fit._validation_batches(config)
    assert alone == (50, 1.0, 54)
    config.world_size = 2  # 50 of 54 batches are about 12 blocks
    assert fit._validation_batches(config) == (50, 0.5, 54)
    config.world_size = 5
    assert fit._validation_batches(config) == (50, pytest.approx(3 / 12), 54)
    config.world_size = 100
    assert fit._validation_batches(config) == (50, 1.0, 54)


def test_a_budget_for_less_than_a_step_is_refused(folder, monkeypatch):
    monkeypatch.setattr(fit, "measure", lambda *_, **__: Cost(60.0, 1.0, 20.0, 10**6))
    with pytest.raises(VolumenError, match=r"tr_config\.time_budget: expected time for at least one step"):
        fit.within_budget(config_of(folder, tr_config={"time_budget": "30s", "patch_size": [16, 16, 16]}))


@pytest.mark.parametrize("nothing", ["0m", "0.0h"])
def test_a_budget_of_nothing_is_refused(folder, nothing):
    with pytest.raises(VolumenError, match=rf"time_budget: expected a time above 0, .*found '{nothing}'"):
        fit.within_budget(config_of(folder, tr_config={"time_budget": nothing}))


def test_an_epoch_may_have_fewer_patches_than_are_timed(folder):
    settings = {
        "patch_size": [16, 16, 16], "max_steps_per_epoch": 1, "batch_size": 1, "num_dataloader_workers": 0
    }  # fmt: skip
    assert measure(config_of(folder, tr_config=settings), SMALL) is not None


def test_a_budget_with_too_few_steps_says_that_the_model_will_be_weak_and_what_would_be_enough(
    folder, monkeypatch, caplog
):
    chosen = measured(2_430_000, 1.0, 166)
    assert chosen.needed == 624
    told = fit.too_short(chosen, 200.0)
    assert told.startswith("time budget 3m20s allows 166 steps where 624 are enough: expect a weak model.")
    # 200 s * 624 / 166 = 751.8 s.
    assert f"About {format_duration(751.8)} on this machine" in told
    monkeypatch.setattr(fit, "_resolve", lambda *given: {"tr_config": {}, "model_config": {}})
    for steps, warns in ((166, True), (624, False)):
        monkeypatch.setattr(fit, "_measure_all", lambda *given, n=steps: [measured(2_430_000, 1.0, n)])
        caplog.clear()
        fit.within_budget(config_of(folder, tr_config={"time_budget": "200s"}))
        assert ("expect a weak model" in caplog.text) is warns


def test_the_cost_of_derived_heads_is_measured_and_logged(folder, monkeypatch, caplog):
    distance = {"type": "distance_transform", "source_target": "ball", "losses": [{"name": "L1Loss"}]}
    normals = {
        "type": "surface_normals",
        "source_target": "ball",
        "losses": [{"name": "CosineSimilarityLoss"}],
    }
    tasks = {"far": distance, "out": normals}

    def cost(config, candidate, **_):
        names = set(config.auxiliary_tasks)
        return Cost(0.5 + 0.25 * ("far" in names) + 0.005 * ("out" in names), 0.0, 0.1, 2_430_000)

    monkeypatch.setattr(fit, "candidates", lambda config: [SMALL])
    monkeypatch.setattr(fit, "measure", cost)
    monkeypatch.setattr(fit, "_elapsed", lambda *given: 0.0)  # else a slow machine has fewer steps
    monkeypatch.setattr(fit, "_resolve", lambda *given: {"tr_config": {}, "model_config": {}})
    config = config_of(folder, tr_config={"time_budget": "420s"}, auxiliary_tasks=tasks)
    with caplog.at_level("INFO"):
        fit.within_budget(config)
    # 0.86 * 420 s of 0.755 s, 0.5 s and 0.505 s; 624 steps are enough.
    assert (
        "derived targets far, out: 34% of a step; without, 722 steps instead of 478, and 624" in caplog.text
    )
    assert "derived target far: 33% of a step; without, 715 steps instead of 478" in caplog.text
    assert "derived target out: hardly any part of a step" in caplog.text
    fused = {"targets": {"ball": {"fuse": ["far"]}}}
    caplog.clear()
    with caplog.at_level("INFO"):
        fit.within_budget(
            config_of(folder, tr_config={"time_budget": "420s"}, auxiliary_tasks=tasks, dataset_config=fused)
        )
    assert "derived target out" in caplog.text
    assert "derived target far" not in caplog.text


def optional_tasks(*names: str) -> dict[str, dict]:
    loss = [{"name": "L1Loss"}]
    return {
        name: {"type": "distance_transform", "source_target": "ball", "losses": loss, "optional": True}
        for name in names
    }


def test_optional_heads_are_left_out_only_until_the_steps_are_enough(folder):
    """0.86 * 420 s: with all heads 361 steps, without `dear` 516, without `dear` and `fair` 722; 624 are enough."""
    tasks = {**optional_tasks("fair", "dear", "cheap", "free"), "asked": optional_tasks("asked")["asked"]}
    tasks["asked"]["optional"] = False
    config = config_of(folder, auxiliary_tasks=tasks)
    all_heads = measured(2_430_000, 1.0, 361)
    cost = {"fair": 0.2, "dear": 0.3, "cheap": 0.1, "free": 0.01, "asked": 0.4}
    without = {(name,): measured(2_430_000, 1.0 - part, 0) for name, part in cost.items()}
    names, fewer = left_out(config, all_heads, without)
    assert names == ["fair", "dear"]
    assert fewer.seconds == pytest.approx(0.5)
    assert fewer.steps == 722
    enough = replace(all_heads, steps=624)
    assert left_out(config, enough, without) == ([], enough)
    names, fewer = left_out(config, replace(all_heads, steps=30), without)
    assert names == ["fair", "dear", "cheap"]  # never one that costs nothing, never one that is not optional
    assert left_out(config, all_heads, {}) == ([], all_heads)  # there was no time to measure any


def test_a_head_that_a_fusion_reads_is_not_left_out(folder):
    config = config_of(
        folder,
        auxiliary_tasks=optional_tasks("far", "near"),
        dataset_config={"targets": {"ball": {"fuse": ["far"]}}},
    )
    one = measured(2_430_000, 1.0, 100)
    without = {(name,): measured(2_430_000, 0.6, 0) for name in ("far", "near")}
    assert left_out(config, one, without)[0] == ["near"]


def test_a_run_without_its_optional_head_and_its_resumption(folder, tmp_path, monkeypatch, capsys):
    def cost(config, candidate, **_):
        return Cost(0.5 if "far" in config.auxiliary_tasks else 0.25, 0.01, 0.1, 10**4)

    monkeypatch.setattr(fit, "candidates", lambda config: [SMALL])
    monkeypatch.setattr(fit, "measure", cost)
    monkeypatch.setattr(fit, "_elapsed", lambda *given: 0.0)  # else a slow machine does not measure heads
    monkeypatch.setattr(fit, "EPOCHS", 3)
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump({"auxiliary_tasks": optional_tasks("far")}))
    command = [
        "train",
        "-i",
        str(folder),
        "-o",
        str(tmp_path / "out"),
        "--config-path",
        str(experiment),
        "--quiet",
    ]
    command += ["--time-budget", "4s", "--workers", "0", "--device", "cpu"]
    assert main(command) == 0
    run = tmp_path / "out" / "model"
    snapshot = yaml.safe_load((run / "model_config.yaml").read_text())
    assert snapshot["tr_config"]["time_budget_left_out"] == ["far"]
    assert snapshot["auxiliary_tasks"] == {}
    assert "leaves out the optional far" in capsys.readouterr().err
    monkeypatch.setattr(fit, "measure", None)  # a resumed run measures nothing
    command[command.index("4s")] = "8s"
    assert main([*command, "--resume"]) == 0
    longer = yaml.safe_load((run / "model_config.yaml").read_text())
    assert longer["tr_config"]["time_budget_left_out"] == ["far"]
    assert longer["tr_config"]["max_epoch"] == 2 * snapshot["tr_config"]["max_epoch"]


def test_a_shared_decoder_is_explained():
    shared = replace(measured(2_430_000, 1.0, 700), candidate=replace(SMALL, separate_decoders=False))
    separate = measured(8_000_000, 2.0, 350)
    assert separate.needed == 1131
    told = decoder_line([shared, separate], shared)
    assert told is not None
    assert told.endswith("with a decoder each there are 350 steps where 1131 are enough")
    assert decoder_line([shared], shared) is None
    assert decoder_line([shared, replace(separate, steps=2000)], separate) is None


def test_a_budget_that_is_no_duration_is_told(folder):
    with pytest.raises(VolumenError, match=r"tr_config\.time_budget"):
        config_of(folder, tr_config={"time_budget": "soon"})
