"""Checkpoint files: complete or absent, verified, loaded without running code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_toys import make_trainer

from volumen.checkpoints import file as checkpoint_file
from volumen.checkpoints.file import (
    DamagedCheckpoint,
    checksum,
    load_checkpoint,
    plain,
    save_checkpoint,
)
from volumen.utils.errors import VolumenError

CONTENT = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "epoch": 3,
    "list": [1, 2.5, None, "text", True],
}


def test_round_trip(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])
    assert loaded["list"] == CONTENT["list"]
    assert "checksum" not in loaded
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_run_leaves_the_documented_keys_and_the_newest_files(tmp_path):
    trainer = make_trainer(tmp_path, epochs=13, length=2)
    trainer.run()
    folder = tmp_path / "toy"
    epochs = sorted(int(path.stem.split("_")[1]) for path in folder.glob("toy_[0-9]*.pth"))
    assert epochs == list(range(4, 14))
    # Read as a user would, without this program.
    content = torch.load(folder / "toy_13.pth", weights_only=True)
    assert {"model", "optimizer", "scheduler", "epoch", "model_config", "scaler", "rng", "config"} <= set(
        content
    )
    assert content["epoch"] == 13
    assert content["model_config"] == trainer.network.final_config
    assert list(content["model"]) == list(trainer.network.state_dict())
    assert content["optimizer"]["state"][0]["exp_avg"].shape == trainer.network.body.weight.shape
    best = torch.load(folder / "toy_best.pth", weights_only=True)
    assert best["epoch"] == content["best_metric_epoch"]


def test_best_are_retained_although_old(tmp_path):
    values = iter([0.1, 0.9, 0.5, 0.8, 0.2, 0.3])

    def set_metric(engine):
        engine.state.metrics["val/dice"] = next(values)

    from ignite.engine import Events

    from volumen.handlers.metric import KeyMetric

    trainer = make_trainer(tmp_path, epochs=6, keep=2, best=2, key_metric=KeyMetric("val/dice"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, set_metric)
    trainer.run()
    names = sorted(path.name for path in (tmp_path / "toy").glob("*.pth"))
    assert names == [
        "toy_5.pth",
        "toy_6.pth",
        "toy_best.pth",
        "toy_best_2.pth",
        "toy_best_4.pth",
        "toy_final.pth",
    ]
    assert load_checkpoint(tmp_path / "toy" / "toy_best.pth")["epoch"] == 2
    assert load_checkpoint(tmp_path / "toy" / "toy_6.pth")["best_metric"] == 0.9


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_harmless(tmp_path_factory, position, bit):
    path = tmp_path_factory.mktemp("flip") / "a.pth"
    save_checkpoint(CONTENT, path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(bytes(content))
    try:
        loaded = load_checkpoint(path)
    except DamagedCheckpoint:
        return
    # Padding and the archive's own metadata contain no data.
    assert checksum(loaded) == checksum(CONTENT)


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, -1])
def test_truncation_is_found(tmp_path, kept):
    path = tmp_path / "a.pth"
    save_checkpoint(CONTENT, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedCheckpoint, match=r"a\.pth: .*damaged"):
        load_checkpoint(path)


def test_a_foreign_file_and_an_absent_one(tmp_path):
    torch.save({"model": {}}, tmp_path / "foreign.pth")
    with pytest.raises(DamagedCheckpoint, match="no checkpoint of volumen"):
        load_checkpoint(tmp_path / "foreign.pth")
    with pytest.raises(VolumenError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pth")


def test_a_file_with_code_does_not_run_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"model": Evil(), "checksum": ""}, tmp_path / "evil.pth")
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("after", [0, 100, 5000])
def test_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, after):
    path = tmp_path / "a.pth"
    save_checkpoint(CONTENT, path)
    before = path.read_bytes()
    written = 0

    class Full(checkpoint_file._ErrorRecordingFile):
        def write(self, data):
            nonlocal written
            written += len(data)
            if written > after:
                self.error = OSError(errno.ENOSPC, "No space left on device")
                raise self.error
            return super().write(data)

    monkeypatch.setattr(checkpoint_file, "_ErrorRecordingFile", Full)
    with pytest.raises(VolumenError, match=r"the disk is full, a\.pth was not written; .*--resume"):
        save_checkpoint({**CONTENT, "more": torch.zeros(5000)}, path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(VolumenError, match="cannot be written"):
        save_checkpoint(CONTENT, tmp_path / "a.pth")


def test_plain_makes_what_loads_without_code(tmp_path):
    value = {
        "number": np.float64(1.5),
        "count": np.int64(3),
        "array": np.arange(3),
        "path": Path("a/b"),
        "pair": (1, np.bool_(True)),
        "version": torch.__version__,
    }
    made = plain(value)
    assert made["pair"] == [1, True]
    assert type(made["number"]) is float
    assert type(made["version"]) is str
    torch.save(made, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["path"] == "a/b"
    with pytest.raises(TypeError, match="may hold tensors and plain values, not object"):
        plain(object())


def test_checksum_tells_what_matters_apart():
    different = [
        {},
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": torch.ones(2, 3)},
        {"a": torch.ones(3, 2)},
        {"a": torch.ones(2, 3, dtype=torch.float64)},
        {"a": [1, [2]]},
        {"a": [[1], 2]},
        {"b": 1},
        {"a": float("nan")},
        {"a": torch.empty(0)},
    ]
    assert len({checksum(value) for value in different}) == len(different)
    transposed = torch.arange(6).reshape(2, 3).T
    assert checksum(transposed) == checksum(transposed.contiguous())


def test_the_best_epoch_and_its_file_are_logged_at_the_end(tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, epochs=3, scores=True).run()
    (line,) = [message for message in caplog.messages if message.startswith("best epoch")]
    best = tmp_path / "toy" / "toy_best.pth"
    assert line.endswith(f": {best}")
    assert line.startswith(f"best epoch: {load_checkpoint(best)['epoch']}, val/mean_dice ")


def test_every_reader_refuses_a_checkpoint_whose_content_was_altered(tmp_path):
    from volumen.checkpoints.finetune import load_weights
    from volumen.inference.predictor import read_checkpoint

    path = tmp_path / "model_1.pth"
    content = {"model": {"weight": torch.ones(3)}, "model_config": {}}
    save_checkpoint(content, path)
    written = torch.load(path, weights_only=True)
    read_checkpoint(path)
    written["model"]["weight"][1] = 2.0  # the file is complete for torch, but has another weight
    torch.save(written, path)
    for read in (load_checkpoint, read_checkpoint, lambda file: load_weights(torch.nn.Linear(1, 1), file)):
        with pytest.raises(VolumenError, match="expected checksum"):
            read(path)
