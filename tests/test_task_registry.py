"""The registered tasks, their properties, and the entries that are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from volumen.derived import registry as task_registry
from volumen.derived.derivation import derive_target
from volumen.derived.registry import (
    DerivedTask,
    derive_halo,
    register_task,
    task_kind,
    task_out_channels,
    task_types,
    validate_task,
)
from volumen.utils.errors import VolumenError

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"


@pytest.mark.parametrize(
    ("name", "kind", "channels_2d", "channels_3d"),
    [
        ("distance_transform", "distance", 1, 1),
        ("surface_normals", "vector", 2, 3),
        ("structure_tensor", "tensor", 3, 6),
        ("inplane_direction", "axis", 2, 3),
        ("nearest_component", "field", 3, 4),
        ("skeleton", "binary", 1, 1),
        ("boundary", "binary", 1, 1),
        ("affinities", "multilabel", 2, 3),
        ("local_shape_descriptors", "field", 6, 10),
    ],
)
def test_kinds_and_channels(name, kind, channels_2d, channels_3d):
    assert name in task_types()
    assert task_kind(name) == kind
    assert task_out_channels(name, 2, {}) == channels_2d
    assert task_out_channels(name, 3, {}) == channels_3d


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "distance_transform", "distance_type": "signed", "loss_weight": 0.1, "losses": []},
        {"type": "surface_normals", "source_target": "surface", "losses": [{"name": "CosineSimilarityLoss"}]},
        {"type": "structure_tensor", "compute_from": "sdt", "grad_sigma": 1.0, "tensor_sigma": 1.5},
        {"type": "inplane_direction", "compute_from": "binary", "ignore_index": -100},
        {"type": "affinities", "offsets": [[-1, 0, 0], [0, -9, 0]]},
    ],
)
def test_entries_as_people_write_them_are_accepted(entry):
    validate_task("task", entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "auxiliary_tasks.t: no type; add type: one of"),
        ({"type": "surface_normal"}, "auxiliary_tasks.t.type: expected one of"),
        ({"type": "surface_normal"}, "did you mean surface_normals?"),
        ({"type": ["surface_normals"]}, "auxiliary_tasks.t.type: expected one of"),
        ({"type": "surface_normals", "grad_sgma": 1}, "did you mean grad_sigma?"),
        ({"type": "surface_normals", "grad_sigma": -1}, "grad_sigma: expected a finite number of at least 0"),
        ({"type": "surface_normals", "reach": 0}, "reach: expected a finite number above 0, found 0"),
        ({"type": "surface_normals", "reach": "far"}, "found 'far'"),
        ({"type": "distance_transform", "distance_type": "sined"}, "did you mean signed?"),
        ({"type": "distance_transform", "classes": [1, 2], "out_channels": 3}, "expected 1 (all classes"),
        ({"type": "distance_transform", "classes": "all"}, "expected a list of class numbers"),
        ({"type": "structure_tensor", "compute_from": "image"}, "expected one of sdt, binary"),
        ({"type": "affinities", "offsets": [[-1, 0], [0, 0, 1]]}, "offsets: expected auto, or a list"),
        ({"type": "affinities", "offsets": []}, "offsets: expected auto, or a list"),
        ({"type": "affinities", "offsets": [[1], [2]]}, "offsets: expected auto, or a list"),
        ({"type": "affinities", "offsets": [[1.5, 0]]}, "offsets: expected auto, or a list"),
        ({"type": "local_shape_descriptors", "sigma": 0}, "sigma: expected a number above 0"),
        ({"type": "skeleton", "angle": 190}, "angle: expected degrees between 0 and 180"),
        ({"type": "skeleton", "angle": 180}, "angle: expected degrees between 0 and 180"),
        ({"type": "skeleton", "angle": 0}, "angle: expected degrees between 0 and 180"),
        ({"type": "skeleton", "angle": True}, "angle: expected degrees between 0 and 180"),
    ],
)
def test_wrong_entries_are_refused_in_one_line(entry, message):
    with pytest.raises(VolumenError, match=re.escape(message)) as caught:
        validate_task("t", entry)
    assert "\n" not in str(caught.value)


def test_halo_is_the_reach_and_the_filters():
    reach = {"type": "distance_transform", "reach": 10.0}
    tensor = {"type": "structure_tensor", "reach": 10.0}
    binary = {"type": "structure_tensor", "compute_from": "binary"}
    assert derive_halo({}, (1, 1, 1)) == (0, 0, 0)
    assert derive_halo({"a": reach}, (1, 1, 1)) == (10, 10, 10)
    assert derive_halo({"a": reach}, (4, 1)) == (2, 10)
    assert derive_halo({"a": tensor}, (1, 1)) == (21, 21)
    assert derive_halo({"a": binary}, (1, 1)) == (11, 11)
    assert derive_halo({"a": reach, "b": binary}, (1, 1)) == (11, 11)
    assert derive_halo({"a": {"type": "affinities", "offsets": [[-3, 0], [0, 5]]}}, (1, 1)) == (3, 5)


@pytest.fixture
def clean_registry(monkeypatch):
    task_types()
    monkeypatch.setattr(task_registry, "_TASKS", dict(task_registry._TASKS))


def test_a_class_registered_by_a_user_is_a_task(clean_registry):
    @register_task
    class Thickness(DerivedTask):
        type_name = "sheet_thickness"
        kind = "distance"
        defaults: ClassVar = {"reach": None}

        def derive(self, source, params):
            signed, valid = source.signed_distance(params["reach"])
            return 2 * (-signed).clip(min=0)[None], valid[None]

    validate_task("mine", {"type": "sheet_thickness", "source_target": "a"})
    label = np.zeros((1, 5, 20), np.uint8)
    label[..., 6:11] = 1
    values, valid = derive_target("sheet_thickness", label)
    assert valid.all()
    assert values.max() == 5
    assert derive_halo({"mine": {"type": "sheet_thickness"}}, (1, 1)) == (16, 16)

    with pytest.raises(ValueError, match="already defined by"):
        register_task(type("Other", (Thickness,), {}))
    with pytest.raises(ValueError, match="has no type_name"):
        register_task(type("Nameless", (DerivedTask,), {}))


class _Point:
    def __init__(self, load):
        self.name, self.value, self.load = "theirs", "package.tasks:Theirs", load


def test_installed_entry_points_are_tasks(clean_registry, monkeypatch):
    theirs = type("Theirs", (DerivedTask,), {"type_name": "theirs", "kind": "vector"})
    monkeypatch.setattr(task_registry, "entry_points", lambda group: [_Point(lambda: theirs)])
    monkeypatch.setattr(task_registry, "_loaded_entry_points", False)
    assert task_kind("theirs") == "vector"


def test_an_entry_point_that_fails_is_named(clean_registry, monkeypatch):
    def fail():
        raise ImportError("no module named package")

    monkeypatch.setattr(task_registry, "entry_points", lambda group: [_Point(fail)])
    monkeypatch.setattr(task_registry, "_loaded_entry_points", False)
    with pytest.raises(VolumenError, match=r"entry point theirs = package\.tasks:Theirs: cannot be loaded"):
        task_types()


def test_the_registry_imports_neither_numba_nor_torch():
    code = (
        "import sys; from volumen.derived.registry import task_types, derive_halo; task_types();"
        "derive_halo({'a': {'type': 'structure_tensor'}}, (1, 1));"
        "print([name for name in ('numba', 'torch', 'numpy', 'scipy', 'monai') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(BUNDLE)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_kernels_compile_where_no_cache_can_be_written(tmp_path):
    package = tmp_path / "kernels.py"
    package.write_text(
        "from volumen.utils.jit import compiled\n\n@compiled\ndef double(x):\n    return 2 * x\n"
    )
    code = (
        "import sys\n"
        "from numba.core import caching\n"
        "def refuse(self): raise OSError('read-only file system')\n"
        "caching._CacheLocator.ensure_cache_path = refuse\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kernels\n"
        "print(kernels.double(21))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(BUNDLE)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "42", done.stderr


def test_a_derivation_accepts_the_keys_that_the_configuration_checks_for_every_task():
    from dataclasses import fields

    from volumen.config.parts.targets import AuxiliaryTaskConfig
    from volumen.derived.registry import COMMON_KEYS

    assert {field.name for field in fields(AuxiliaryTaskConfig)} == COMMON_KEYS
