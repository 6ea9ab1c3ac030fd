"""Where the calls of POSIX are missing, as on Windows: volumes, locks, journals and a training work without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
import zarr
from data_folders import write_tiff_folder

from volumen.utils.files import positioned_io

ROOT = Path(__file__).resolve().parent.parent
ARRAY = np.random.default_rng(0).integers(0, 60_000, (12, 40, 50)).astype("u2")

HIDE = """
import os, random, signal, sys
import torch  # it asks for the platform by its name
sys.modules["fcntl"] = None
for name in ("fork", "killpg", "pread", "preadv", "pwrite", "pwritev", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
del signal.SIGHUP
"""


def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which those calls are hidden."""
    paths = [str(ROOT / "bundle"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE + code, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=600,
    )


def checked(code: str, *words: object) -> str:
    done = run(code, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


READ = """
import importlib, pkgutil, sys
import numpy as np
import volumen
from pathlib import Path

optional = ("volumen.napari_plugin.", "volumen.sharing.")
for module in pkgutil.walk_packages(volumen.__path__, "volumen."):
    if not module.name.startswith(optional):
        importlib.import_module(module.name)

from volumen.data.formats.opening import open_volume
from concurrent.futures import ThreadPoolExecutor

expected = np.load(sys.argv[1])
boxes = [(slice(z, z + 3), slice(y, y + 7), slice(y, y + 9)) for z in range(0, 9, 2) for y in range(0, 30, 3)]
for path in sys.argv[2:]:
    volume = open_volume(path, axes=None if ".nii" in path else "zyx")
    # From several threads at once, which share the open file and its place.
    with ThreadPoolExecutor(4) as threads:
        for box, block in zip(boxes, threads.map(volume.read, boxes)):
            assert np.array_equal(block[0], expected[box]), (path, box)

from volumen.inference.windows.blending import SpillFile
spill = SpillFile(Path(sys.argv[1]).parent, (2, 3))
values = np.arange(6, dtype="f4").reshape(2, 3)
for number in range(5):
    spill.put((number,), values + number)
for number in reversed(range(5)):
    assert np.array_equal(spill.take((number,)), values + number)
spill.close()

from volumen.inference.output.block_log import BlockLog, read_log
log = Path(sys.argv[1]).parent / "log"
log.write_bytes(b"1\\n2\\n33")
journal = BlockLog(log)
journal.block(4)
journal.close()
assert list(read_log(log)[0]) == [1, 2, 4]
print(len(boxes) * len(sys.argv[2:]))
"""


def test_volumes_and_journals_are_read_and_written(tmp_path):
    np.save(tmp_path / "array.npy", ARRAY)
    tifffile.imwrite(tmp_path / "raw.tif", ARRAY, photometric="minisblack")
    tifffile.imwrite(
        tmp_path / "tiles.tif", ARRAY, photometric="minisblack", tile=(16, 16), compression="zlib"
    )
    nibabel.Nifti1Image(ARRAY.transpose(), np.eye(4)).to_filename(tmp_path / "a.nii")
    zarr.create_array(tmp_path / "chunks.zarr", data=ARRAY, chunks=(5, 16, 16))
    zarr.create_array(tmp_path / "shards.zarr", data=ARRAY, chunks=(3, 10, 10), shards=(6, 20, 20))
    names = ["raw.tif", "tiles.tif", "a.nii", "chunks.zarr", "shards.zarr"]
    said = checked(READ, tmp_path / "array.npy", *(tmp_path / name for name in names))
    assert int(said) == 250


LOCK = """
import sys
from pathlib import Path
from volumen.utils.errors import VolumenError
from volumen.handlers.records.run_directory import RunDirectory

directory = RunDirectory(sys.argv[1], "run")
try:
    directory.open()
except VolumenError as error:
    sys.exit(str(error))
directory.file("1.pth").touch()
if len(sys.argv) > 2:
    sys.argv.pop()
    import subprocess
    print(subprocess.run(sys.orig_argv[:-1], capture_output=True, text=True).stderr)
directory.close()
"""


def test_one_writer_only(tmp_path):
    said = checked(LOCK.replace('"run")', '"run", resume=True)'), tmp_path, "and another one")
    assert "is training here; wait, or choose another name" in said
    # The lock is gone with its holder.
    assert not (tmp_path / "run" / ".lock").exists()
    checked(LOCK.replace('"run")', '"run", resume=True)'), tmp_path)


def test_bytes_at_a_place_are_the_same_either_way(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    descriptor = os.open(path, os.O_RDWR | positioned_io.BINARY)

    def behaviour():
        buffer = bytearray(10)
        found = positioned_io.read_into(descriptor, buffer, 195)
        written = positioned_io.write_at(descriptor, b"abc", 50)
        return found, bytes(buffer), written, positioned_io.read_at(descriptor, 20, 45)

    before = behaviour()
    for name in ("pread", "preadv", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    assert behaviour() == before
    assert before[0] == 5
    os.close(descriptor)


TRAIN = """
import sys
from volumen.cli.main import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_training_and_a_prediction_give_the_same_numbers(tmp_path):
    volume = np.zeros((24, 48, 48), "u1")
    volume[6:18, 10:40, 12:36] = 1
    folder = write_tiff_folder(tmp_path / "data", {"a": {"ink": volume}})
    results = []
    for name, hidden in (("with", False), ("without", True)):
        code = HIDE + TRAIN if hidden else TRAIN
        out = tmp_path / name
        for words in (
            ["train", "-i", folder, "-o", out, "--patch-size", "16,32,32", "--max-epochs", "1", "--workers", "0",
             "--steps-per-epoch", "2", "--val-steps", "1", "--set", "model_config.features_per_stage=[4,8]",
             "--device", "cpu", "--quiet"],
            ["predict", "-i", folder / "images", "-m", out / "model" / "model_1.pth", "-o", out / "predicted",
             "--device", "cpu", "--quiet"],
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, *map(str, words)],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT / "bundle"), "OMP_NUM_THREADS": "1"},
                timeout=600,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        weights = torch.load(out / "model" / "model_1.pth", weights_only=True)["model"]
        group = zarr.open_group(out / "predicted" / "a.zarr", mode="r")
        arrays = {key: item[:] for key, item in group.members(max_depth=None) if isinstance(item, zarr.Array)}
        results.append((weights, arrays))
    (weights, arrays), (other_weights, other_arrays) = results
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights | other_weights)
    assert arrays
    for key in arrays | other_arrays:
        np.testing.assert_array_equal(arrays[key], other_arrays[key])
