"""CPU seconds until a training can begin: thousands of small images, and a huge volume of which little is stored.

    python benchmarks/start_up.py many --images 500 2000 10000
    python benchmarks/start_up.py sparse --side 16384 --kinds plain sharded http
    python benchmarks/start_up.py sparse --side 4096 --kinds http-plain

`many` prints what the data take (finding, opening, reading labels, split, valid patches, validation) without the cache,
with an empty cache and with a full one, as ratios to the first; imports are left out, and stated once. `sparse` prints
CPU seconds, imports included, and peak memory of `volumen inspect` and of `volumen train` up to its first step.
`http` serves the sharded volume without lists of files, `http-plain` the plain one: each of its chunks is asked for.
Each figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
sys.path.insert(0, str(BUNDLE))

CHUNK, SHARD, BOXES = 128, 1024, 12
SMALL_NETWORK = ["--set", "model_config.features_per_stage=[4,8]", "--batch-size", "1", "--workers", "0"]


def write_images(root: Path, count: int) -> None:
    """Write PNG images of 64 x 64 with a label each."""
    from PIL import Image

    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        label = np.zeros((64, 64), np.uint8)
        label[:, 10:20] = 1
        image = (label * 100 + rng.integers(0, 60, label.shape)).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"i{number:05}.png")
        Image.fromarray(label * 255).save(root / "labels" / f"i{number:05}_cell.png")


def write_scroll(root: Path, side: int, sharded: bool) -> None:
    """Write an image and a label of which only the chunks of twelve boxes are stored."""
    import zarr

    settings = {"shape": (side,) * 3, "chunks": (CHUNK,) * 3, "dtype": "u1"}
    if sharded:
        settings["shards"] = (min(SHARD, side),) * 3
    arrays = []
    for part, name in (("images", "scroll"), ("labels", "scroll_ink")):
        (root / part).mkdir(parents=True)
        arrays.append(zarr.create_array(root / part / f"{name}.zarr", **settings))
    rng = np.random.default_rng(0)
    for _ in range(BOXES):
        corner = rng.integers(0, side // CHUNK - 2, 3) * CHUNK + CHUNK // 2
        region = tuple(slice(int(low), int(low) + CHUNK) for low in corner)
        box = np.zeros((CHUNK,) * 3, np.uint8)
        box[20:100, 30:90, 10:118] = 1
        arrays[0][region] = box * 80 + rng.integers(1, 100, box.shape).astype(np.uint8)
        arrays[1][region] = box


def start_data(folder: str) -> dict[str, float]:
    """Do what a training does with its data before the first step; return its CPU seconds."""
    began = time.process_time()
    from monai.bundle import ConfigParser

    from volumen.config.manager import ConfigManager

    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.yaml"))

    imports, began = time.process_time() - began, time.process_time()
    config = ConfigManager(dataset_dir=folder, tr_config={"patch_size": [32, 32]}, device="cpu")
    parser["config"] = config
    patches = len(parser.get_parsed_content("train#index"))
    blocks = len(parser.get_parsed_content("validate#dataset"))
    _ = config.intensity_properties
    seconds = time.process_time() - began
    return {"imports": imports, "seconds": seconds, "patches": patches, "blocks": blocks}


def run_command(words: list[str]) -> dict[str, float]:
    """Run a command up to its end or the first training step; return CPU seconds and peak memory in MB."""
    began = time.process_time()
    figures: dict[str, float] = {}

    def note() -> None:
        figures.setdefault("seconds", time.process_time() - began)
        figures.setdefault("megabytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    if words[0] == "train":
        from volumen.engines import trainer

        def noted(*_: object) -> None:
            note()
            print(json.dumps(figures), flush=True)
            os._exit(0)  # what follows, such as scoring the whole validation part, is not measured

        trainer.TrainStep.__call__ = noted
    from volumen.cli.main import main

    figures["code"] = main([*words, "--quiet"])
    note()
    return figures


def measure(what: str, words: list[str], cache: str) -> dict[str, float]:
    """Run one of the functions above in a process of its own."""
    environment = {**os.environ, "VOLUMEN_CACHE": cache, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--inside", what, *words], env=environment, capture_output=True, text=True
    )
    figures = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"code": done.returncode}
    if figures.get("code"):
        raise SystemExit(done.stderr)
    return figures


def compare_many(counts: list[int], folder: Path) -> None:
    print(
        f"{'images':>7} {'no cache':>9} {'first':>15} {'second':>15} {'imports':>8}   CPU s (ratio to no cache)"
    )
    for count in counts:
        data = folder / f"many{count}"
        write_images(data, count)
        runs = [
            measure("data", [str(data)], cache) for cache in ("off", *[str(folder / f"cache{count}")] * 2)
        ]
        assert len({(run["patches"], run["blocks"]) for run in runs}) == 1
        alone, first, second = (run["seconds"] for run in runs)
        told = [f"{value:6.2f} ({value / alone:4.2f})" for value in (first, second)]
        print(f"{count:>7} {alone:>9.2f} {told[0]:>15} {told[1]:>15} {runs[0]['imports']:>8.2f}", flush=True)
        tiny = ["--patch-size", "32,32", "--max-epochs", "1", "--steps-per-epoch", "1", "--val-steps", "1"]
        words = ["train", "-i", str(data), "-o", str(folder / f"out{count}"), "--device", "cpu", *tiny]
        step = measure("command", [*words, *SMALL_NETWORK], "off")
        print(f"        train: first step after {step['seconds']:.1f} CPU s, imports included", flush=True)


def compare_sparse(side: int, kinds: list[str], folder: Path) -> None:
    print(f"side {side}: {'inspect':>20} {'first training step':>22}   CPU s, peak MB (imports included)")
    for kind in kinds:
        data = folder / kind
        write_scroll(data, side, sharded="plain" not in kind)
        source = serve(data) if kind.startswith("http") else str(data)
        inspected = measure(
            "command", ["inspect", source, "--device", "cpu", "--patch-size", "64,64,64"], "off"
        )
        tiny = ["--patch-size", "64,64,64", "--max-epochs", "1", "--steps-per-epoch", "1", "--val-steps", "1"]
        words = ["train", "-i", source, "-o", str(folder / f"out_{kind}"), "--device", "cpu", *tiny]
        trained = measure("command", [*words, *SMALL_NETWORK], "off")
        figures = [f"{run['seconds']:7.1f} s {run['megabytes']:6.0f} MB" for run in (inspected, trained)]
        print(f"{kind:>10}: {figures[0]:>20} {figures[1]:>22}", flush=True)


class _WithoutChunkLists(SimpleHTTPRequestHandler):
    """Lists the folders of the data set, but none inside a zarr; answers `Range`."""

    def list_directory(self, path: str) -> object:
        return self.send_error(403) if ".zarr" in path else super().list_directory(path)

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            super().do_GET()
            return
        first, _, last = asked.partition("-")
        size = path.stat().st_size
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> str:
    """Serve a folder by HTTP from this process; return its URL."""
    kind = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 1024})
    server = kind(("127.0.0.1", 0), partial(_WithoutChunkLists, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def main() -> None:
    """Read the flags and print the figures."""
    if sys.argv[1:2] == ["--inside"]:
        what, *words = sys.argv[2:]
        print(json.dumps(start_data(words[0]) if what == "data" else run_command(words)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("many", "sparse"))
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--side", type=int, default=16384)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("plain", "sharded", "http", "http-plain"),
        default=["plain", "sharded"],
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "many":
            compare_many(options.images, Path(folder))
        else:
            compare_sparse(options.side, options.kinds, Path(folder))


if __name__ == "__main__":
    main()
