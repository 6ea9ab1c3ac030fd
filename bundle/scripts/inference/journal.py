"""The output folder's state: whose it is, what made it, which blocks are finished."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.errors import VolumenError
from scripts.inference.windows import Box

logger = logging.getLogger(__name__)

STATE_FOLDER = ".volumen"
ATTRIBUTE = "volumen"
# What may differ between two runs that count as the same prediction: where it ran, not what was asked.
INFORMATIVE = ("versions", "machine", "made_of")


def identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a recipe that decides what is computed."""
    return {key: value for key, value in recipe.items() if key not in INFORMATIVE}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return what differs between two recipes, in words; empty where nothing does."""
    old, new = identity(old), identity(new)
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return ", ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_recipe(output: Path) -> dict[str, Any] | None:
    """Return the recipe of a finished prediction (an OME-Zarr group), or None where it is none."""
    attributes = _root_attributes(output)
    recipe = attributes.get(ATTRIBUTE, {}).get("recipe") if attributes else None
    return recipe if isinstance(recipe, dict) else None


def _root_attributes(output: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((output / "zarr.json").read_text())
    except (OSError, ValueError):
        return None
    attributes = content.get("attributes") if isinstance(content, dict) else None
    return attributes if isinstance(attributes, dict) else None


class OutputState:
    """Opens an output folder for a recipe: new, to go on with, or finished.

    While a prediction runs, `<output>/.volumen` holds its recipe and a journal with one line per finished
    block, written after the block's chunks. It is removed at the end, when the group's attributes say what
    was made. A line cut short by a kill does not count.

    Args:
        output: the output group's folder.
        recipe: what decides the result.
        blocks: blocks per axis.
        overwrite: whether an earlier prediction may be removed.

    Raises:
        VolumenError: the folder has other content, or another prediction and no `overwrite`.
    """

    def __init__(
        self,
        output: Path,
        recipe: Mapping[str, Any],
        blocks: tuple[int, ...],
        *,
        overwrite: bool = False,
    ) -> None:
        self.output = output
        self.recipe = dict(recipe)
        self.folder = output / STATE_FOLDER
        self.done = np.zeros(blocks, dtype=bool)
        self.corrupt: list[Box] = []
        self.finished = False
        self._journal: int | None = None
        self._settle(overwrite)

    def _settle(self, overwrite: bool) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise VolumenError(
                self.output, expected="a folder", found="a file", remedy="choose another output"
            )
        if not self.output.exists() or not any(self.output.iterdir()):
            return
        old, complete = self._earlier()
        if old is None:
            raise VolumenError(
                self.output,
                expected="an empty folder or an earlier prediction",
                found=f"other content ({sorted(p.name for p in self.output.iterdir())[0]})",
                remedy="choose another output folder",
            )
        change = difference(old, self.recipe)
        if change or (overwrite and complete):
            if not overwrite:
                raise VolumenError(
                    self.output,
                    f"holds another prediction: {change}",
                    remedy="choose another output folder, or remove that one with --overwrite",
                )
            self._remove(old)
        elif complete:
            self.finished = True
        else:
            self._read_journal()

    def _earlier(self) -> tuple[dict[str, Any] | None, bool]:
        try:
            return json.loads((self.folder / "recipe.json").read_text()), False
        except (OSError, ValueError):
            if self.folder.is_dir() and not (self.output / "zarr.json").exists():
                return {}, False  # killed before the recipe was written
        return read_recipe(self.output), True

    def _remove(self, old: Mapping[str, Any]) -> None:
        """Remove what the earlier prediction made and nothing else.

        Raises:
            VolumenError: the folder holds more than that.
        """
        made = {"zarr.json", "OME", STATE_FOLDER, *old.get("targets", {})}
        foreign = sorted(entry.name for entry in self.output.iterdir() if entry.name not in made)
        if foreign:
            raise VolumenError(
                self.output,
                f"holds {foreign[0]}, which no prediction made",
                remedy="move it away, or choose another output folder",
            )
        logger.info("removing the earlier prediction in %s", self.output)
        # The marks go last, so that an interrupted removal is still known as a prediction.
        for name in sorted(made, key=lambda name: name in ("zarr.json", STATE_FOLDER)):
            path = self.output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _read_journal(self) -> None:
        try:
            lines = (self.folder / "blocks").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return
        flat = self.done.reshape(-1)
        for line in lines:
            if line.isdigit() and int(line) < flat.size:
                flat[int(line)] = True
            elif line.startswith(b"corrupt "):
                self.corrupt.append(tuple((start, stop) for start, stop in json.loads(line[8:])))
        if flat.any():
            logger.info("%s: going on after %d of %d blocks", self.output, int(flat.sum()), flat.size)

    def begin(self) -> None:
        """Write the recipe and open the journal; what a killed run left half written is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "recipe.json", json.dumps(self.recipe, indent=1))
        for leftover in self.output.rglob("*.partial"):
            leftover.unlink(missing_ok=True)
        path = self.folder / "blocks"
        self._journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._journal).st_size
        if size and os.pread(self._journal, 1, size - 1) != b"\n":
            os.ftruncate(self._journal, os.pread(self._journal, size, 0).rfind(b"\n") + 1)

    def record(self, block: tuple[int, ...]) -> None:
        """Note a block as finished, after its chunks are written."""
        assert self._journal is not None
        flat = int(np.ravel_multi_index(block, self.done.shape))
        os.write(self._journal, b"%d\n" % flat)

    def note_corrupt(self, box: Box) -> None:
        """Note a box of the image that could not be read, once, however often the run is interrupted."""
        assert self._journal is not None
        if box not in self.corrupt:
            os.write(self._journal, b"corrupt %s\n" % json.dumps(box).encode())
            self.corrupt.append(box)
            self.corrupt.sort()

    def complete(self, extra: Mapping[str, Any]) -> None:
        """Mark the prediction as finished: attributes first, then the state folder goes.

        Args:
            extra: more for the attributes, beside the recipe.
        """
        import zarr

        self.close()
        group = zarr.open_group(self.output, mode="r+")
        group.attrs.update({ATTRIBUTE: {"recipe": self.recipe, **extra}})
        shutil.rmtree(self.folder)
        self.finished = True

    def close(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
