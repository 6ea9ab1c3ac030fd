"""The documentation says what the program does."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_the_table_of_settings_is_up_to_date():
    command = [sys.executable, str(ROOT / "docs" / "make_configuration.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run python docs/make_configuration.py"


def test_every_dependency_has_a_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = requirement.split(">")[0].split("<")[0].split("=")[0].strip()
        assert f"| {name} |" in reasons, name
