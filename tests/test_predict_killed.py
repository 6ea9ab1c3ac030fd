"""A prediction that is killed at any change of its files goes on, with the same command, to the same bytes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from prediction import save_checkpoint

from volumen.cli.main import main
from volumen.inference.postprocess import cleaning, instance_output

KILLED = -signal.SIGKILL
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Audit events of what changes a folder; a file that is written is renamed in the end."""
COMMANDS = {
    "zarr": "--targets ink,tissue --threshold 0.5 --min-size 3 --instances ink",
    "tif": "--targets ink,normals --threshold 0.5 --fill-holes 5 --format tif --no-pyramid",
}
PASSES = {
    "zarr": (
        "/components/tissue-0/block_",
        "/tissue/0/c/",
        "/instances/flooded_pieces/block_",
        "/instances/edges/rows_",
        "/instances/edges/regions",
        "/ink_instances/0/c/",
        "/ink/1/c/",
        "os.rmdir",
    ),
    "tif": (
        "/holes/ink-0/block_",
        "/filled/labels/ink/0/c/",
        "/components/ink-0/block_",
        "scan_",
        "os.rmdir",
    ),
}
"""What is changed in each pass, in their order; the last is the end, when the state is removed."""


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path, monkeypatch):
    """Return the words of a command in several blocks, without the output."""
    if "--instances" in COMMANDS[request.param]:
        pytest.importorskip("bioimage_cpp")
    monkeypatch.setattr(cleaning, "BLOCK_VOXELS", 1)
    monkeypatch.setattr(instance_output, "BLOCK_VOXELS", 1)
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    zarr.create_array(tmp_path / "scan.zarr", data=image, chunks=image.shape)
    save_checkpoint(tmp_path / "m.pth")
    words = f"predict -i {tmp_path}/scan.zarr -m {tmp_path}/m.pth --overlap 0 --device cpu --amp off --quiet"
    return [*words.split(), *COMMANDS[request.param].split()]


def run(words: list[str], kill_at: int | None = None, only: str = "") -> int:
    """Run a command in a process of its own, and return how many changes it made, or `KILLED`.

    Args:
        words: the command.
        kill_at: number, from 1, of the change before which it is killed.
        only: what is counted, by a part of a path or by the kind of change.
    """
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words, kill_at, only, writing))
    process.start()
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    process.join()
    if process.exitcode == KILLED:
        return KILLED
    assert process.exitcode == 0
    return int(told)


def _run(words: list[str], kill_at: int | None, only: str, writing: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in CHANGES and any(only in str(word) for word in (event, *arguments)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = main(words)
    os.write(writing, str(count).encode())
    os._exit(code)


def content(folder: Path) -> dict[str, str]:
    """Return a hash per file of a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_prediction_killed_at_any_change_of_its_files_goes_on(command, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = run([*command, "-o", str(whole)])
    wanted = content(whole)
    killed = 0
    for moment in range(1, changes, 5):
        killed += run([*command, "-o", str(broken)], moment) == KILLED
        assert run([*command, "-o", str(broken)]) > 0, moment
        assert content(broken) == wanted, moment
        shutil.rmtree(broken)
    assert killed > changes // 6


def test_a_prediction_killed_in_each_of_its_passes_goes_on(command, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run([*command, "-o", str(whole)])
    for words in PASSES["tif" if "tif" in command else "zarr"]:
        assert run([*command, "-o", str(broken)], 2, words) == KILLED, words
    run([*command, "-o", str(broken)])
    assert content(broken) == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["zarr"], indirect=True)
@pytest.mark.parametrize("moment", [1, 2, 9, 12, 15])
def test_an_earlier_prediction_that_was_half_removed_is_made_again(command, tmp_path, moment):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for output in (whole, broken):
        run([*command, "-o", str(output)])
    other = [*command, "-o", str(broken), "--overlap", "0.5", "--overwrite"]
    assert run(other, moment, "os.rmdir") == KILLED
    run([*command, "-o", str(broken)])
    assert content(broken) == content(whole)
