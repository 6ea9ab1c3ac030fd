"""`make platforms` finds interpreters, and says which it did not find."""

from __future__ import annotations

import os
import subprocess
import sys

import platforms
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the interpreters are shell scripts")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with pyenv's 3.98, and a shim for 3.99 that says that the version is not installed."""
    write(tmp_path / "pyenv/versions/3.98.4/bin/python", "echo 3.98")
    write(tmp_path / "shims/python3.99", "echo 'command not found' >&2; exit 127")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:/bin:/usr/bin")
    return tmp_path


def write(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_interpreters_are_found_by_what_they_say(machine):
    uv = write(machine / "uv", "exit 2")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert platforms.find_interpreter(uv, own) == sys.executable
    assert platforms.find_interpreter(uv, "3.98").endswith("3.98.4/bin/python")
    assert platforms.find_interpreter(uv, "3.99") is None
    managed = write(machine / "managed", "echo 3.99")
    assert platforms.find_interpreter(write(machine / "uv2", f"echo {managed}"), "3.99") == managed


@pytest.mark.parametrize(("code", "said"), [(0, "passed"), (1, "FAILED")])
def test_the_summary_names_every_job(machine, monkeypatch, capfd, code, said):
    """One version whose tests end with a code, one that is not installed."""
    commands = []

    def record(command, **options):
        commands.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, code if "pytest" in command else 0, "", "")

    uv = write(machine / "uv", "exit 2")
    monkeypatch.setattr(platforms, "VERSIONS", ("3.98", "3.99"))
    monkeypatch.setattr(platforms, "find_uv", lambda folder: uv)
    found = {version: platforms.find_interpreter(uv, version) for version in ("3.98", "3.99")}
    monkeypatch.setattr(platforms, "find_interpreter", lambda uv, version: found[version])
    monkeypatch.setattr(platforms.subprocess, "run", record)
    assert platforms.main(["--folder", str(machine / "environments")]) == code
    lines = capfd.readouterr().out.splitlines()[-4:]
    for line, job in zip(lines[:2], ("3.98-newest", "3.98-lowest"), strict=True):
        assert line.startswith(f"Python {job}: {said} with ")
    for line in lines[2:]:
        assert "not run: no Python 3.99 found" in line
    lowest = next(command for command in commands if "lowest-direct" in command)
    assert "constraints.txt" not in lowest
    assert "--upgrade" in lowest
    newest = next(command for command in commands if ".[test]" in command)
    assert newest[newest.index("-c") + 1] == "constraints.txt"
    assert sum("check" in command for command in commands) == 2


def test_packages_that_cannot_be_installed_fail_the_job(machine, monkeypatch):
    uv = write(machine / "uv", "exit 2")
    result = platforms.run_job(uv, "3.98-lowest", machine / "environments")
    assert result.startswith("FAILED")


def test_the_named_tests_exist():
    assert all((platforms.ROOT / "tests" / name).is_file() for name in platforms.TESTS)
