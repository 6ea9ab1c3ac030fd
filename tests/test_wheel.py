"""What an installation holds: code and the bundle's files in a wheel, nothing beside a checkout."""

from __future__ import annotations

import zipfile

import pytest
from conftest import ROOT

from volumen.utils.bundle_root import bundle_root, license_text


def names(folder, version: str) -> set[str]:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (path,) = builder.build(directory=str(folder), versions=[version])
    return set(zipfile.ZipFile(path).namelist())


def test_a_wheel_holds_the_bundle_inside_the_package(tmp_path):
    held = names(tmp_path, "standard")
    for file in bundle_root().rglob("configs/**/*.yaml"):
        assert f"volumen/_bundle/{file.relative_to(bundle_root())}" in held
    assert {
        "volumen/cli/main.py",
        "volumen/_bundle/models/model.pt",
        "volumen/_bundle/docs/README.md",
    } <= held
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert all(name.startswith(("volumen/", "volumen-")) for name in held)


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    """Not only modules: templates of pages and manifests are read at run time too."""
    code = ROOT / "bundle" / "scripts"
    files = [file.relative_to(code) for file in code.rglob("*") if file.is_file()]
    shipped = {f"volumen/{file}" for file in files if "__pycache__" not in file.parts}
    assert "volumen/evaluation/html/templates/report.html" in shipped
    assert shipped <= names(tmp_path, "standard")


def test_an_editable_installation_points_here_and_copies_nothing(tmp_path):
    held = names(tmp_path, "editable")
    assert {name for name in held if ".dist-info/" not in name} == {"_volumen.pth"}


def test_the_licence_is_found(monkeypatch, tmp_path):
    assert "Apache License" in license_text()
    # In a wheel the bundle's root has no LICENSE of its own.
    monkeypatch.setattr("volumen.utils.bundle_root.bundle_root", lambda: tmp_path)
    assert license_text() == (ROOT / "LICENSE").read_text()
