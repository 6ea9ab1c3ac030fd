"""The virtual environment in which nnU-Net runs, for measurements and tests beside it: it is no dependency of volumen.

    python benchmarks/nnunet_environment.py FOLDER

makes it, or finds it made, and prints its interpreter. Versions are pinned, so that results can be repeated.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = (
    "nnunetv2==2.8.1",
    "dynamic-network-architectures==0.4.4",
    "batchgenerators==0.25.5",
    "batchgeneratorsv2==0.3.6",
    "acvl-utils==0.2.6",
    "numpy==2.4.6",
    "scipy==1.17.1",
    "scikit-image==0.26.0",
)
STUB = '''"""Stands in for torchvision, which is imported but not used: no build fits a CPU-only torch."""

import enum
import importlib.abc
import importlib.machinery
import sys
import types

InterpolationMode = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Something


class _Something(metaclass=_Anything):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("torchvision is not installed here")


class _Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else _Something


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torchvision."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


__version__ = "0.0"
sys.meta_path.insert(0, _Finder())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Something
'''


def make_environment(folder: Path) -> Path:
    """Return the interpreter of the environment in a folder; it is made there if it is not complete.

    Args:
        folder: of the environment.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = folder / "complete.txt"
    if done.is_file() and done.read_text() == "\n".join(PINNED):
        return python
    _run([sys.executable, "-m", "venv", "--clear", folder])
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # torch's version and its CPU-only build are those of this project.
    _run([*pip, "install", "--no-cache-dir", "-c", ROOT / "constraints.txt", *PINNED])
    _run([*pip, "uninstall", "--yes", "torchvision"])
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(
        subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    )
    stub = packages / "torchvision"
    stub.mkdir(exist_ok=True)
    (stub / "__init__.py").write_text(STUB)
    done.write_text("\n".join(PINNED))
    return python


def _run(command: list[object]) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1])))
