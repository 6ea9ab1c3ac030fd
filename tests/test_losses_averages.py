"""Averages of losses over an epoch, and heads that learn nothing."""

from __future__ import annotations

import logging

import torch
from training_toys import ToyData, make_trainer


class Unlabelled(ToyData):
    """Data in which no voxel of `ink` counts before an epoch."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        if key[0] < self.until:
            sample["ink_mask"] = torch.zeros_like(sample["ink_mask"])
        return sample


def test_a_head_without_a_counted_voxel_is_warned_of_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, epochs=3, data=Unlabelled(until=2)).run()
    warnings = [record.message for record in caplog.records if "learned nothing" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("epoch 1: no voxel of target ink counted")


def test_a_head_that_learns_is_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, epochs=2).run()
    assert "learned nothing" not in caplog.text
