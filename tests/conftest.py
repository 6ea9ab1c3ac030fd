"""Shared pieces of the tests."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("VOLUMEN_DATA", ROOT.parent / "shared" / "data"))

torch.set_num_threads(1)
# Machines are shared, so an example may take any time; the same examples everywhere, so a failure is everyone's.
settings.register_profile("volumen", deadline=None, derandomize=True)
settings.load_profile("volumen")


DISK = 2e9
"""Bytes that the tests write at most, with room for the environment's caches."""


def pytest_sessionstart():
    """Stop before the first test on a disk that is too full, where hundreds of tests would fail or crawl."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < DISK:
        folder = tempfile.gettempdir()
        pytest.exit(
            f"{folder}: the tests need about {DISK / 1e9:.0f} GB of free disk, found {free / 1e9:.1f} GB", 3
        )


@pytest.fixture
def real_data():
    """Return a function that gives the folder of a real data set, or skips the test where it is absent."""

    def folder(name: str) -> Path:
        path = REAL_DATA / name
        if not path.is_dir():
            pytest.skip(f"real data set {name!r} is not on this machine (set VOLUMEN_DATA)")
        return path

    return folder


@pytest.fixture
def without_compiler():
    """Let PyTorch find no C++ compiler."""
    from torch._inductor import config, cpp_builder

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        cpp_builder.cpp_compiler_search.cache_clear()
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch):
    """Undo what a command run inside a test does to logging and warnings, which are the process's."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    root = logging.getLogger()
    handlers, filters = list(root.handlers), list(warnings.filters)
    names = ("", "volumen", "monai", "monai.bundle.workflows", "ignite", "tifffile", "py.warnings")
    levels = {name: logging.getLogger(name).level for name in names}
    # A fixture of a whole module runs before this one, and may have run a command.
    levels["volumen"] = logging.NOTSET
    logging.getLogger("volumen").setLevel(logging.NOTSET)
    yield
    os.environ.pop("TQDM_DISABLE", None)
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    warnings.filters[:] = filters
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
