"""Write the notebooks of docs/stories from its pages, or run a story and store its outputs and pictures in its page.

    python docs/make_stories.py                  # the notebooks, from the pages
    python docs/make_stories.py --check          # exit 1 if a notebook differs from its page
    python docs/make_stories.py --run sheets     # run the notebook in a folder, update outputs and pictures of the page

A page is the source. Its blocks in `bash` and `python` are the cells of the notebook; a block in `yaml` whose first
line is a comment with a file's name writes that file. A picture names the file that the story made as its title,
`![text](../images/stories/sheets/roll.webp "roll.png")`. What a cell printed stands between `<!-- output -->` and
`<!-- end of output -->`, of a long output the last lines, as many as `<!-- output: last 8 -->` says. A block after
`<!-- not run -->` is text for the notebook.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "docs" / "stories"
MOST_BYTES = 100_000
"""Size of a stored picture, at most."""
COLUMNS = "88"

_PICTURE = re.compile(r'^!\[(?P<text>[^\]]*)\]\((?P<path>\S+) "(?P<made>[^"]+)"\)$')
_OUTPUT = re.compile(r"^<!-- output(?:: last (?P<last>\d+))? -->$")
_END = "<!-- end of output -->"
_NOT_RUN = "<!-- not run -->"
_FILE = re.compile(r"^# (\S+\.ya?ml)$")
# Clock times and speeds differ from run to run and say nothing about the story.
_VARYING = (
    (re.compile(r"^\d\d:\d\d:\d\d ", re.MULTILINE), ""),
    (re.compile(r", [\d.]+ (patches|voxels)/s(, [\d.]+ (s|min|h) left)?"), ""),
    (re.compile(r"token=\w+"), "token=..."),
    (re.compile(r"http://127\.0\.0\.1:\d{5}/\S*"), "http://127.0.0.1:..."),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
)


@dataclass(frozen=True)
class Cell:
    """A cell of a story.

    Args:
        kind: "markdown", "bash", "python", "file" or "picture".
        text: its text, without the fence.
        name: file that is written or shown.
    """

    kind: str
    text: str
    name: str = ""


def main() -> None:
    """Write, check or run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook differs")
    parser.add_argument("--run", metavar="STORY", help="run one story, and update its page")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to run it; cells that ran there before, up to the first that has changed, are not repeated "
        "(default: temporary)",
    )
    options = parser.parse_args()
    if options.run:
        update(STORIES / f"{options.run}.md", options.folder)
    stale = []
    for page in sorted(STORIES.glob("*.md")):
        path, text = page.with_suffix(".ipynb"), notebook(page)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}")


def cells(page: Path) -> list[Cell]:
    """Return the cells of a page; outputs are left out."""
    found: list[Cell] = []
    text: list[str] = []
    lines = iter(page.read_text(encoding="utf-8").splitlines())

    def end_text() -> None:
        content = "\n".join(text).strip("\n")
        if content:
            found.append(Cell("markdown", content))
        text.clear()

    run = True
    for line in lines:
        if line == _NOT_RUN:
            run = False
        elif _OUTPUT.match(line):
            while next(lines) != _END:
                pass
        elif line.startswith("```"):
            language, block = line.removeprefix("```"), []
            while (inner := next(lines)) != "```":
                block.append(inner)
            content = "\n".join(block)
            file = _FILE.match(block[0]) if language == "yaml" and block else None
            if run and (language in ("bash", "python") or file):
                end_text()
                found.append(Cell("file", content, file[1]) if file else Cell(language, content))
            else:
                text.extend([line, *block, "```"])
            run = True
        elif picture := _PICTURE.match(line):
            end_text()
            found.append(Cell("picture", picture["text"], picture["made"]))
        else:
            text.append(line)
    end_text()
    return found


def notebook(page: Path) -> str:
    """Return the notebook of a page, as JSON of nbformat 4.5 without outputs."""
    entries = [_entry(cell, f"{page.stem}-{number}") for number, cell in enumerate(cells(page))]
    content = {
        "cells": entries,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _entry(cell: Cell, number: str) -> dict[str, Any]:
    source = {
        "markdown": cell.text,
        "python": cell.text,
        "bash": f"%%bash -e\n{cell.text}",
        "file": f"%%writefile {cell.name}\n{cell.text}",
        "picture": f'# {cell.text}\nfrom PIL import Image\n\nImage.open("{cell.name}")',
    }[cell.kind]
    entry: dict[str, Any] = {"cell_type": "markdown" if cell.kind == "markdown" else "code", "id": number}
    entry |= {"metadata": {}, "source": source.splitlines(keepends=True)}
    if cell.kind != "markdown":
        entry |= {"execution_count": None, "outputs": []}
    return entry


def run_notebook(path: Path, folder: Path) -> list[str]:
    """Run the cells of a notebook in a folder, as Jupyter would.

    Args:
        path: a notebook of this script, with Python cells and the magics `%%bash -e` and `%%writefile`.
        folder: working folder of all cells. Its file `.cells.json` records what has run; the cells that are
            recorded, up to the first that differs, are not repeated.

    Returns:
        What each code cell printed.

    Raises:
        RuntimeError: a command failed; with its output.
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": COLUMNS,
        "VOLUMEN_CACHE": str(folder / ".cache"),
    }
    space: dict[str, Any] = {"__name__": "__main__"}
    book = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    record = folder / ".cells.json"
    done = json.loads(record.read_text()) if record.is_file() else []
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], zip(sources, done, strict=False)))
    done = done[:same]
    for source in sources[same:]:
        done.append([source, _run_cell(source, folder, environment, space)])
        record.write_text(json.dumps(done))
    return [printed for _, printed in done]


def _run_cell(source: str, folder: Path, environment: dict[str, str], space: dict[str, Any]) -> str:
    magic, _, body = source.partition("\n")
    if magic.startswith("%%writefile "):
        (folder / magic.split()[1]).write_text(f"{body}\n", encoding="utf-8")
        return ""
    if magic == "%%bash -e":
        done = subprocess.run(
            ["bash", "-e", "-c", body],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{body}\nended with {done.returncode}:\n{done.stdout}")
        return done.stdout
    stream = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(stream):
        tree = ast.parse(source)
        exec(compile(tree, "<cell>", "exec"), space)
    return stream.getvalue()


def update(page: Path, folder: Path | None) -> None:
    """Run a story, and store what it printed and drew in its page and in docs/images/stories."""
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        book = Path(scratch) / "story.ipynb"
        book.write_text(notebook(page), encoding="utf-8")
        printed = run_notebook(book, place)
        store_outputs(page, printed)
        store_pictures(page, place)


def store_outputs(page: Path, printed: Sequence[str]) -> None:
    """Replace the outputs in a page.

    Args:
        page: the page.
        printed: what each code cell of its notebook printed.
    """
    codes = [cell for cell in cells(page) if cell.kind != "markdown"]
    shown = iter([text for cell, text in zip(codes, printed, strict=True) if cell.kind in ("bash", "python")])
    lines: list[str] = []
    source = iter(page.read_text(encoding="utf-8").splitlines())
    latest, run = "", True
    for line in source:
        lines.append(line)
        if line == _NOT_RUN:
            run = False
        elif line.startswith("```"):
            language = line.removeprefix("```")
            while (inner := next(source)) != "```":
                lines.append(inner)
            lines.append(inner)
            if run and language in ("bash", "python"):
                latest = next(shown)
            run = True
        elif marker := _OUTPUT.match(line):
            while next(source) != _END:
                pass
            lines += ["```text", *_shown(latest, marker["last"]), "```", _END]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _shown(text: str, last: str | None) -> list[str]:
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    lines = text.strip("\n").splitlines()
    return lines if last is None or len(lines) <= int(last) else ["...", *lines[-int(last) :]]


def store_pictures(page: Path, folder: Path) -> None:
    """Store the pictures of a story as WebP of at most `MOST_BYTES`, where its page names them."""
    from PIL import Image

    wanted = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        if picture := _PICTURE.match(line):
            wanted[(page.parent / picture["path"]).resolve()] = folder / picture["made"]
    for parent in {path.parent for path in wanted}:
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir(parents=True)
    for path, made in wanted.items():
        with Image.open(made) as opened:
            picture = opened.convert("RGB")
        for quality in (90, 80, 70, 60, 50):
            stream = io.BytesIO()
            picture.save(stream, format="WEBP", quality=quality, method=6)
            if stream.tell() <= MOST_BYTES:
                break
        else:
            sys.exit(f"{made}: {stream.tell()} bytes as WebP; make it smaller")
        path.write_bytes(stream.getvalue())


if __name__ == "__main__":
    main()
