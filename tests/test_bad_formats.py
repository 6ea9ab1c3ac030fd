"""Damaged and ambiguous volumes of other programs, on the command line: one line on stderr, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from prediction import save_checkpoint
from test_volume_formats import FILES

from volumen.cli.main import main

h5py = pytest.importorskip("h5py")
mrcfile = pytest.importorskip("mrcfile")
nrrd = pytest.importorskip("nrrd")

ARRAY = np.random.default_rng(0).integers(0, 200, (12, 13, 14)).astype(np.uint8)


@pytest.fixture
def refused(tmp_path, capsys):
    """Return a function that predicts an image and returns the only line on stderr."""
    checkpoint = save_checkpoint(tmp_path / "m.pth")

    def run(image, *words):
        before = sorted(path for path in tmp_path.rglob("*"))
        command = ["predict", "-i", str(image), "-m", str(checkpoint), "-o", str(tmp_path / "out"), *words]
        assert main([*command, "--device", "cpu", "--quiet"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return lines[0]

    return run


def test_hdf5_with_several_volumes(tmp_path, refused):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one"], file["two"] = ARRAY, ARRAY
    line = refused(tmp_path / "a.h5")
    assert "found /one (12, 13, 14), /two (12, 13, 14); name one as a.h5:/one" in line
    assert "expected a dataset of numbers" in refused(f"{tmp_path / 'a.h5'}:/three")


def test_hdf5_that_another_program_writes(tmp_path, refused):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = ARRAY
    script = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "a.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline()
        assert "a.h5: is being written by another program" in refused(tmp_path / "a.h5")
        writer.stdin.close()


def test_a_truncated_mrc(tmp_path, refused):
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(ARRAY.astype(np.int16))
    (tmp_path / "a.mrc").write_bytes((tmp_path / "a.mrc").read_bytes()[:-100])
    assert "a.mrc: is shorter than its header says, expected 5392 bytes, found 5292" in refused(
        tmp_path / "a.mrc"
    )


def test_directions_that_are_not_at_right_angles(tmp_path, refused):
    header = {"space": "RAS", "space directions": [[1, 0.2, 0], [0, 1, 0], [0, 0, 1]]}
    nrrd.write(str(tmp_path / "a.nrrd"), ARRAY.T, header, index_order="F")
    assert "expected space directions at right angles" in refused(tmp_path / "a.nrrd")
    with zipfile.ZipFile(FILES / "itk_images.zip") as archive:
        archive.extract("raw.mha", tmp_path)
    content = (
        (tmp_path / "raw.mha").read_bytes().replace(b"0.29552020666133955 0 ", b"0.39552020666133955 0 ")
    )
    (tmp_path / "raw.mha").write_bytes(content)
    assert "raw.mha: expected axes at right angles, found TransformMatrix" in refused(tmp_path / "raw.mha")


def test_a_unit_that_nobody_knows_is_refused_in_training(tmp_path, capsys):
    header = {"space": "RAS", "space directions": np.eye(3), "space units": ["parsec"] * 3}
    for folder, name in (("images", "a"), ("labels", "a_cell")):
        (tmp_path / folder).mkdir()
        nrrd.write(
            str(tmp_path / folder / f"{name}.nrrd"), (ARRAY > 100).astype(np.uint8).T, header, index_order="F"
        )
    assert main(["inspect", str(tmp_path), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "a space whose unit is 'parsec'" in line


def test_a_webknossos_layer_without_the_magnification(tmp_path, refused):
    with zipfile.ZipFile(FILES / "webknossos_wkw.zip") as archive:
        archive.extractall(tmp_path / "d")
    line = refused(tmp_path / "d" / "cells", "--level", "1")
    assert "d/cells: expected magnification 2-2-1 (level 1), found magnifications 1" in line


@pytest.mark.parametrize("kind", ["missing", "series", "tilt"])
def test_a_dicom_series_that_is_no_grid(tmp_path, refused, kind):
    pytest.importorskip("pydicom")
    from test_dicom_series import STORED, write_series, write_slice

    folder = write_series(tmp_path / "ct")
    if kind == "missing":
        (folder / "IM0001").unlink()
        expected = ": 1 missing; copy the series again"
    elif kind == "series":
        write_slice(folder / "X", STORED[0], (10, 20, 45), series="9", SeriesDescription="T2")
        expected = "found 2 series"
    else:
        for number, pixels in enumerate(STORED):
            write_slice(folder / f"IM{(number * 7 + 3) % 23:04d}", pixels, (0, 0.75 * number, 2.5 * number))
        expected = "found a tilted gantry (16.7 degrees)"
    assert expected in refused(folder)


@pytest.mark.parametrize("kind", ["precomputed", "n5", "zip"])
def test_damaged_folders_and_archives(tmp_path, refused, kind):
    if kind == "precomputed":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "info").write_text(json.dumps({"scales": [{"key": "1"}]}))
        assert "a: its `info` is damaged" in refused(tmp_path / "a")
    elif kind == "n5":
        (tmp_path / "a.n5").mkdir()
        (tmp_path / "a.n5" / "attributes.json").write_text('{"dimensions": [1, 2], "n5": "2.5"}')
        assert "a.n5: its attributes are damaged, found no blockSize" in refused(tmp_path / "a.n5")
    else:
        (tmp_path / "a.zarr.zip").write_bytes(b"PK\3\4 and no more")
        assert "a.zarr.zip: cannot be read as a zipped zarr" in refused(tmp_path / "a.zarr.zip")


@pytest.mark.parametrize(
    ("suffix", "words", "expected"),
    [
        (".mrc", [], "normals with 3 channels"),
        (".webknossos", [], "with 3 channels"),
        (".tif", ["--format", "nrrd"], "expected a name for --format nrrd, found .tif"),
    ],
)
def test_outputs_that_a_format_cannot_hold(tmp_path, capsys, suffix, words, expected):
    import zarr

    zarr.save_array(tmp_path / "a.zarr", ARRAY)
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    before = sorted(tmp_path.rglob("*"))
    command = [
        "predict",
        "-i",
        str(tmp_path / "a.zarr"),
        "-m",
        str(checkpoint),
        "-o",
        str(tmp_path / f"p{suffix}"),
    ]
    targets = [] if words else ["--targets", "normals"]
    assert main([*command, *words, *targets, "--device", "cpu", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert sorted(tmp_path.rglob("*")) == before
