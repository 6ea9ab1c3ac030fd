"""The documentation as a site, in a headless browser: nothing is cut off, every picture is there and has a text."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_report_browser import CHROMIUM, FLAGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

WIDTHS = (1300, 400)
# What the browser made of a page: code that is wider than its column, and pictures that are absent or without a text.
LOOK = """
<script>onload = () => { document.title = JSON.stringify({
  cut: [...document.querySelectorAll('pre > code')].filter(c => c.scrollWidth > c.clientWidth + 1)
    .map(c => c.textContent.split('\\n').sort((a, b) => b.length - a.length)[0]),
  pictures: [...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).map(i => i.src),
  dark: document.body.getAttribute('data-md-color-scheme') == 'slate',
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}) }</script>
"""


def build_site(folder):
    """Build the pages in a folder, and return it."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages, each with a script that looks at it."""
    folder = build_site(tmp_path_factory.mktemp("site"))
    for page in folder.rglob("index.html"):
        text = page.read_text()
        page.write_text(text.replace("</body>", LOOK + "</body>").replace('loading="lazy"', ""))
    return folder


def pages() -> list[str]:
    docs = ROOT / "docs"
    found = [*docs.glob("*.md"), *docs.glob("stories/*.md")]
    return sorted(path.relative_to(docs).with_suffix("").as_posix() for path in found)


CASES = [(name, width, "light") for name in pages() for width in WIDTHS] + [("index", 1300, "dark")]


@pytest.mark.parametrize(("name", "width", "scheme"), CASES)
def test_a_page_shows_all_it_has(site, name, width, scheme, tmp_path):
    page = site / ("index.html" if name == "index" else f"{name}/index.html")
    colours = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    command = [CHROMIUM, *FLAGS, colours, f"--user-data-dir={tmp_path}", f"--window-size={width},1200"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", shown, re.DOTALL).group(1).replace("&quot;", '"'))
    assert found == {"cut": [], "pictures": [], "dark": scheme == "dark", "wide": 0}


def test_no_page_is_left_out():
    """The list of pages above is that of the site's navigation."""
    listed = set(re.findall(r": ([\w/]+)\.md", (ROOT / "mkdocs.yml").read_text()))
    assert set(pages()) == listed
