"""Make the film of README.md from a longer training than that of `make demo`.

    python docs/draw_film.py -o picture

The roll of training is labelled everywhere; the network learns for 6400 steps, see docs/examples/picture.yaml. The film
is stored in docs/images only if the surface normals of the held-out roll err by less than 15 degrees on average, as
`volumen evaluate` measures it.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

logger = logging.getLogger("volumen.draw_film")

EXPERIMENT = ROOT / "docs" / "examples" / "picture.yaml"
LARGEST_ERROR = 15.0


def main() -> int:
    """Train, predict, score and draw; a finished step is not repeated."""
    from volumen.cli.demo import draw_heldout, run_command
    from volumen.phantom.volume import write_phantom

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("picture"), help="folder of everything made"
    )
    parser.add_argument("--size", type=int, default=192, help="voxels along each side of the phantom")
    parser.add_argument("--epochs", type=int, help="fewer epochs than the experiment's, to try the script")
    parser.add_argument("--verbose", action="store_true", help="more messages")
    parser.add_argument("--quiet", action="store_true", help="warnings and errors only")
    options = parser.parse_args()
    data, run = options.output / "phantom", options.output / "runs" / "picture"
    if not data.is_dir():
        write_phantom(data, (options.size,) * 3, labelled="all")
    heldout, best, report = data / "heldout", run / "picture_best.pth", options.output / "report"
    train = ["train", "-i", data, "-o", run.parent, "--config-path", EXPERIMENT, "--resume"]
    if options.epochs:
        train += ["--max-epochs", options.epochs]
    commands = [
        train,
        ["predict", "-i", heldout, "-m", best, "-o", options.output / "prediction"],
        ["evaluate", "-p", options.output / "prediction", "-l", heldout / "labels", "-o", report],
    ]
    for words in commands:
        code = run_command([str(word) for word in words], options)
        if code:
            return code
    film = draw_heldout(heldout, best, options.output / "demo.gif")
    error = json.loads((report / "metrics.json").read_text())["mean"]["surface_normals/angular_error"]
    logger.info("surface normals of the held-out roll err by %.1f degrees; film: %s", error, film)
    if error >= LARGEST_ERROR:
        logger.error("not stored in docs/images: the error must be below %g degrees", LARGEST_ERROR)
        return 1
    shutil.copyfile(film, ROOT / "docs" / "images" / "demo.gif")
    return 0


if __name__ == "__main__":
    sys.exit(main())
