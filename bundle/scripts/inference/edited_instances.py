"""Computes the instances of a finished prediction again after an edit of its heads, only where the edit changes them.

The graph of the instances stays beside the prediction, with the time at which each chunk of the heads was last written.
A later call finds the chunks that were written since, and repeats the steps of the blocks that depend on them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from volumen.data.formats.extra.library import library
from volumen.data.formats.opening import open_volume
from volumen.data.formats.zarr_arrays.chunk_names import chunk_index
from volumen.inference.output.block_log import GRAPH_FOLDER, STATE_FOLDER, read_provenance
from volumen.inference.output.file_formats.agglomerates import FOLDER, SUFFIX, Mapping, write_agglomerates
from volumen.inference.output.file_formats.webknossos import (
    add_attachment,
    first_voxel_of,
    write_description,
    write_layer,
)
from volumen.inference.output.ome_zarr import LABELS, ZarrOutput, find_target
from volumen.inference.output.stored import InstanceSpec, instance_specs
from volumen.inference.postprocess.blocks import Region, aligned_block
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import VolumeGraph
from volumen.inference.postprocess.instance_output import BLOCK_VOXELS
from volumen.inference.postprocess.instance_table import describe_instances
from volumen.inference.request import OpenBox
from volumen.inference.rules import InstanceRules, offsets_of, read_rules
from volumen.inference.settings import settings_of_record
from volumen.inference.volume_plan import resolve_region
from volumen.inference.windows.heads import Head
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically
from volumen.utils.threads import in_threads

logger = logging.getLogger(__name__)

RECORD = "heads.json"
VERSION = 1
"""Raised when files of the graph change, so that those of an earlier version are computed again."""
Stamps = dict[str, list[int]]
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Update:
    """What was computed.

    Args:
        name: the array of instances.
        instances: how many there are.
        changed: boxes of the heads that were taken as changed; None: everything was computed.
    """

    name: str
    instances: int
    changed: tuple[Region, ...] | None


def update_instances(
    prediction: Path,
    edited: OpenBox | None = None,
    *,
    agglomerates: Path | None = None,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> Update:
    """Compute the instances of a prediction again from its stored heads, and write them in their array.

    The result is that of a computation of everything. An interrupted call is continued by the next one.

    Args:
        prediction: OME-Zarr group that `volumen predict --instances` wrote.
        edited: region of the heads that was edited, start and stop per axis in voxels of the prediction, besides the
            chunks that were written since the last call.
        agglomerates: WEBKNOSSOS dataset to create, with the regions of which the instances consist as a layer, and an
            agglomerate file that joins them; None: none.
        workers: number of threads.
        progress: called with the title of a step, the number of its finished blocks, and the number of all.

    Raises:
        VolumenError: the folder holds no finished prediction with instances, its mask has changed, the region lies
            outside, or the dataset exists.
    """
    stored = _StoredInstances(prediction)
    if agglomerates is not None:
        _check_new(agglomerates)
    box = resolve_region(edited, stored.shape, "--edited")
    stamps = {name: _stamps(stored.head_folder(name)) for name in stored.rules.sources}
    changed = stored.forget_changes(stamps, None if box is None else tuple(slice(*side) for side in box))
    stored.compute(workers, progress)
    count = stored.write(workers, progress)
    if agglomerates is not None:
        try:
            stored.write_agglomerates(agglomerates, workers, progress)
        except BaseException:
            shutil.rmtree(agglomerates, ignore_errors=True)
            raise
    return Update(stored.rules.name, count, changed)


class _StoredInstances:
    """The heads, graph and instances of a finished prediction."""

    def __init__(self, prediction: Path) -> None:
        recipe = read_provenance(prediction)
        rules = read_rules(recipe.get("instances")) if recipe else None
        if recipe is None or rules is None or (prediction / STATE_FOLDER).exists():
            raise VolumenError(
                prediction,
                expected="a finished prediction with instances, NAME.zarr",
                found="a prediction without instances" if recipe else "none",
                remedy="write it by volumen predict --instances",
            )
        self.prediction, self.rules = prediction, rules
        self.folder = prediction / GRAPH_FOLDER
        self.shape = tuple(stop - start for start, stop in recipe["region"])
        self.origin = tuple(start for start, _ in recipe["region"])
        self._heads = {name: open_volume(str(self.head_folder(name))) for name in rules.sources}
        self._mask = _mask_of(prediction, recipe)
        blocks = tuple(recipe["blocks"])
        self.arrays = self._output(blocks, recipe)
        self._local = ZarrOutput(
            self.folder / "pieces",
            instance_specs(rules),
            self.shape,
            blocks,
            spacing=self.arrays.spacing,
            compress="lz4",
            pyramid=False,
        )
        source = Source(rules, _voxel_size(recipe, len(self.shape)), _offsets(recipe, rules, len(self.shape)))
        block = aligned_block(rules.block or (), self.shape, blocks, BLOCK_VOXELS)
        self.graph = VolumeGraph(self.shape, block, source, self.folder)
        parts = [VERSION, rules.plain(), source.spacing, source.offsets, self.shape, block, recipe["mask"]]
        self._key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def head_folder(self, name: str) -> Path:
        """Return the folder of a head."""
        return find_target(self.prediction, name)

    def _output(self, blocks: tuple[int, ...], recipe: AnyMapping[str, Any]) -> ZarrOutput:
        folder = self.prediction / LABELS / self.rules.name
        spacing, shift = _place_of(folder)
        return ZarrOutput(
            self.prediction,
            instance_specs(self.rules),
            self.shape,
            blocks,
            spacing=spacing,
            unit=recipe["input"]["geometry"].get("unit"),
            origin=self.origin,
            place=tuple(t - start * s for t, start, s in zip(shift, self.origin, spacing, strict=True)),
            compress=settings_of_record(recipe).get("compress", "zstd"),
            pyramid=(folder / "1").exists(),
        )

    def forget_changes(
        self, stamps: AnyMapping[str, Stamps], edited: Region | None
    ) -> tuple[Region, ...] | None:
        """Remove what depends on changed heads, and record the present ones; return the changed boxes."""
        record = self._record()
        changed: tuple[Region, ...] | None = None
        if record.get("key") != self._key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.graph.create()
        else:
            chunks = {
                key: box
                for name, now in stamps.items()
                for key, box in self._changed(name, record["heads"].get(name, {}), now)
            }
            changed = (*([edited] if edited else []), *chunks.values())
            for box in changed:
                self.graph.forget(box)
        content = {"key": self._key, "heads": stamps}
        write_atomically(self.folder / RECORD, json.dumps(content).encode())
        return changed

    def _record(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _changed(self, name: str, before: Stamps, now: Stamps) -> Iterator[tuple[str, Region]]:
        """Yield the place and the box of each chunk of a head that was written since."""
        sides = self._heads[name].chunks
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                index = [int(part) for part in key.split("/")][-len(self.shape) :]
                yield (
                    "/".join(map(str, index)),
                    tuple(
                        slice(i * side, min((i + 1) * side, n))
                        for i, side, n in zip(index, sides, self.shape, strict=True)
                    ),
                )

    def compute(self, workers: int, progress: ProgressCallback | None) -> None:
        """Run the steps of the graph, as far as they are not done."""
        self._local.create()
        self.graph.create()

        def fragments(number: int) -> None:
            self.graph.find_fragments(number, self._read, self._allowed, self._write_local, _always)

        def edges(number: int) -> None:
            self.graph.find_edges(number, self._read_local, self._read, self._allowed, _always)

        self._run("finding fragments", fragments, workers, progress)
        self.graph.join()
        self._run("measuring edges", edges, workers, progress)

    def write(self, workers: int, progress: ProgressCallback | None) -> int:
        """Merge the fragments, write the instances in all levels, and return how many there are."""
        count = self.graph.agglomerate()

        def number(block: int) -> None:
            box, values = self.graph.numbered(block, self._read_local)
            self.arrays.write(self.rules.name, box, values[None])

        self._run("numbering instances", number, workers, progress)
        _coarsen(self.arrays)
        describe_instances(self.arrays, self.rules.name)
        return count

    def write_agglomerates(self, dataset: Path, workers: int, progress: ProgressCallback | None) -> None:
        """Write the regions as a layer of a WEBKNOSSOS dataset, with an agglomerate file of the instances."""
        name = f"{self.rules.sources[0]}_regions"
        whole = self.arrays
        spec = InstanceSpec(Head(name, 1, "none", "instances"))
        with TemporaryDirectory(prefix="regions-", dir=self.folder) as scratch:
            arrays = ZarrOutput(
                Path(scratch), [spec], self.shape, whole.block_shape, spacing=whole.spacing, unit=whole.unit,
                origin=whole.origin, place=whole.place, compress="lz4",
            )  # fmt: skip
            arrays.create()

            def write(block: int) -> None:
                box, values = self.graph.regions(block, self._read_local)
                arrays.write(name, box, values[None])

            self._run("writing regions", write, workers, progress)
            _coarsen(arrays)
            layer = dataset / name
            write_layer(layer, arrays, name, compress="zstd")
            start = first_voxel_of(layer)
            found = self.graph.composition()
            places = np.zeros((len(found.places), 3), np.int64)
            places[:, : len(self.shape)] = found.places[:, ::-1]
            write_agglomerates(
                layer / FOLDER / f"{self.rules.name}{SUFFIX}",
                Mapping(found.instance, places + np.array(start), found.edges, found.affinities),
            )
            add_attachment(layer, FOLDER, self.rules.name, f"{FOLDER}/{self.rules.name}{SUFFIX}")
            write_description(dataset, arrays, [layer])

    def _run(
        self, title: str, job: Callable[[int], None], workers: int, progress: ProgressCallback | None
    ) -> None:
        for done, _ in enumerate(in_threads(job, range(self.graph.count), workers), start=1):
            if progress is not None:
                progress(title, done, self.graph.count)

    def _read(self, box: Region) -> dict[str, np.ndarray]:
        return {name: volume.read(box) for name, volume in self._heads.items()}

    def _allowed(self, box: Region) -> np.ndarray | None:
        if self._mask is None:
            return None
        place = tuple(
            slice(part.start + first, part.stop + first) for part, first in zip(box, self.origin, strict=True)
        )
        return np.asarray(self._mask.read(place).any(axis=0))

    def _read_local(self, box: Region) -> np.ndarray:
        return self._local.read(self.rules.name, box)[0]

    def _write_local(self, box: Region, values: np.ndarray) -> None:
        self._local.write(self.rules.name, box, values[None])


def _coarsen(arrays: ZarrOutput) -> None:
    """Write the coarser levels of an output."""
    for level in range(1, len(arrays.factors) + 1):
        for part in range(arrays.box_count(level)):
            name, box = arrays.box(level, part)
            arrays.write(name, box, arrays.coarsened(name, level, box), level)


def _check_new(dataset: Path) -> None:
    """Check that a dataset can be created.

    Raises:
        VolumenError: something exists there, or h5py is not installed.
    """
    library("h5py", str(dataset))
    if dataset.exists():
        raise VolumenError(dataset, expected="a new folder", found="an existing one", remedy="choose another")


def _always() -> None:
    """Allow every block to be written."""


def _stamps(folder: Path) -> Stamps:
    """Return when each chunk file of a head was written, in nanoseconds, and its size, by the chunk's index."""
    found: Stamps = {}
    root = folder / "0" / "c"
    for where, _, files in os.walk(root):
        head = [] if Path(where) == root else list(Path(where).relative_to(root).parts)
        for name in files:
            index = [*head, name]
            if chunk_index(index, len(index)) is not None:
                state = (Path(where) / name).stat()
                found["/".join(index)] = [state.st_mtime_ns, state.st_size]
    return found


def _voxel_size(recipe: AnyMapping[str, Any], ndim: int) -> tuple[float, ...]:
    known = recipe.get("voxel_size") or recipe["input"]["geometry"].get("spacing")
    return tuple(known or (1.0,) * ndim)


def _offsets(recipe: AnyMapping[str, Any], rules: InstanceRules, ndim: int) -> tuple[tuple[int, ...], ...]:
    if rules.affinities is None:
        return ()
    tasks = recipe["made_of"].get("auxiliary_tasks") or {}
    return offsets_of(tasks.get(rules.affinities, {}), ndim)


def _mask_of(prediction: Path, recipe: AnyMapping[str, Any]) -> Any:
    """Return the mask of the prediction, or None.

    Raises:
        VolumenError: it has changed.
    """
    if recipe["mask"] is None:
        return None
    mask = open_volume(recipe["mask"]["path"])
    if mask.fingerprint() != recipe["mask"]["fingerprint"]:
        raise VolumenError(
            recipe["mask"]["path"],
            expected=f"the mask that {prediction} was made with",
            found="another content",
            remedy="predict again",
        )
    return mask


def _place_of(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return voxel size and place in space of the first level of an OME-Zarr group, per axis."""
    content = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    found = content["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    named = {item["type"]: tuple(item[item["type"]]) for item in found}
    return named["scale"], named["translation"]
