"""Neurons by affinities and shape descriptors against those that the walls of a membrane network enclose.

    volumen train -i FIB25 -o RUNS --model-name membrane --time-budget 35m --workers 0 --seed 0
    volumen train -i FIB25_NEURONS -o RUNS --config-path bundle/configs/recipes/neurons.yaml --time-budget 35m
        --workers 0 --seed 0 --split RUNS/membrane/membrane_split.json
    python benchmarks/neurons_affinities.py --membrane RUNS/membrane/membrane_best.pth
        --neurons RUNS/neurons/neurons_best.pth --data FIB25_NEURONS -o OUT [--markdown FILE]

Both networks train on the same part of one image; the rest validates, and is predicted once by each. Instances are then
made of the stored heads as `volumen predict --instances` makes them, by many thresholds, and compared with the numbers
of the neurons: variation of information (splits plus merges, in bits) and adapted Rand error. The columns are those of
`neurons.py`: default settings; settings tuned on the part that is measured, which flatters them; and the means of
both halves of the part, by default settings, and crossed: tuned on one half, measured on the other. Predictions and
scores lie in OUT and are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np
from neurons import COLUMNS, halves, run

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.layout import discover
from volumen.data.sampling.split_file import read_split
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.postprocess.instance_output import head_kinds
from volumen.inference.predictor import load_predictor
from volumen.inference.rules import offsets_of, read_rules, resolve_rules
from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.partition import adapted_rand_error, voi_merge, voi_split
from volumen.tuning.instance_maps import InstanceMaps
from volumen.utils.boxes import Box

MEMBRANE, NEURONS = "membrane", "neurons"
METHODS = {
    MEMBRANE: ("{target}",),
    NEURONS: ("affs", "affinities=affs,agglomeration=mean", "{target}", "boundary={target},descriptors=lsd"),
}
"""Values of `--instances` by network; {target} stands for its labelled target."""
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
MERGE_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SIZES = (0, 100, 1000)
BLOCK = (64, 64, 64)


@dataclass(frozen=True)
class Scores:
    """Scores of one segmentation.

    Args:
        rand: adapted Rand error.
        split, merge: variation of information, bits.
    """

    rand: float
    split: float
    merge: float


@dataclass(frozen=True, order=True)
class Settings:
    """Settings that are tuned."""

    threshold: float = 0.5
    merge_threshold: float = 0.5
    min_size: int = 0


CHOICES: dict[str, Callable[[Scores], float]] = {
    "variation of information": lambda scores: scores.split + scores.merge,
    "adapted Rand error": lambda scores: scores.rand,
}
"""Errors by which settings are chosen."""


def grid() -> Iterator[Settings]:
    """Yield the settings that are tried, those of one threshold in a row."""
    for values in itertools.product(sorted({*THRESHOLDS, 0.5}), MERGE_THRESHOLDS, SIZES):
        yield Settings(*values)


class Network:
    """A network, its prediction of the validation part, and scores of instances that are made of it.

    Args:
        name: a key of `METHODS`.
        checkpoint: of the run, in its folder.
        data: data set with the numbers of the neurons.
        output: folder.
    """

    def __init__(self, name: str, checkpoint: Path, data: str, output: Path) -> None:
        self.name, self.output = name, output
        self.predictor = load_predictor(checkpoint)
        tasks = self.predictor.config["auxiliary_tasks"] or {}
        (self.target,) = (head.name for head in self.predictor.heads() if head.name not in tasks)
        split = checkpoint.with_name(f"{checkpoint.stem.rpartition('_')[0]}_split.json")
        ((case, (box,)),) = read_split(split).val.items()
        (found,) = (case_ for case_ in discover(data).cases if Path(case_.image).stem == case)
        (label,) = found.labels.values()
        self.box: Box = box
        self.truth = open_volume(label).read(_slices(box))[0]
        self.spacing = open_volume(found.image).spacing or self.predictor.spacing or (1.0,) * len(box)
        self.heads = self._predicted(checkpoint, found.image)

    @property
    def methods(self) -> tuple[str, ...]:
        """The values of `--instances` that are compared."""
        return tuple(method.format(target=self.target) for method in METHODS[self.name])

    def scores(self, method: str, part: Box) -> dict[Settings, Scores]:
        """Return the scores of a part of the image by all settings; the part is segmented without its surroundings."""
        place = "x".join(f"{start}-{stop}" for start, stop in part)
        path = self.output / f"{self.name}_{method.translate(str.maketrans('=,', '-_'))}_{place}.csv"
        if not path.exists():
            rows = list(self._measured(method, part))
            with path.with_suffix(".part").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow([item.name for kind in (Settings, Scores) for item in fields(kind)])
                table.writerows([*astuple(settings), *astuple(scores)] for settings, scores in rows)
            path.with_suffix(".part").rename(path)
        with path.open(newline="", encoding="utf-8") as file:
            return {
                Settings(
                    float(row["threshold"]), float(row["merge_threshold"]), int(row["min_size"])
                ): Scores(*(float(row[item.name]) for item in fields(Scores)))
                for row in csv.DictReader(file)
            }

    def _measured(self, method: str, part: Box) -> Iterator[tuple[Settings, Scores]]:
        tasks = self.predictor.config["auxiliary_tasks"] or {}
        rules = read_rules(method)
        assert rules is not None
        rules = resolve_rules(rules, tasks, head_kinds(self.predictor))
        region = _slices([(a - first, b - first) for (a, b), (first, _) in zip(part, self.box, strict=True)])
        heads = {
            name: ArrayVolume(self.heads[name][(slice(None), *region)], axes="czyx") for name in rules.sources
        }
        offsets = offsets_of(tasks[rules.affinities], len(part)) if rules.affinities else ()
        with tempfile.TemporaryDirectory() as folder:
            maps = InstanceMaps(heads, rules, self.spacing, offsets, BLOCK, Path(folder) / "maps")
            for settings in grid():
                found = maps(asdict(settings))[0]
                counts = overlaps(np.asarray(found), self.truth[region])
                yield settings, Scores(adapted_rand_error(counts), voi_split(counts), voi_merge(counts))

    def _predicted(self, checkpoint: Path, image: str) -> dict[str, np.ndarray]:
        """Predict the part unless that is done, and return the stored outputs of all heads."""
        store, done = self.output / f"{self.name}.zarr", self.output / f"{self.name}.done"
        if not done.exists():
            region = ",".join(f"{start}:{stop}" for start, stop in self.box)
            words = ["-i", image, "-m", checkpoint, "-o", store, "--region", region]
            run("predict", *words, "--no-pyramid", "--overwrite")
            done.touch()
        names = [head.name for head in self.predictor.heads()]
        volumes = {name: open_volume(str(find_target(store, name))) for name in names}
        return {
            name: volume.read(_slices([(0, n) for n in volume.shape])) for name, volume in volumes.items()
        }


def _slices(box: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def columns(network: Network, method: str, choice: Callable[[Scores], float]) -> dict[str, list[Scores]]:
    """Return the scores of each of `COLUMNS`, of one part or of both halves."""
    first, second = halves(network.box)
    whole, a, b = (network.scores(method, part) for part in (network.box, first, second))
    default = Settings()
    return dict(
        zip(
            COLUMNS,
            (
                [whole[default]],
                [whole[best(whole, choice)]],
                [a[default], b[default]],
                [a[best(b, choice)], b[best(a, choice)]],
            ),
            strict=True,
        )
    )


def best(scores: Mapping[Settings, Scores], choice: Callable[[Scores], float]) -> Settings:
    """Return the settings with the smallest error; of equal ones the default, then the smallest numbers."""
    return min(scores, key=lambda settings: (choice(scores[settings]), settings != Settings(), settings))


def cell(scores: Sequence[Scores]) -> str:
    """Return mean splits, merges, their sum and the adapted Rand error as text."""
    split, merge, rand = (
        float(np.mean([getattr(s, name) for s in scores])) for name in ("split", "merge", "rand")
    )
    return f"{split:.3f} + {merge:.3f} = {split + merge:.3f}; {rand:.4f}"


def table(networks: Sequence[Network], choice: str) -> str:
    """Return a Markdown table: a row for each method, in each cell variation of information and Rand error."""
    lines = [
        f"Tuned by {choice}. Cells: splits + merges = sum (bits); adapted Rand error.",
        "",
        f"| network | `--instances` | {' | '.join(COLUMNS)} | best settings |",
        "| --- |" + " --- |" * (len(COLUMNS) + 2),
    ]
    for network in networks:
        for method in network.methods:
            found = columns(network, method, CHOICES[choice])
            settings = best(network.scores(method, network.box), CHOICES[choice])
            chosen = ", ".join(f"{key} {value:g}" for key, value in asdict(settings).items())
            cells = [cell(found[name]) for name in COLUMNS]
            lines.append(f"| {network.name} | `{method}` | {' | '.join(cells)} | {chosen} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--membrane", type=Path, required=True, help="checkpoint of the membrane's run")
    parser.add_argument("--neurons", type=Path, required=True, help="checkpoint of the recipe's run")
    parser.add_argument("--data", required=True, help="data set with the numbers of the neurons")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    networks = [
        Network(name, getattr(options, name), options.data, options.output) for name in (MEMBRANE, NEURONS)
    ]
    if networks[0].box != networks[1].box:
        raise SystemExit(
            f"the networks validate on different parts: {networks[0].box} and {networks[1].box}; "
            "train the second with --split of the first"
        )
    text = "\n".join(table(networks, choice) for choice in CHOICES)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
