"""`volumen info`: what a report of a problem needs, and no path of the machine unless asked."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main

CHECKPOINT = Path(__file__).parent / "compatibility" / "0.1.0" / "model_2.pth"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder with a file of 1.5 MB."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "x.npz").write_bytes(bytes(1_500_000))
    monkeypatch.setattr("volumen.data.caching.index_cache.default_cache_dir", lambda: folder)
    return folder


def report(capsys, *words: str) -> dict[str, dict[str, str]]:
    """Run the command; return value by name by section."""
    assert main(["info", *words]) == 0
    found: dict[str, dict[str, str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            section = found.setdefault(line, {})
        else:
            name, _, value = line.strip().partition("  ")
            section[name] = value.strip()
    return found


def test_versions_are_those_that_run(capsys, cache):
    found = report(capsys)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["scipy"] == metadata.version("scipy")
    assert f"h5py {metadata.version('h5py')}" in found["extras"]["formats"]
    assert "test" not in found["extras"]
    assert found["cache"] == {"files": "1, 1.5 MB"}
    assert "checkpoint" not in found


def test_a_missing_package_is_named(capsys, cache, monkeypatch):
    def version(name: str) -> str:
        if name == "h5py":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert "h5py not installed" in report(capsys)["extras"]["formats"]


def test_no_path_unless_asked(capsys, cache):
    main(["info", "-m", str(CHECKPOINT)])
    text = capsys.readouterr().out
    for path in (str(Path.home()), str(Path.cwd()), str(cache), str(CHECKPOINT.parent), sys.prefix):
        assert path not in text
    main(["info", "-m", str(CHECKPOINT), "--paths"])
    text = capsys.readouterr().out
    assert str(CHECKPOINT) in text
    assert str(cache) in text
    assert sys.executable in text


def test_a_checkpoint_is_described(capsys, cache):
    found = report(capsys, "-m", str(CHECKPOINT))["checkpoint"]
    weights = sum(value.numel() for value in load_checkpoint(CHECKPOINT)["model"].values())
    assert found["weights"] == f"{weights / 1e6:.2f} M"
    assert found["epoch"] == "2 of 2"
    assert found["patch"] == "16x16x16 voxels, batches of 1"
    assert found["heads"].startswith("sheet (1 channel, a decoder of its own), distance (1 channel,")


def test_a_checkpoint_that_is_none_ends_before_the_report(capsys, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    assert main(["info", "-m", str(tmp_path / "x.pth")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert str(tmp_path / "x.pth") in shown.err
