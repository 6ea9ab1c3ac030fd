"""Run a short part of the suite on each supported Python, with the newest and with the lowest dependencies.

    python tests/platforms.py [3.12-newest ...] [--folder FOLDER]

Each job has a separate environment in FOLDER (default: .platforms), which uv installs and later runs reuse. If an
interpreter is not installed, its jobs are left out, and the summary names it. The first run downloads a build of torch
for each Python and resolution; on Linux an environment takes about 5.5 GB, unless UV_TORCH_BACKEND=cpu or UV_FIND_LINKS
lead to a smaller build. uv's cache is in FOLDER too, unless UV_CACHE_DIR names another: who removes FOLDER removes all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = ("newest", "lowest")
#: Extras of the lowest jobs; other packages of the extra `test` would raise the bounds that these jobs test.
EXTRAS = ("remote", "export", "dask", "instances")
TOOLS = ("pytest>=8.3", "hypothesis>=6.115")
#: Every reader and writer, the numerics, training, resuming, prediction, export.
TESTS = (
    "test_tiff_volume.py", "test_zarr_volume.py", "test_nifti_volume.py", "test_png_volume.py", "test_fetch.py",
    "test_file_faults.py", "test_without_posix.py", "test_fields.py", "test_tasks.py", "test_multihead.py",
    "test_losses_reference.py", "test_trainer.py", "test_resume.py", "test_predict.py", "test_writers.py",
    "test_predict_cluster.py", "test_export.py",
)  # fmt: skip


def find_uv(folder: Path) -> str:
    """Return the command uv: the installed one, else one that pip installs into the folder."""
    beside = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if beside:
        return beside
    environment = folder / "uv"
    own = environment / ("Scripts" if os.name == "nt" else "bin")
    if not (own / "uv").exists() and not (own / "uv.exe").exists():
        _run([sys.executable, "-m", "venv", environment])
        _run([_python(environment), "-m", "pip", "install", "--quiet", "uv"])
    return str(own / "uv")


def find_interpreter(uv: str, version: str) -> str | None:
    """Return an interpreter of a version: this one, pyenv's, uv's, or one on the path; None if there is none."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    managed = subprocess.run(
        [uv, "python", "find", "--managed-python", "--no-python-downloads", version],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    candidates = [
        sys.executable,
        *(str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python"), reverse=True)),
        managed.stdout.strip(),
        shutil.which(f"python{version}"),
    ]
    return next((path for path in candidates if path and _version(path) == version), None)


def _version(path: str) -> str | None:
    """Return the version that an interpreter reports; None if it does not run, like a shim of pyenv."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def install(uv: str, interpreter: str, resolution: str, environment: Path) -> str:
    """Install this project and its dependencies into an environment; return its interpreter."""
    if not environment.is_dir():
        _run([uv, "venv", "--quiet", "--python", interpreter, environment])
    python = _python(environment)
    pip = [uv, "pip", "install", "--quiet", "--python", python, *_find_links()]
    if resolution == "newest":
        _run([*pip, "--upgrade", "-c", "constraints.txt", "-e", ".[test]"])
    else:
        extras = [word for extra in EXTRAS for word in ("--extra", extra)]
        # Wheels only: the lowest version that this Python can have without a compiler. Without --upgrade an environment
        # of an earlier run would keep packages above bounds that were lowered since.
        lowest = ["--upgrade", "--no-build", "--resolution", "lowest-direct"]
        _run([*pip, *lowest, "-r", "pyproject.toml", *extras, *TOOLS])
        _run([*pip, "--no-deps", "-e", "."])
    _run([uv, "pip", "check", "--quiet", "--python", python])
    return python


def _find_links() -> list[str]:
    """Return uv's options for the folders of wheels with which pip is configured."""
    places = os.environ.get("PIP_FIND_LINKS", "").split()
    return [word for place in places for word in ("--find-links", place)]


def _python(environment: Path) -> str:
    return str(environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


def run_job(uv: str, job: str, folder: Path) -> str:
    """Install and test one combination; return its line of the summary."""
    version, resolution = job.split("-")
    interpreter = find_interpreter(uv, version)
    if interpreter is None:
        return f"not run: no Python {version} found (pyenv install {version}, or uv python install {version})"
    try:
        python = install(uv, interpreter, resolution, folder / job)
    except subprocess.CalledProcessError:
        return "FAILED: its packages cannot be installed"
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    done = subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *tests], cwd=ROOT, check=False)
    return f"passed with {interpreter}" if done.returncode == 0 else f"FAILED with {interpreter}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs and write a line for each; return 1 if one failed."""
    jobs = [f"{version}-{resolution}" for version in VERSIONS for resolution in RESOLUTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(jobs)} (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".platforms", help="holds the environments")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.jobs) - set(jobs))
    if unknown:
        parser.error(f"no such job: {', '.join(unknown)}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("UV_CACHE_DIR", str(folder / "cache"))
    uv = find_uv(folder)
    results = {}
    for job in options.jobs or jobs:
        sys.stdout.write(f"== Python {job}\n")
        sys.stdout.flush()
        results[job] = run_job(uv, job, folder)
    sys.stdout.write("".join(f"Python {job}: {result}\n" for job, result in results.items()))
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
