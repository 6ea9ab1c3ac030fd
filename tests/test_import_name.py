"""`import volumen`: cheap, beside other projects' `scripts`, and every module under one name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import volumen

BUNDLE = ROOT / "bundle"


def python(code: str, cwd: Path, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there():
    for name in volumen.__all__:
        assert getattr(volumen, name) is not None
    assert set(volumen.__all__) <= set(dir(volumen))


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = volumen.nothing


def test_importing_loads_nothing_else(tmp_path):
    heavy = "import sys, volumen; print([m for m in ('torch', 'monai', 'numpy', 'volumen.api') if m in sys.modules])"
    assert python(heavy, tmp_path, BUNDLE) == "[]"


@pytest.mark.parametrize("is_package", [True, False])
def test_another_project_keeps_its_own_scripts(tmp_path, is_package):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "helper.py").write_text("ANSWER = 42\n")
    if is_package:
        (tmp_path / "scripts" / "__init__.py").touch()
    code = "import volumen.utils.errors, scripts.helper; print(scripts.helper.ANSWER, volumen.__version__)"
    # Ours comes first on the path, as MONAI puts a bundle's folder there.
    assert python(code, tmp_path, BUNDLE) == f"42 {volumen.__version__}"


def test_another_bundle_beside_this_one(tmp_path):
    other = tmp_path / "other"
    (other / "scripts").mkdir(parents=True)
    (other / "scripts" / "__init__.py").touch()
    (other / "scripts" / "net.py").write_text("NAME = 'other'\n")
    code = "import volumen.losses.dice; from scripts.net import NAME; print(NAME)"
    for paths in ((BUNDLE, other), (other, BUNDLE)):
        assert python(code, tmp_path, *paths) == "other"


def test_no_module_is_loaded_under_two_names(tmp_path):
    code = (
        "import sys, volumen\n"
        "for name in volumen.__all__: getattr(volumen, name)\n"
        "from volumen.config.experiment_file import shipped_sections; shipped_sections()\n"
        "files = [m.__file__ for n, m in list(sys.modules.items())"
        " if (getattr(m, '__file__', None) or '').startswith(sys.argv[1] if len(sys.argv) > 1 else '/')"
        " and '/bundle/' in m.__file__]\n"
        "assert len(files) == len(set(files)) > 50, len(files)\n"
        "print([n for n in sys.modules if n.split('.')[0] == 'scripts'])"
    )
    assert python(code, tmp_path, BUNDLE) == "[]"


def test_no_file_of_the_bundle_names_scripts_as_a_package():
    for path in BUNDLE.rglob("*"):
        if path.suffix in {".py", ".yaml", ".json", ".conf"}:
            text = path.read_text()
            assert "from scripts" not in text, path
            assert "_target_: scripts" not in text, path
            assert "import scripts" not in text, path


def test_derive_equals_an_analytic_distance():
    label = np.zeros((9, 9), np.uint8)
    label[:, 4:] = 1
    distance, valid = volumen.derive(label, "distance_transform")
    expected = 3.5 - np.arange(9.0)
    np.testing.assert_allclose(distance[0], np.broadcast_to(expected, (9, 9)))
    assert valid.all()
    physical, _ = volumen.derive(label, "distance_transform", spacing=(2.0, 3.0))
    np.testing.assert_allclose(physical[0], np.broadcast_to(3 * expected, (9, 9)))


def test_derive_claims_nothing_where_the_label_is_unknown():
    label = np.zeros((9, 12), np.uint8)
    label[:, 6:] = 1
    mask = np.ones_like(label)
    mask[:, :4] = 0
    _, valid = volumen.derive(label, "surface_normals", mask=mask)
    assert not valid[0, :, :4].any()


def test_derive_says_what_is_wrong():
    with pytest.raises(volumen.VolumenError, match=r"distance_transform.*nearest|distance_transform"):
        volumen.derive(np.zeros((4, 4), np.uint8), "distance_transfrom")
    with pytest.raises(volumen.VolumenError, match=r"mask: expected shape \(4, 4\), found \(4, 5\)"):
        volumen.derive(np.zeros((4, 4), np.uint8), "distance_transform", mask=np.zeros((4, 5)))
