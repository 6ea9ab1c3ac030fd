"""The run's folder: not created before training, removed after a failed start, locked for one writer."""

from __future__ import annotations

import multiprocessing

import pytest
from training_toys import ToyData, make_trainer

from volumen.handlers.records.run_directory import RunDirectory
from volumen.utils.errors import VolumenError


class Broken(ToyData):
    """A data set that cannot be read from some sample on."""

    def __init__(self, first: int) -> None:
        super().__init__(8)
        self.first = first

    def __getitem__(self, key):
        if key[0] * 8 + key[1] >= self.first:
            raise VolumenError("images/a.zarr", "chunk 0.0.0 is damaged")
        return super().__getitem__(key)


def test_nothing_is_made_before_training(tmp_path):
    make_trainer(tmp_path / "out")
    RunDirectory(tmp_path / "out", "toy").check()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", [0, 5])
def test_failing_before_the_first_checkpoint_leaves_nothing(tmp_path, first):
    with pytest.raises(VolumenError, match=r"images/a\.zarr: chunk"):
        make_trainer(tmp_path / "deep" / "out", data=Broken(first)).run()
    assert not (tmp_path / "deep").exists()


def test_failing_leaves_what_was_there(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(VolumenError):
        make_trainer(tmp_path, data=Broken(3)).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "toy"]
    assert not list((tmp_path / "toy").iterdir())


def test_failing_after_a_checkpoint_keeps_it(tmp_path):
    with pytest.raises(VolumenError):
        make_trainer(tmp_path, data=Broken(10)).run()
    names = {path.name for path in (tmp_path / "toy").iterdir()}
    assert "toy_1.pth" in names
    assert ".lock" not in names


def test_an_existing_run_is_refused_without_resume(tmp_path):
    make_trainer(tmp_path, epochs=2).run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    with pytest.raises(
        VolumenError, match=r"holds a run of 'toy' already \(2 epochs done\); go on with --resume"
    ):
        make_trainer(tmp_path).run()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_refused(tmp_path, resume):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("...")
    with pytest.raises(VolumenError, match=r"expected an empty folder or a run of 'toy', found thesis.tex"):
        RunDirectory(tmp_path, "toy", resume=resume).check()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(VolumenError, match="expected a folder"):
        RunDirectory(tmp_path / "out", "toy").check()


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(VolumenError, match=r"tr_setup\.model_name"):
        RunDirectory(tmp_path, name)


def _try_to_open(out, answer) -> None:
    try:
        RunDirectory(out, "toy").open()
        answer.put("opened")
    except VolumenError as error:
        answer.put(str(error))


def test_one_writer_at_a_time(tmp_path):
    first = RunDirectory(tmp_path, "toy")
    first.open()
    with pytest.raises(VolumenError, match="this process is training here"):
        RunDirectory(tmp_path, "toy").open()
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    second = context.Process(target=_try_to_open, args=(tmp_path, answer))
    second.start()
    # A forked process inherits the set of locked folders, so either message may come.
    assert "is training here" in answer.get(timeout=20)
    second.join()
    first.close()
    again = RunDirectory(tmp_path, "toy")
    again.open()
    again.close(failed=True)


def _hold(out, ready, release) -> None:
    RunDirectory(out, "toy").open()
    ready.set()
    release.wait(30)
    # Ends without closing, like a killed process.
    import os

    os._exit(1)


def test_a_dead_writers_lock_does_not_hold(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(VolumenError, match=rf"process {holder.pid} on .* is training here"):
        RunDirectory(tmp_path, "toy").open()
    release.set()
    holder.join()
    assert (tmp_path / "toy" / ".lock").exists()
    directory = RunDirectory(tmp_path, "toy")
    directory.open()
    directory.close()
