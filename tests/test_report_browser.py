"""The report in a headless browser: it draws, its pictures are there, and it asks for nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from skimage import measure
from test_evaluate import write
from test_label_scores import phantom

from volumen.evaluation.comparison import compare
from volumen.evaluation.html.report import LISTED, MOST_COLUMNS
from volumen.evaluation.html.report_drawing import in_columns
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


def browse(page, profile, *more):
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        "--window-size=1200,1600",
        *more,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_the_page_draws_its_tables_and_pictures(tmp_path):
    grid = np.indices((6, 40, 40))
    truth = (np.hypot(grid[1] - 20, grid[2] - 20) < 12).astype(np.uint8)
    for name, shift in (("first", 0), ("second & <last>", 9)):
        write(tmp_path / "found" / f"{name}_ink.tif", np.roll(truth, shift, axis=1))
        write(tmp_path / "data" / "labels" / f"{name}_ink.tif", truth)
    request = EvaluateRequest(
        str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out"), diagnostics=False
    )
    evaluation = evaluate(request)
    page = tmp_path / "out" / "report.html"
    # A script of the test's own, at the end of a copy, says what the browser made of the page.
    told = (
        "<script>onload=()=>{document.title=JSON.stringify([document.images.length,"
        "[...document.images].every(i=>i.complete&&i.naturalWidth>0),"
        "document.querySelectorAll('.scroll tbody tr').length,"
        "performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length])}</script>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", told + "</body>"))
    found = browse(copy, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=2000")
    # All pictures are drawn; a row for each mean, two in each table of cases, wrong objects, windows; nothing fetched.
    tables = in_columns([key for key in evaluation.mean if key != "mean_dice"], MOST_COLUMNS)
    behind = [case["ink"][""] for case in evaluation.details.values()]
    wrong = [row for details in behind for row in (*details["objects"], *details["windows"]["64"])]
    assert len(wrong) <= LISTED
    rows = len(evaluation.mean) + 2 * len(tables) + len(wrong)
    images = page.read_text().count("<img")
    assert images >= 2 * (1 + 2 * 3)
    assert f"<title>[{images},true,{rows},0]</title>" in found
    assert "second &amp; &lt;last&gt;" in found
    # Tall enough for the pictures, which stand last.
    browse(page, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,4800")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    # What was missed and what was predicted where nothing is, over grey: bright yellow and vermilion.
    missed = (pixels[:, 0] > 150) & (pixels[:, 1] > 150) & (pixels[:, 2] < 120)
    false = (pixels[:, 0] > 150) & (pixels[:, 1] < 130) & (pixels[:, 2] < 90)
    assert missed.sum() > 1000
    assert false.sum() > 1000


def test_tables_of_many_targets_and_classes_fit_a_page_of_1000_pixels(tmp_path):
    """Twelve classes, a long name: each table is as wide as its room, and the page does not scroll sideways."""
    rng = np.random.default_rng(0)
    for name in ("first", "a_very_long_name_of_a_volume_from_some_microscope_2026-11-30_with_no_spaces"):
        truth = rng.integers(0, 12, (6, 40, 40), dtype=np.uint8)
        write(tmp_path / "found" / f"{name}_tissue.tif", np.where(rng.random(truth.shape) < 0.3, 0, truth))
        write(tmp_path / "data" / "labels" / f"{name}_tissue.tif", truth)
    evaluate(EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out")))
    page = tmp_path / "out" / "report.html"
    assert layout(page, tmp_path) > 3


@pytest.mark.parametrize("width", [1300, 400])
@pytest.mark.parametrize("kind", ["labels", "classes", "instances", "flat"])
def test_a_report_fits_wide_and_narrow_windows(tmp_path, width, kind):
    """The page does not scroll sideways, planes keep their shape, and no card cuts its text."""
    pred, truth = (mask.astype(np.uint8) for mask in phantom())
    settings = {}
    if kind == "classes":
        pred, truth = (np.where(np.arange(60) < 30, mask, 2 * mask) for mask in (pred, truth))
    if kind == "instances":
        pred, truth = (measure.label(mask).astype(np.uint16) for mask in (pred, truth))
        settings["instances"] = ("ink",)
    if kind == "flat":
        pred, truth = pred[:, 21], truth[:, 21]
    for name in ("first", "a_very_long_name_of_a_volume_from_some_microscope_2026-11-30_with_no_spaces"):
        write(tmp_path / "found" / f"{name}_ink.tif", pred)
        write(tmp_path / "data" / "labels" / f"{name}_ink.tif", truth)
    spacing = (2.5, 1.0, 1.0)[-pred.ndim :]
    evaluate(
        EvaluateRequest(
            str(tmp_path / "found"),
            str(tmp_path / "data"),
            str(tmp_path / "out"),
            spacing=spacing,
            **settings,
        )
    )
    assert fit(tmp_path / "out" / "report.html", tmp_path, width) == f"[{width},[],0,0,true]"


def fit(page, folder, width) -> str:
    """Return what a browser says of a page of some width.

    That is its width, what is wider than it, how many cards are cut and planes bent, and whether there are planes.
    """
    # An outer page with a frame of this width, since a browser's own window is never narrower than 500 pixels.
    told = (
        "<script>onload=()=>{const cut=[...document.querySelectorAll('.card')].filter("
        "e=>e.scrollWidth>e.clientWidth).length;const bent=[...document.querySelectorAll('.plane>div')]."
        "filter(e=>{const b=e.querySelector('svg').viewBox.baseVal,r=e.getBoundingClientRect(),"
        "deep=e.nextElementSibling.textContent.includes('z down')?2.5:1;"
        "return Math.abs(r.width/r.height*b.height*deep/b.width-1)>0.03}).length;"
        "const wide=[...document.querySelectorAll('body *')].filter(e=>!e.closest('.scroll')&&"
        "e.getBoundingClientRect().right>innerWidth+1).map(e=>e.tagName+e.className);"
        "parent.postMessage(JSON.stringify([innerWidth,wide,cut,bent,"
        "document.querySelectorAll('.plane').length>0]),'*')}</script>"
    )
    copy = folder / "copy.html"
    copy.write_text(page.read_text().replace("</body>", told + "</body>"))
    outer = folder / "outer.html"
    outer.write_text(
        "<title></title><script>onmessage=e=>{document.title=e.data}</script>"
        f"<iframe src=copy.html style='width:{width}px;height:900px;border:0'></iframe>"
    )
    found = browse(outer, folder / "profile", "--dump-dom", "--virtual-time-budget=4000")
    return re.search(r"<title>(.*?)</title>", found)[1]


def layout(page, folder) -> int:
    """Check that a page of 1,000 pixels scrolls nowhere sideways and all headers have a scope; return its tables."""
    told = (
        "<script>onload=()=>{const wide=[...document.querySelectorAll('.scroll')].filter("
        "e=>e.scrollWidth>e.clientWidth).length;document.title=JSON.stringify([innerWidth,wide,"
        "document.documentElement.scrollWidth<=innerWidth,document.querySelectorAll('th:not([scope])').length,"
        "document.querySelectorAll('.scroll').length])}</script>"
    )
    copy = folder / "copy.html"
    copy.write_text(page.read_text().replace("</body>", told + "</body>"))
    found = browse(
        copy, folder / "profile", "--dump-dom", "--virtual-time-budget=2000", "--window-size=1000,900"
    )
    title = re.search(r"<title>\[(.*?)\]</title>", found)[1].split(",")
    assert title[:4] == ["1000", "0", "true", "0"], title
    return int(title[4])


def test_a_comparison_fits_a_page_of_1000_pixels(tmp_path):
    """Long names of models and cases, several classes."""
    rng = np.random.default_rng(0)
    names = ("a_model_with_a_very_long_name_trained_for_many_epochs_2026-11-30", "b")
    for case in ("first", "a_very_long_name_of_a_volume_from_some_microscope_2026-11-30_with_no_spaces"):
        truth = rng.integers(0, 4, (6, 40, 40), dtype=np.uint8)
        write(tmp_path / "data" / "labels" / f"{case}_tissue.tif", truth)
        for name, share in zip(names, (0.3, 0.2)):
            found = np.where(rng.random(truth.shape) < share, 0, truth)
            write(tmp_path / name / f"{case}_tissue.tif", found)
    request = EvaluateRequest("", str(tmp_path / "data"), str(tmp_path / "out"))
    compare([str(tmp_path / name) for name in names], request)
    page = tmp_path / "out" / "report.html"
    assert layout(page, tmp_path) > 3
    assert fit(page, tmp_path, 400) == "[400,[],0,0,false]"


def test_errors_by_geometry_fit_a_page_of_1000_pixels_and_are_drawn(tmp_path):
    """Two classes, long names, suspects; the tables behind the figures are open."""
    grid = np.indices((24, 60, 60))
    truth = ((grid[0] // 6) % 2 * (1 + (grid[2] > 30))).astype(np.uint8)
    found = np.where((grid[1] > 40) & (grid[2] > 20), 0, truth).astype(np.uint8)
    found[:5, 5:25, 5:25] = 1
    for case in ("first", "a_very_long_name_of_a_volume_from_some_microscope_2026-11-30_with_no_spaces"):
        write(tmp_path / "data" / "labels" / f"{case}_tissue.tif", truth)
        write(tmp_path / "found" / f"{case}_tissue.tif", found)
    folders = (str(tmp_path / part) for part in ("found", "data", "out"))
    evaluate(EvaluateRequest(*folders, worst=0, metrics=("dice",)))
    page = tmp_path / "out" / "report.html"
    text = page.read_text()
    assert text.count("<svg role=img aria-label='errors by ") == 2 * 4
    assert "label may be missing" in text
    opened = tmp_path / "opened.html"
    opened.write_text(text.replace("<details>", "<details open>"))
    assert layout(opened, tmp_path) > 8
    browse(page, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,2400")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ("#0072b2", "#d55e00", "#e3e7ec"):
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=1) < 12).sum() > 300


def test_curves_fit_a_page_of_1000_pixels_and_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for case in ("first", "second"):
        truth = rng.random((6, 40, 40)) < 0.4
        write(tmp_path / "data" / "labels" / f"{case}_ink.tif", truth.astype(np.uint8))
        for name, noise in (("base", 0.6), ("new", 0.3)):
            found = np.clip(0.2 + 0.6 * truth + rng.normal(0, noise, truth.shape), 0, 1)
            write(tmp_path / name / f"{case}_ink.tif", found.astype(np.float32))
    request = EvaluateRequest("", str(tmp_path / "data"), str(tmp_path / "out"), metrics=("ece",))
    compare([str(tmp_path / name) for name in ("base", "new")], request)
    page = tmp_path / "out" / "report.html"
    assert layout(page, tmp_path) > 1
    browse(page, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,1800")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ("#0072b2", "#d55e00"):
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=1) < 12).sum() > 300
