"""Classes that are rare: how often they are drawn, and when one counts as unlearned."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_folders import image_of, write_tiff_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from volumen.cli.main import main
from volumen.data.index.patch_index import PatchIndex, PatchTable
from volumen.data.sampling.sampler import PatchSampler, plan_epoch
from volumen.engines.schedules import build_scheduler
from volumen.handlers.rare_classes import LEARNED, MOST, PATIENCE, RATE, ClassHistory, RareClasses, rarity

CLASSES = (("tissue", 1), ("tissue", 2))


def index_of(shown=(400, 4), patches=400):
    """An index in which the first patches show each class in their middle."""
    bits = np.array([[int(row < count) for row in range(patches)] for count in shown], np.uint64)
    bits = bits.reshape(len(shown), patches)
    table = PatchTable(
        region=np.zeros(patches, np.int32),
        start=np.zeros((patches, 3), np.int32),
        share=np.ones(patches, np.float32),
        shifts=np.ones(patches, np.uint64),
        class_shifts=bits,
    )
    none = table.rows(np.zeros(0, int))
    region = ((0, ((0, 8),) * 3),)
    return PatchIndex((8,) * 3, (4,) * 3, region, ((0,) * 3,), CLASSES[: len(shown)], table, none)


def handler_of(index=None, *, follow=True):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = build_scheduler("constant", optimizer, 100)
    names = {"tissue/dice/1": CLASSES[0], "tissue/dice/2": CLASSES[1]}
    return RareClasses(names, index or index_of(), PatchSampler(8), schedule, follow=follow), optimizer


def run(handler, curve, name="tissue/dice/2"):
    for epoch, score in enumerate(curve, start=1):
        metrics = {} if score is None else {f"val/{name}": score, "val/tissue/dice/1": 0.9}
        handler(SimpleNamespace(state=SimpleNamespace(metrics=metrics, epoch=epoch)))


def alarms(curve):
    history = ClassHistory()
    return [history.add(score) for score in curve]


@given(
    plateau=st.floats(0.05, 1.0),
    rise=st.integers(1, 30),
    noise=st.lists(st.floats(-0.25, 0.25), min_size=60, max_size=60),
)
def test_a_noisy_curve_that_rises_to_a_plateau_is_no_alarm(plateau, rise, noise):
    curve = [plateau * min(1, (i + 1) / rise) * (1 + step) for i, step in enumerate(noise)]
    assert not any(alarms(curve))


@given(
    spikes=st.sets(st.integers(0, 59), max_size=12),
    level=st.floats(0.0, 0.5),
)
def test_single_lucky_validations_are_no_alarm(spikes, level):
    apart = [i for i in sorted(spikes) if i - 1 not in spikes]
    assert not any(alarms([1.0 if i in apart else level for i in range(60)]))


@given(
    dips=st.lists(st.integers(1, PATIENCE - 1), max_size=8),
    best=st.floats(LEARNED, 1.0),
)
def test_short_dips_are_no_alarm(dips, best):
    curve = [best, best]
    for length in dips:
        curve += [0.0] * length + [best]
    assert not any(alarms(curve))


@given(best=st.floats(LEARNED, 1.0), low=st.floats(0.0, 0.49), before=st.integers(2, 20))
def test_a_learned_class_that_stays_below_half_is_an_alarm(best, low, before):
    found = alarms([best] * before + [low * best] * PATIENCE)
    assert found == [False] * (before + PATIENCE - 1) + [True]


def test_a_class_that_was_never_learned_is_no_alarm():
    assert not any(alarms([LEARNED * 0.9] * 5 + [0.0] * 20))


def test_an_unlearned_class_lowers_the_rate_and_is_drawn_once(caplog):
    handler, optimizer = handler_of()
    with caplog.at_level(logging.WARNING, "volumen"):
        run(handler, [0.6, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * RATE)
    assert len(caplog.records) == 1
    assert "epoch 5: tissue/dice/2 0.1 (best 0.6): unlearned, below half of the best for 3" in caplog.text
    assert "draws these classes into half of the patches" in caplog.text
    assert handler.sampler.class_shares == (0.0, MOST)


def test_without_recorded_classes_the_line_names_the_setting(caplog):
    handler, optimizer = handler_of(index_of(shown=()), follow=False)
    with caplog.at_level(logging.WARNING, "volumen"):
        run(handler, [0.6, 0.6, 0.1, 0.1, 0.1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * RATE)
    assert "dataset_config.class_oversampling: auto" in caplog.text
    assert handler.sampler.class_shares is None


def test_epochs_without_a_score_change_nothing():
    handler, optimizer = handler_of()
    run(handler, [0.6, 0.6, None, 0.1, None, 0.1, None, float("nan")])
    assert optimizer.param_groups[0]["lr"] == 0.1
    run(handler, [None, 0.1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * RATE)


def test_a_resumed_run_goes_on_with_the_same_counts_rates_and_shares():
    curve = [0.6, 0.6, 0.1, 0.1, 0.1, 0.3, 0.2]
    whole, of_whole = handler_of()
    run(whole, curve)
    for cut in range(len(curve)):
        first, _ = handler_of()
        run(first, curve[:cut])
        second, optimizer = handler_of()
        second.scheduler.load_state_dict(first.scheduler.state_dict())
        second.load_state_dict(first.state_dict())
        assert second.sampler.class_shares == first.sampler.class_shares
        run(second, curve[cut:])
        assert second.state_dict() == whole.state_dict()
        assert second.sampler.class_shares == whole.sampler.class_shares
        assert optimizer.param_groups[0]["lr"] == of_whole.param_groups[0]["lr"]


def test_shares_follow_rarity_and_score():
    handler, _ = handler_of()
    common, rare = handler.shares()
    assert common == 0  # each patch shows it
    assert 0.4 < rare <= MOST
    run(handler, [0.9])
    assert handler.shares()[1] == pytest.approx(rare * (1 - 0.9 / 2), abs=0.01)
    handler, _ = handler_of(index_of(shown=(4, 4)))
    assert handler.shares()[0] == handler.shares()[1] == pytest.approx(MOST / 2, abs=0.01)


@given(st.lists(st.integers(0, 1), max_size=50))
def test_rarity_falls_with_the_share_of_patches(shown):
    values = np.array(shown, np.uint64)
    share = float(np.mean(values)) if shown else 1.0
    assert 0 <= rarity(values) <= 1
    assert (rarity(values) == 0) == (share >= 0.33 or not shown)


@given(
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    samples=st.integers(1, 300),
    epoch=st.integers(0, 5),
)
@settings(max_examples=50)
def test_samples_by_class_are_as_many_as_the_shares_say_and_show_the_class(shares, samples, epoch):
    index = index_of()
    plan = plan_epoch(index, seed=3, epoch=epoch, samples=samples, class_shares=shares)
    for k, share in enumerate(shares):
        rows = plan.row[plan.class_row == k]
        assert len(rows) == int(samples * share)
        assert index.foreground.class_shifts[k][rows].all()
    again = plan_epoch(index, seed=3, epoch=epoch, samples=samples, class_shares=shares)
    assert np.array_equal(plan.row, again.row)


def test_shares_of_zero_draw_as_without_classes():
    index = index_of()
    one = plan_epoch(index, seed=3, epoch=2, samples=50)
    other = plan_epoch(index, seed=3, epoch=2, samples=50, class_shares=(0.0, 0.0))
    assert np.array_equal(one.row, other.row)
    assert (other.class_row == -1).all()


def test_keys_carry_the_shares_to_the_workers():
    sampler = PatchSampler(3)
    assert list(sampler) == [(0, 0), (0, 1), (0, 2)]
    sampler.class_shares = (0.0, 0.25)
    assert list(sampler)[1] == (0, 1, (0.0, 0.25))


def test_a_training_follows_the_classes_and_resumes(tmp_path, monkeypatch):
    label = np.zeros((32, 64, 64), np.uint8)
    label[:, :, :30] = 1
    label[10:14, 40:44, 50:54] = 2
    folder = write_tiff_folder(
        tmp_path / "data",
        {name: {"tissue": label} for name in "ab"},
        images={n: image_of(label) for n in "ab"},
    )
    drawn = []
    original = PatchSampler.__iter__

    def record(self):
        keys = list(original(self))
        drawn.append(keys[0][2] if len(keys[0]) > 2 else None)
        return iter(keys)

    monkeypatch.setattr(PatchSampler, "__iter__", record)
    words = [
        "train", "-i", str(folder), "-o", str(tmp_path / "out"), "--patch-size", "16,16,16", "--batch-size", "2",
        "--steps-per-epoch", "2", "--val-steps", "8", "--workers", "0",
        "--set", "model_config.features_per_stage=[4,8]", "--set", "dataset_config.class_oversampling=auto",
    ]  # fmt: skip
    assert main([*words, "--max-epochs", "2"]) == 0
    assert len(drawn) == 2
    assert drawn[0][0] == 0  # common
    assert drawn[0][1] > 0.2
    before = list(drawn)
    assert main([*words, "--max-epochs", "3", "--resume"]) == 0
    assert len(drawn) == 3
    assert drawn[2][0] == 0
    assert 0.2 < drawn[2][1] <= before[0][1] + 1e-9
