"""Dice of thin crops predicted by themselves, against the same slices cut out of the prediction of the whole image.

A crop has less to see than the whole, and features are normalised over smaller windows: the difference says what both
cost. Run as

    python benchmarks/small_images.py MODEL.pth DATA TARGET --sizes 20,32,48

with a model of `volumen train` and its folder of data, of which the first image and its label are taken.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover
from volumen.inference.predictor import Predictor, load_predictor, predict_array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("target")
    parser.add_argument("--sizes", default="20,32,48", help="slices per crop, by commas")
    parser.add_argument("--width", type=int, help="voxels of the other axes that are used; all without it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    predictor = load_predictor(options.model)
    case = discover(options.data).cases[0]
    image = open_volume(case.image)
    part = (slice(0, image.shape[0]), *(slice(0, min(n, options.width or n)) for n in image.shape[1:]))
    raw, truth = image.read(part), open_volume(case.labels[options.target]).read(part)[0] > 0
    whole = found(predictor, raw, options.target)
    print(f"whole {raw.shape[1:]}: {dice(whole, truth):.4f}")
    print("| slices | from | of the whole | alone | difference |\n| ---: | ---: | ---: | ---: | ---: |")
    for size in map(int, options.sizes.split(",")):
        for start in sorted({len(truth) // 5, len(truth) - size}):
            here = slice(start, start + size)
            reference = dice(whole[here], truth[here])
            alone = dice(found(predictor, np.ascontiguousarray(raw[:, here]), options.target), truth[here])
            row = f"{size} | {start} | {reference:.4f} | {alone:.4f} | {alone - reference:+.4f}"
            print(f"| {row} |", flush=True)


def found(predictor: Predictor, raw: np.ndarray, target: str) -> np.ndarray:
    """Return where a binary target is predicted: bool (*space)."""
    return predict_array(predictor, raw, targets=[target])[target][0] >= 0.5


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


if __name__ == "__main__":
    main()
