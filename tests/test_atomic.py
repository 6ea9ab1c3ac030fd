"""Files that are complete or absent after any interruption of the writing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from volumen.utils.files.atomic import UNFINISHED, replacing, sync_file, write_atomically


@pytest.mark.parametrize("content", [b"new", lambda file: file.write(b"new")])
def test_a_file_is_written_over_what_was_there(tmp_path, content):
    path = tmp_path / "a.txt"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == b"new"
        assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")

    def crash(file):
        file.write(b"ne")
        raise error

    with pytest.raises(error):
        write_atomically(path, crash)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_error_after_writing_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(OSError, match="Input/output"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_content_then_name_then_folder_reach_the_disk(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor):
        done.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink()), (tmp_path / "a").exists()))
        fsync(descriptor)

    def rename(source, target):
        done.append(("rename", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write_atomically(tmp_path / "a", b"content")
    temporary = done[0][1]
    assert done == [
        ("sync", temporary, False),
        ("rename", temporary, str(tmp_path / "a")),
        ("sync", str(tmp_path), True),
    ]


def test_a_file_made_under_a_temporary_name_is_flushed_on_request(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    sync_file(tmp_path / "a")
    assert flushed == [(tmp_path / "a").stat().st_ino]


def test_what_a_killed_process_leaves_is_found_by_its_name(tmp_path):
    with replacing(tmp_path / "a.npz") as temporary:
        temporary.write_bytes(b"half")
        assert list(tmp_path.glob(UNFINISHED)) == [temporary]
        sync_file(temporary)
    assert (tmp_path / "a.npz").read_bytes() == b"half"


def test_writers_of_one_file_at_once_do_not_mix(tmp_path):
    path = tmp_path / "a"
    together = threading.Barrier(4)

    def write(file, value):
        together.wait()
        file.write(value[:50_000])
        together.wait()
        file.write(value[50_000:])

    values = [bytes([number]) * 100_000 for number in range(4)]
    threads = [
        threading.Thread(target=write_atomically, args=(path, lambda file, value=value: write(file, value)))
        for value in values
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in values
    assert names(tmp_path) == ["a"]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
