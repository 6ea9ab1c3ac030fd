"""What a terminal of 80 columns shows: whole words, whole bars, units beside errors."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tqdm import tqdm

from volumen.handlers.records.logs import BAR_FORMAT, fitting, validation_line
from volumen.metrics.units import metric_unit, short_unit
from volumen.utils.terminal.console import make_table


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize(("name", "total"), [("epoch 1/5", 8), ("epoch 1000/1000, validation", 1250)])
def test_the_training_s_bar_keeps_its_tail(columns, name, total):
    parts = ["loss 12.3456", "Dice 0.812", "0.123 patches/s"]
    stream = Terminal()
    bar = tqdm(total=total, desc=name, file=stream, ncols=columns, bar_format=BAR_FORMAT, mininterval=0)
    kept = fitting(parts, bar)
    bar.set_postfix_str(", ".join(kept), refresh=False)
    bar.update(total - 1)
    bar.refresh()
    line = stream.getvalue().replace("\n", "\r").split("\r")[-1].rstrip()
    bar.close()
    assert line.endswith("]")
    assert len(line) <= columns
    assert f"{total - 1}/{total} [" in line
    assert all(part in line for part in kept)
    assert kept == parts[: len(kept)]
    if columns >= 80:
        assert kept[0] == "loss 12.3456"


def test_errors_have_units_in_the_line_of_a_validation():
    numbers = {
        "val/loss": 0.5, "val/ink/dice": 0.81, "val/ink/hd95": 3.0, "val/normals/angular_error": 12.34,
        "val/depth/mae": 1.5, "val/tensor/mae": 0.25, "val/mean_dice": 0.81,
    }  # fmt: skip
    kinds = {"ink": "binary", "normals": "vector", "depth": "distance", "tensor": "tensor"}
    assert validation_line(numbers, kinds) == (
        "loss 0.5, ink dice 0.81 hd95 3 voxels, normals angular error 12.3 degrees, depth mae 1.5 voxels,"
        " tensor mae 0.25"
    )
    assert "hd95 3 µm" in validation_line(numbers, kinds, short_unit("micrometer"))


def test_units_of_metrics():
    assert metric_unit("hd95", "binary", "nm") == "nm"
    assert metric_unit("mae", "distance") == "voxels"
    assert metric_unit("mae", "field") == metric_unit("dice", "binary") == ""
    assert metric_unit("angular_error", "axis") == "degrees"
    assert [short_unit(unit) for unit in (None, "micrometer", "um")] == ["voxels", "µm", "um"]


def table(stream: Terminal):
    found = make_table("/data/scrolls (zarr)", ("volume", "shape", "targets (foreground)", "part"), stream)
    found.add_row(
        "scroll_4_at_7.91_micrometer", "14376x7888x8096", "surface 12.3%, ink 0.4% (mask 33.1%)", "train"
    )
    found.add_row("scroll_5", "64x64x64", "surface 1.0%", "val")
    return found


@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_a_table_breaks_no_word_however_narrow_the_terminal_is(columns):
    stream = Terminal()
    Console(file=stream, width=columns, color_system=None, force_terminal=True, highlight=False).print(
        table(stream)
    )
    text = stream.getvalue()
    assert all(len(line) <= columns for line in text.splitlines())
    for word in (
        "scroll_4_at_7.91_micrometer",
        "14376x7888x8096",
        "surface",
        "12.3%,",
        "33.1%)",
        "train",
        "scroll_5",
    ):
        assert word in text, text
    assert ("╭" in text) is (columns >= 80)
