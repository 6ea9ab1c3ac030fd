"""The exchange formats by name: the writer of each format, and the function that opens a written file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from volumen.sharing.bioimageio import open_bioimageio, write_bioimageio
from volumen.sharing.exporters import (
    Run,
    Writer,
    open_aoti,
    open_onnx,
    open_pt2,
    open_torchscript,
    write_aoti,
    write_onnx,
    write_pt2,
    write_torchscript,
)

WRITERS: dict[str, Writer] = {
    "torchscript": write_torchscript,
    "onnx": write_onnx,
    "pt2": write_pt2,
    "aoti": write_aoti,
    "bioimageio": write_bioimageio,
}
OPENERS: dict[str, Callable[[Path], Run]] = {
    "torchscript": open_torchscript,
    "onnx": open_onnx,
    "pt2": open_pt2,
    "aoti": open_aoti,
    "bioimageio": open_bioimageio,
}
SUFFIXES = {"aoti": ".pt2", "bioimageio": ".zip"}
"""Suffixes that the programs which run a format insist on."""
