"""The state of an output folder: the provenance of its prediction, and which blocks are finished."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import socket
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from volumen.inference.output.chunk_files import UNFINISHED_CHUNK
from volumen.inference.output.ome_zarr import LABELS
from volumen.inference.windows.plan import Box
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import UNFINISHED, write_atomically
from volumen.utils.files.positioned_io import BINARY, read_at

logger = logging.getLogger(__name__)

STATE_FOLDER = ".volumen"
GRAPH_FOLDER = ".volumen_graph"
"""Folder of the graph of the instances, which `volumen instances` stores; the dot hides it from viewers."""
PROVENANCE, LOG, WORKER_LOGS, TOKEN = "recipe.json", "blocks", "workers", "run-"
ATTRIBUTE = "volumen"
# Entries that may differ between two runs of the same prediction: they describe where it ran, not what it computes.
INFORMATIVE = ("versions", "machine", "made_of", "voxel_size")


def identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a provenance that decides what is computed."""
    return {key: value for key, value in provenance.items() if key not in INFORMATIVE}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe the differences between two provenances that change the result; empty if there are none."""
    return differences(identity(old), identity(new))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe the keys whose values differ; empty if there are none."""
    before, now = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in keys)


def _leaves(provenance: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{lead}{key}.")
        else:
            yield f"{lead}{key}", value


def relax_damage_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the old provenance, in which settings that stop at damage are replaced by the new ones.

    Blocks that were finished before the stop are the same under the new settings, so that they can be reused.
    """
    strict = {"on_corrupt": "stop", "nonfinite": "refuse"}
    return {**old, **{key: new.get(key) for key, value in strict.items() if old.get(key) == value}}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_provenance(output: Path) -> dict[str, Any] | None:
    """Return the provenance of a finished prediction (an OME-Zarr group); None if the group is none."""
    attributes = _root_attributes(output)
    provenance = attributes.get(ATTRIBUTE, {}).get("recipe") if attributes else None
    return provenance if isinstance(provenance, dict) else None


def _root_attributes(output: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((output / "zarr.json").read_text())
    except (OSError, ValueError):
        return None
    attributes = content.get("attributes") if isinstance(content, dict) else None
    return attributes if isinstance(attributes, dict) else None


class OutputState:
    """Opens an output folder for a prediction: a new, an interrupted or a finished one.

    While a prediction runs, `<output>/.volumen` holds its provenance and a log with one line per finished block,
    written after the block's chunks. The folder is removed at the end, when the group's attributes hold the
    provenance. An incomplete last line, which a killed process leaves, is ignored. Workers write their own logs in
    `workers`, whose entries this process copies to its log.

    Args:
        output: the output group's folder.
        provenance: the provenance.
        blocks: blocks per axis.
        overwrite: whether an earlier prediction may be removed.

    Raises:
        VolumenError: the folder has other content, or holds another prediction and `overwrite` is false.
    """

    def __init__(
        self,
        output: Path,
        provenance: Mapping[str, Any],
        blocks: tuple[int, ...],
        *,
        overwrite: bool = False,
    ) -> None:
        self.output = output
        self.provenance = dict(provenance)
        self.folder = output / STATE_FOLDER
        self.done = np.zeros(blocks, dtype=bool)
        self.corrupt: list[Box] = []
        self.finished = False
        self._log: BlockLog | None = None
        self._read: dict[Path, int] = {}
        self._begun = False
        self._resolve_earlier(overwrite)

    def _resolve_earlier(self, overwrite: bool) -> None:
        """Reuse, remove or refuse what the folder holds."""
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
        if not complete:
            self._read_logs()
        change = difference(old if complete else relax_damage_settings(old, self.provenance), self.provenance)
        if change or (overwrite and complete):
            if not overwrite and (complete or self._begun):
                raise VolumenError(
                    self.output,
                    f"holds another prediction: {change}",
                    remedy="choose another output folder, or remove that one with --overwrite",
                )
            self._remove(old)
        elif complete:
            shutil.rmtree(self.folder, ignore_errors=True)  # a process was killed while it removed its state
            self.finished = True
        elif self.done.any():
            logger.info("%s: going on after %d of %d blocks", self.output, self.done.sum(), self.done.size)

    def _earlier(self) -> tuple[dict[str, Any] | None, bool]:
        try:
            return json.loads((self.folder / PROVENANCE).read_text()), False
        except (OSError, ValueError):
            if self.folder.is_dir() and not (self.output / "zarr.json").exists():
                return {}, False  # a process was killed before it wrote the provenance
        return read_provenance(self.output), True

    def _remove(self, old: Mapping[str, Any]) -> None:
        """Remove the files of the earlier prediction and nothing else.

        Raises:
            VolumenError: the folder holds other files.
        """
        made = {"zarr.json", "OME", LABELS, STATE_FOLDER, GRAPH_FOLDER, *old.get("targets", {})}
        foreign = sorted(entry.name for entry in self.output.iterdir() if entry.name not in made)
        if (self.output / LABELS).is_dir() and LABELS not in old.get("targets", {}):
            # A user who corrects a prediction may have stored more labels beside it.
            inside = {entry.name for entry in (self.output / LABELS).iterdir()} - {
                "zarr.json",
                *old.get("targets", {}),
            }
            foreign += sorted(f"{LABELS}/{name}" for name in inside)
        if foreign:
            raise VolumenError(
                self.output,
                f"holds {foreign[0]}, which no prediction made",
                remedy="move it away, or choose another output folder",
            )
        logger.info("removing the earlier prediction in %s", self.output)
        # If the removal is interrupted, the folder holds a prediction without finished blocks.
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / PROVENANCE, json.dumps(old, indent=1).encode())
        self._forget()
        # The metadata are removed last, so that after an interruption the folder still counts as a prediction, an
        # unfinished one.
        for name in (*sorted(made - {"zarr.json", STATE_FOLDER}), "zarr.json", STATE_FOLDER):
            path = self.output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _forget(self) -> None:
        """Remove the state except the provenance: first the logs of finished blocks, then other files."""
        self.done[...] = False
        self.corrupt, self._read = [], {}
        (self.folder / LOG).unlink(missing_ok=True)
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name != WORKER_LOGS):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != PROVENANCE:
                entry.unlink(missing_ok=True)

    def _read_logs(self) -> None:
        self._take(self.folder / LOG)
        self.absorb()

    def _take(self, path: Path) -> None:
        """Read the lines of a log that were added since the last call."""
        blocks, corrupt, self._read[path] = read_log(path, self._read.get(path, 0))
        flat = self.done.reshape(-1)
        self._begun |= bool(blocks)
        for block in blocks:
            if block < flat.size and not flat[block]:
                flat[block] = True
                if self._log is not None:
                    self._log.block(block)
        for box in corrupt:
            self._add_corrupt(box)

    def absorb(self) -> None:
        """Read the lines that other processes added to their logs since the last call."""
        for path in sorted((self.folder / WORKER_LOGS).glob("*")):
            self._take(path)

    def begin(self) -> None:
        """Write the provenance and open the log; remove incomplete files of a killed run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_tokens()
        write_atomically(self.folder / PROVENANCE, json.dumps(self.provenance, indent=1).encode())
        if not self.done.any():
            self._forget()
        for leftover in (*self.folder.rglob(UNFINISHED), *self.output.rglob(UNFINISHED_CHUNK)):
            leftover.unlink(missing_ok=True)
        self._log = BlockLog(self.folder / LOG)
        missing = self.done.copy().reshape(-1)
        logged = np.asarray(read_log(self.folder / LOG)[0])
        missing[logged[logged < missing.size]] = False
        for block in np.flatnonzero(missing):
            self._log.block(int(block))

    def _drop_tokens(self) -> None:
        for token in self.folder.glob(f"{TOKEN}*"):
            token.unlink(missing_ok=True)

    @contextmanager
    def token(self) -> Iterator[str]:
        """Yield the name of a file that exists while other processes may write this output."""
        name = f"{TOKEN}{uuid4().hex}"
        (self.folder / name).touch()
        try:
            yield name
        finally:
            (self.folder / name).unlink(missing_ok=True)

    def record(self, block: tuple[int, ...]) -> None:
        """Record that a block is finished, after its chunks are written."""
        assert self._log is not None
        self._log.block(int(np.ravel_multi_index(block, self.done.shape)))

    def leave_out(self, blocks: np.ndarray) -> None:
        """Treat blocks in which nothing is predicted as finished; the log does not list them.

        Args:
            blocks: bool, shape as `done`.
        """
        self.done |= blocks

    def record_box(self, blocks: Box) -> None:
        """Record that all blocks of a box are finished."""
        assert self._log is not None
        for block in itertools.product(*(range(first, stop) for first, stop in blocks)):
            if not self.done[block]:
                self.done[block] = True
                self.record(block)

    def note_corrupt(self, box: Box) -> None:
        """Record a box of the image that could not be read; a box is recorded only once, also after interruptions."""
        self._add_corrupt(box)

    def _add_corrupt(self, box: Box) -> None:
        if box not in self.corrupt:
            self.corrupt.append(box)
            self.corrupt.sort()
            if self._log is not None:
                self._log.corrupt(box)

    def complete(self, extra: Mapping[str, Any]) -> None:
        """Mark the prediction as finished: write the attributes, then remove the state folder.

        The provenance file is removed first: as long as it exists, the prediction counts as unfinished, and an
        interrupted removal would refer to files that no longer exist.

        Args:
            extra: more attributes besides the provenance.
        """
        import zarr

        self.close()
        group = zarr.open_group(self.output, mode="r+")
        group.attrs.update({ATTRIBUTE: {"recipe": self.provenance, **extra}})
        (self.folder / PROVENANCE).unlink()
        shutil.rmtree(self.folder)
        self.finished = True

    def close(self) -> None:
        """Stop this process and all workers from writing."""
        # Tokens are removed before the files that workers read: a running worker would treat missing files as 0.
        self._drop_tokens()
        if self._log is not None:
            self._log.close()
            self._log = None


class WorkerState:
    """The state of an output in a worker, which writes a separate log.

    Args:
        output: the output group's folder.
        token: name of the file that exists until the work is finished or cancelled.
        done: blocks that the worker need not compute, bool, shape `plan.blocks`.
        blocks: box of blocks to compute; blocks that an earlier worker finished are added to `done`.
    """

    def __init__(self, output: Path, token: str, done: np.ndarray, blocks: Box) -> None:
        self.output, self.folder = output, output / STATE_FOLDER
        self.done = done
        self.corrupt: list[Box] = []
        self._token = self.folder / token
        if not self.is_active:
            return
        inside = tuple(slice(first, stop) for first, stop in blocks)
        for path in (self.folder / WORKER_LOGS).glob("*"):
            finished = np.zeros(done.size, dtype=bool)
            logged = np.asarray(read_log(path)[0])
            finished[logged[logged < done.size]] = True
            done[inside] |= finished.reshape(done.shape)[inside]
        (self.folder / WORKER_LOGS).mkdir(exist_ok=True)
        self._log = BlockLog(
            self.folder / WORKER_LOGS / f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex}"
        )

    @property
    def is_active(self) -> bool:
        """Whether the work has not been cancelled."""
        return self._token.exists()

    def record(self, block: tuple[int, ...]) -> None:
        """Record that a block is finished, after its chunks are written."""
        self._log.block(int(np.ravel_multi_index(block, self.done.shape)))

    def note_corrupt(self, box: Box) -> None:
        """Record a box of the image that could not be read."""
        self.corrupt.append(box)
        self._log.corrupt(box)

    def close(self) -> None:
        self._log.close()


class BlockLog:
    """A file with a line per finished block and per box of the image that could not be read.

    Every line is one write, so that lines of several threads do not mix. An incomplete last line is removed.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o644)
        size = os.fstat(self._file).st_size
        if size and read_at(self._file, 1, size - 1) != b"\n":
            os.ftruncate(self._file, read_at(self._file, size, 0).rfind(b"\n") + 1)

    def block(self, number: int) -> None:
        os.write(self._file, b"%d\n" % number)

    def corrupt(self, box: Box) -> None:
        os.write(self._file, b"corrupt %s\n" % json.dumps(box).encode())

    def close(self) -> None:
        os.close(self._file)


def read_log(path: Path, start: int = 0) -> tuple[array[int], list[Box], int]:
    """Return the blocks and boxes in the complete lines of a log from a byte on, and the byte after them."""
    # An array of 8 bytes per block, since a volume of a teravoxel has millions of blocks.
    blocks, corrupt, end = array("q"), list[Box](), start
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if line[:-1].isdigit():
                    blocks.append(int(line))
                elif line.startswith(b"corrupt "):
                    corrupt.append(tuple((first, stop) for first, stop in json.loads(line[8:])))
    except FileNotFoundError:
        pass
    return blocks, corrupt, end
