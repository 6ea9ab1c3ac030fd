"""The stories of the documentation: a notebook for each page, and, in the slow tests, whole runs with good results."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
from conftest import ROOT
from PIL import Image

STORIES = ROOT / "docs" / "stories"
PAGES = sorted(STORIES.glob("*.md"))
NAMES = ["neurons", "nuclei", "organs", "sheets"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_stories", ROOT / "docs" / "make_stories.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_stories"] = module
    spec.loader.exec_module(module)
    return module


def test_there_are_the_four_stories():
    assert [page.stem for page in PAGES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_story_has_the_parts_of_one(script, name):
    """Questions as headings, an output after each step, pictures with a text, and the reader's own data at the end."""
    page = STORIES / f"{name}.md"
    text = page.read_text()
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[-1] == "Now with your data"
    assert len(headings) >= 6
    assert all(heading.endswith("?") for heading in headings[:-1])
    assert f"[The same as a notebook]({name}.ipynb)" in text
    outputs = re.findall(
        r"<!-- output.*?-->\n```text\n(.+?)\n```\n<!-- end of output -->", text, flags=re.DOTALL
    )
    assert len(outputs) == text.count("<!-- output") >= 4
    assert sum("volumen " in cell.text for cell in script.cells(page) if cell.kind == "bash") >= 5


@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_a_small_picture_that_is_there(script, name):
    page = STORIES / f"{name}.md"
    links = re.findall(r'!\[([^\]]*)\]\((\S+)(?: "([^"]+)")?\)', page.read_text())
    assert len(links) >= 3
    for text, path, made in links:
        assert len(text) > 20
        assert made
        file = page.parent / path
        assert file.stat().st_size <= script.MOST_BYTES
        with Image.open(file) as picture:
            assert min(picture.size) > 200
    used = {(page.parent / path).resolve() for _, path, _ in links}
    assert used == {path.resolve() for path in (ROOT / "docs" / "images" / "stories" / name).iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_page(name):
    """What a person would copy from the page is what the notebook runs; every page names commands that are taken."""
    text = (STORIES / f"{name}.md").read_text()
    shown = re.sub(
        r"<!-- not run -->\n```.*?\n```|<!-- output.*?end of output -->", "", text, flags=re.DOTALL
    )
    blocks = re.findall(r"^```(bash|python|yaml)\n(.*?)\n```$", shown, flags=re.DOTALL | re.MULTILINE)
    book = json.loads((STORIES / f"{name}.ipynb").read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    sources = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    code = [source for source in sources if "\nImage.open(" not in source]
    expected = []
    for language, block in blocks:
        magic = {"bash": "%%bash -e\n", "python": ""}.get(language)
        expected.append(
            f"{magic}{block}" if magic is not None else f"%%writefile {block.split()[1]}\n{block}"
        )
    assert code == expected
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])


def test_a_page_is_taken_apart_and_outputs_are_put_back(script, tmp_path):
    page = tmp_path / "one.md"
    page.write_text(
        "# One\n\n```bash\necho 12:00:01 a\nseq 5\n```\n<!-- output: last 2 -->\nold\n<!-- end of output -->\n\n"
        "```yaml\n# my.yaml\na: 1\n```\n\n<!-- not run -->\n```bash\nfalse\n```\n\n"
        "```python\nprint(open('my.yaml').read())\n"
        '```\n<!-- output -->\n<!-- end of output -->\n\n![A picture](../x.webp "x.png")\n'
    )
    kinds = [cell.kind for cell in script.cells(page)]
    assert kinds == ["markdown", "bash", "file", "markdown", "python", "picture"]
    book = tmp_path / "one.ipynb"
    book.write_text(script.notebook(page))
    work = tmp_path / "work"
    work.mkdir()
    Image.new("RGB", (8, 8)).save(work / "x.png")
    printed = script.run_notebook(book, work)
    script.store_outputs(page, printed)
    text = page.read_text()
    assert "<!-- output: last 2 -->\n```text\n...\n4\n5\n```\n<!-- end of output -->" in text
    assert "```text\n# my.yaml\na: 1\n```" in text
    assert "old" not in text
    # Outputs are no part of the notebook, and an unchanged cell is not repeated.
    assert script.notebook(page) == book.read_text()
    (work / "my.yaml").unlink()
    assert script.run_notebook(book, work) == printed


def test_a_failed_command_ends_a_story(script, tmp_path):
    page = tmp_path / "one.md"
    page.write_text("```bash\necho before\nfalse\necho after\n```\n")
    (tmp_path / "one.ipynb").write_text(script.notebook(page))
    with pytest.raises(RuntimeError, match=r"ended with 1:\nbefore\n$"):
        script.run_notebook(tmp_path / "one.ipynb", tmp_path)


def mean(report):
    return json.loads((report / "metrics.json").read_text())["mean"]


def check_sheets(folder):
    scores = mean(folder / "REPORT")
    assert scores["surface/dice"] > 0.75
    # Random directions are 90 degrees away on average.
    assert scores["normals/angular_error"] < 45
    assert len((folder / "SUGGESTIONS" / "suggestions.csv").read_text().splitlines()) == 4
    assert any((folder / "DATA2" / "labels").iterdir())


def check_neurons(folder):
    scores = mean(folder / "COMPARED" / "2_TUNED")
    assert scores["affinity_instances/adapted_rand_error"] < 0.4
    state = json.loads((folder / "WEB" / "tissue.neuroglancer.json").read_text())
    for layer in state["layers"]:
        place = layer["source"].rpartition("127.0.0.1:8000/")[2]
        assert (folder / "WEB" / place / "info").is_file() or "://" not in layer["source"], layer
    assert list((folder / "MESHES").glob("*.ply"))


def check_nuclei(folder):
    assert mean(folder / "REPORT")["cells_instances/ap@0.5"] > 0.6
    assert mean(folder / "REPORT3D")["cells_instances/ap@0.5"] > 0.4


def check_organs(folder):
    scores = mean(folder / "REPORT")
    assert scores["organs/dice/liver"] > 0.8
    assert scores["organs/dice/kidney"] > 0.5
    assert (folder / "FROM_BUNDLE" / "patient1.zarr").is_dir()


CHECKS = {"sheets": check_sheets, "neurons": check_neurons, "nuclei": check_nuclei, "organs": check_organs}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_story_runs_whole(script, name, tmp_path):
    script.run_notebook(STORIES / f"{name}.ipynb", tmp_path)
    CHECKS[name](tmp_path)
