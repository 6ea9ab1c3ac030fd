"""The pages' templates: what comes in is text, what is missing is an error."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT
from jinja2 import UndefinedError
from test_evaluate import write

from volumen.evaluation.html.pages import TEMPLATES, render_page
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate

HOSTILE = "<script>alert(1)<|script>'\"&{{ 7*7 }}{% raw %}"


def test_names_of_files_and_targets_become_text_and_never_markup(tmp_path):
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 5:15] = 1
    write(tmp_path / "found" / f"{HOSTILE}_<b>ink.tif", truth)
    write(tmp_path / "data" / "labels" / f"{HOSTILE}_<b>ink.tif", truth)
    write(tmp_path / "data" / "labels" / f"<i>{HOSTILE}_<b>ink.tif", truth)
    evaluate(EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out")))
    page = (tmp_path / "out" / "report.html").read_text()
    for markup in ("<script", "<b>ink", "<i>&", "49"):
        assert markup not in page.partition("</style>")[2].partition("<img")[0]
    assert "<script" not in page
    # In text, in the attribute of the picture, in the list of what is missing.
    assert page.count("&lt;script&gt;alert(1)&lt;|script&gt;&#39;&#34;&amp;{{ 7*7 }}{% raw %}") >= 4


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render_page("report.html")


def test_the_templates_lie_beside_the_code():
    assert TEMPLATES == ROOT / "bundle" / "scripts" / "evaluation" / "html" / "templates"
