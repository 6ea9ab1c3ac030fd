"""A voxel size that the user gives has no unit of the files behind it."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from data_folders import ball

from volumen.cli.main import main
from volumen.evaluation.pairing import find_cases
from volumen.evaluation.request import EvaluateRequest


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, shift in (("labels/a_ball", 0), ("predictions/a_ball", 2)):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir()
        image = nibabel.Nifti1Image(np.roll(ball((16, 20, 24)), shift, 0).T.copy(), np.diag([1.0, 1, 3, 1]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)
        paths.append(str(path))
    return paths


def cases_of(files, **settings):
    label, prediction = files
    return find_cases(EvaluateRequest(prediction, label, None, **settings))


def test_the_unit_of_the_files_belongs_to_their_spacing_only(files):
    (stated,) = cases_of(files)
    assert (stated.stated_unit, stated.scale_of_voxels.unit) == ("millimeter", "mm")
    (given,) = cases_of(files, spacing=(2.0, 2.0, 2.0))
    assert (given.stated_unit, given.scale_of_voxels.unit) == (None, "units of the spacing")
    (unit,) = cases_of(files, spacing=(1.0, 1.0, 1.0))
    assert unit.scale_of_voxels.unit == ""


def test_evaluate_prints_no_unit_of_the_files_behind_given_sizes(files, tmp_path, capsys):
    label, prediction = files
    words = ["evaluate", "-p", prediction, "-l", label, "--metrics", "hd95", "-o", str(tmp_path / "out")]
    assert main([*words, "--spacing", "2,2,2"]) == 0
    printed = capsys.readouterr()
    written = (tmp_path / "out" / "report.html").read_text()
    for text in (printed.out, printed.err, written):
        assert "millimeter" not in text
        assert " mm" not in text
