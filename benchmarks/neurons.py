"""All scores of a membrane and of the neurons that it encloses, on the validation part of a run, untuned and tuned.

    volumen train -i FIB25 -o RUNS --time-budget 35m --workers 0
    python benchmarks/neurons.py -m RUNS/model/model_best.pth -i FIB25 --objects FIB25_NEURONS -o OUT [--markdown FILE]

Three kinds of results, by the commands `volumen tune`, `volumen predict` and `volumen evaluate`: with default settings;
with settings tuned on the part that is measured, which flatters them; and crossed, tuned on one half of the part and
measured on the other, the mean of both ways. The default settings have a column for the halves, too, as halves cut
neurons. What is done lies in OUT and is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from volumen.cli.main import main as volumen
from volumen.data.layout import discover
from volumen.data.sampling.split_file import read_split
from volumen.metrics.score_names import direction_of
from volumen.utils.boxes import Box

MEMBRANE, NEURONS = "membrane", "neurons"
CHOSEN_BY = {MEMBRANE: "dice", NEURONS: "adapted_rand_error"}
COLUMNS = ("default", "tuned", "default, halves", "crossed")


class Bench:
    """Commands whose results lie in a folder.

    Args:
        checkpoint: of the run, in its folder.
        data: data set of the run, one image with one target.
        objects: data set with the numbers of the neurons of the same image.
        output: folder.
    """

    def __init__(self, checkpoint: Path, data: str, objects: str, output: Path) -> None:
        self.checkpoint, self.output = checkpoint, output
        (case,), (numbered,) = discover(data).cases, discover(objects).cases
        (self.target, label), (self.truth, numbers) = (*case.labels.items(), *numbered.labels.items())
        self.image, self.labels = Path(case.image), {MEMBRANE: Path(label), NEURONS: Path(numbers)}
        self.data = output / "data"
        for folder, path in (("images", self.image), ("labels", Path(label)), ("labels", Path(numbers))):
            (self.data / folder).mkdir(parents=True, exist_ok=True)
            link = self.data / folder / path.name
            if not link.exists():
                link.symlink_to(path.resolve())
        split = checkpoint.with_name(f"{checkpoint.stem.rpartition('_')[0]}_split.json")
        ((self.name, (whole,)),) = read_split(split).val.items()
        self.split = split
        self.parts: dict[str, Box] = {"whole": whole, **dict(zip("ab", halves(whole), strict=True))}

    def tuned(self, what: str, part: str) -> Path:
        """Return a checkpoint with the settings that are best on a part."""
        folder = self.output / f"{what}_tuned_{part}"
        name = self.checkpoint.stem.rpartition("_")[0]
        if not (folder / f"{name}_tuned.pth").exists():
            folder.mkdir(exist_ok=True)
            shutil.copy(self.checkpoint, folder)
            content = json.loads(self.split.read_text(encoding="utf-8"))
            content["val"] = {self.name: [[list(span) for span in self.parts[part]]]}
            (folder / self.split.name).write_text(json.dumps(content), encoding="utf-8")
            words = ["--target", self.target] if what == MEMBRANE else self._instances()
            words += ["--truth", self.truth] if what == NEURONS else []
            run(
                "tune",
                "-m",
                folder / self.checkpoint.name,
                "-i",
                self.data,
                "--score",
                CHOSEN_BY[what],
                *words,
            )
        return folder / f"{name}_tuned.pth"

    def scores(self, what: str, part: str, tuned_on: str | None = None) -> dict[str, float]:
        """Return all scores of a part.

        Args:
            what: membrane or neurons.
            part: whole, a or b.
            tuned_on: part on which the settings were chosen; None: the default settings.
        """
        report = self.output / f"{what}_{part}_{tuned_on or 'default'}"
        found = report.with_name(f"{report.name}.zarr")
        if not (report / "metrics.csv").exists():
            region = ",".join(f"{start}:{stop}" for start, stop in self.parts[part])
            words = self._instances() if what == NEURONS and tuned_on is None else []
            model = self.checkpoint if tuned_on is None else self.tuned(what, tuned_on)
            run(
                "predict",
                "-i",
                self.image,
                "-m",
                model,
                "-o",
                found,
                "--region",
                region,
                "--overwrite",
                *words,
            )
            only = ["--targets", self.measured(what)]
            only += ["--instances", self.measured(what)] if what == NEURONS else []
            run("evaluate", "-p", found, "-l", self.labels[what], "-o", report, "--metrics", "all", *only)
        with (report / "metrics.csv").open(newline="", encoding="utf-8") as file:
            (row,) = (row for row in csv.DictReader(file) if row["case"] == "mean")
        first = f"{self.measured(what)}/"
        return {key.removeprefix(first): float(v) for key, v in row.items() if key.startswith(first) and v}

    def measured(self, what: str) -> str:
        """Return the name of what is measured."""
        return self.target if what == MEMBRANE else f"{self.target}_instances"

    def _instances(self) -> list[str]:
        return ["--instances", self.target]

    def columns(self, what: str) -> list[dict[str, float]]:
        """Return the scores of each of `COLUMNS`."""
        return [
            self.scores(what, "whole"),
            self.scores(what, "whole", "whole"),
            mean([self.scores(what, "a"), self.scores(what, "b")]),
            mean([self.scores(what, "a", "b"), self.scores(what, "b", "a")]),
        ]


def halves(box: Box) -> tuple[Box, Box]:
    """Return the halves of a box across its longest axis."""
    lengths = [stop - start for start, stop in box]
    axis = lengths.index(max(lengths))
    start, stop = box[axis]
    middle = (start + stop) // 2
    return tuple(
        tuple(span if other == axis else old for other, old in enumerate(box))
        for span in ((start, middle), (middle, stop))
    )  # type: ignore[return-value]


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means of the scores that all rows have."""
    return {
        key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if all(key in row for row in rows)
    }


def run(*words: object) -> None:
    """Run a command of the program.

    Raises:
        SystemExit: it failed.
    """
    code = volumen([str(word) for word in words] + ["--quiet"])
    if code:
        raise SystemExit(code)


def table(what: str, columns: Sequence[dict[str, float]]) -> str:
    """Return a Markdown table of the scores."""
    lines = [f"| {what} | better | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    for name in columns[0]:
        smaller = direction_of(f"x/{name}")
        way = {True: "smaller", False: "larger", None: "–"}[smaller]
        cells = [f"{column[name]:.4g}" if name in column else "–" for column in columns]
        lines.append(f"| `{name}` | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--checkpoint", type=Path, required=True, help="checkpoint in the run's folder")
    parser.add_argument("-i", "--data", required=True, help="data set of the run")
    parser.add_argument("--objects", required=True, help="data set with the numbers of the neurons")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    bench = Bench(options.checkpoint, options.data, options.objects, options.output)
    text = "\n".join(table(what, bench.columns(what)) for what in (MEMBRANE, NEURONS))
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
