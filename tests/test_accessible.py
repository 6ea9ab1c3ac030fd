"""Pages of the site and a report in a headless browser, judged by axe-core: no violation, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from test_evaluate import write
from test_report_browser import CHROMIUM, FLAGS
from test_site import build_site

from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine, which fetches axe-core"),
]

AXE = "axe-core@4.11.0"
RUN = """<script>onload = () => axe.run(document, {resultTypes: ['violations']}).then(found => {
  document.title = 'AXE' + JSON.stringify(found.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 120))]))
})</script>"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The script of axe-core, fetched by npm; it is no part of the project."""
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(
        ["npm", "pack", AXE, "--silent"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"npm fetches no {AXE}: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode().replace("</script", "<\\/script")


def violations(axe, page, profile, scheme):
    """Return what axe-core finds in a page, with what the browser shows in a scheme of colours."""
    copy = page.with_name("axe_copy.html")
    text = page.read_text()
    assert "</body>" in text
    # Not by a template of `re`: the script has backslashes.
    head, _, tail = text.rpartition("</body>")
    copy.write_text(f"{head}<script>{axe}</script>{RUN}</body>{tail}")
    colours = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    command = [CHROMIUM, *FLAGS, colours, f"--user-data-dir={profile}", "--window-size=1300,1200"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom", copy.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    copy.unlink()
    found = re.search(r"<title>AXE(.*?)</title>", shown, re.DOTALL)
    assert found, "axe-core did not run"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages."""
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["", "quickstart", "targets", "stories/nuclei"])
def test_a_page_has_no_violation(axe, site, page, scheme, tmp_path):
    assert violations(axe, site / page / "index.html", tmp_path / "profile", scheme) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_has_no_violation(axe, tmp_path, scheme):
    grid = np.indices((6, 40, 40))
    truth = (np.hypot(grid[1] - 20, grid[2] - 20) < 12).astype(np.uint8)
    for name, shift in (("first", 0), ("second", 9)):
        write(tmp_path / "found" / f"{name}_ink.tif", np.roll(truth, shift, axis=1))
        write(tmp_path / "data" / "labels" / f"{name}_ink.tif", truth)
    evaluate(EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out")))
    assert violations(axe, tmp_path / "out" / "report.html", tmp_path / "profile", scheme) == []
