"""The command line: every mistake is one line on stderr, an exit code, and an output folder left untouched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from data_folders import image_of, shells, write_tiff_folder

from volumen.cli.main import main
from volumen.handlers.records.run_directory import RunDirectory

SMALL = [
    "--set", "model_config.features_per_stage=[4, 8]",
    "--max-epochs", "1", "--steps-per-epoch", "1", "--val-steps", "1",
    "--workers", "0", "--batch-size", "1", "--device", "cpu", "--amp", "off",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A data folder with one small volume and target `ink`."""
    return write_tiff_folder(tmp_path / "data", {"scroll_1": {"ink": shells((24, 24, 48))}})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def train(data: Path, out: Path, *words: str) -> int:
    return main(["train", "-i", str(data), "-o", str(out), "--patch-size", "8,8,8", *SMALL, *words])


def refused(capsys, data: Path, out: Path, *words: str) -> str:
    """Run a training that must be refused; return its one line."""
    before = sorted(out.rglob("*")) if out.exists() else None
    code = train(data, out, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    after = sorted(out.rglob("*")) if out.exists() else None
    assert after == before, "the output folder was touched"
    return lines[0]


def rewrite(data: Path, part: str, name: str, array: np.ndarray) -> None:
    tifffile.imwrite(data / part / f"{name}.tif", array)


def test_a_good_run_leaves_the_promised_files(folder, tmp_path):
    assert train(folder, tmp_path / "out") == 0
    run = tmp_path / "out" / "model"
    for name in ("model_1.pth", "model_config.yaml", "model_split.json", "metrics.csv"):
        assert (run / name).is_file(), name


def test_no_images_folder(folder, tmp_path, capsys):
    line = refused(capsys, folder / "labels", tmp_path / "out")
    assert "no images/ folder" in line
    assert str(folder) in line


def test_a_label_of_another_shape(folder, tmp_path, capsys):
    rewrite(folder, "labels", "scroll_1_ink", np.ones((24, 24, 40), np.uint8))
    line = refused(capsys, folder, tmp_path / "out")
    assert "scroll_1_ink.tif" in line
    assert "(24, 24, 48)" in line
    assert "(24, 24, 40)" in line


def test_a_target_without_a_label(folder, tmp_path, capsys):
    line = refused(capsys, folder, tmp_path / "out", "--set", "dataset_config.targets={surface: {}}")
    assert "surface" in line
    assert "ink" in line


def test_a_label_of_fractions(folder, tmp_path, capsys):
    rewrite(folder, "labels", "scroll_1_ink", shells((24, 24, 48)).astype(np.float32) * 0.5)
    line = refused(capsys, folder, tmp_path / "out")
    assert "scroll_1_ink.tif" in line
    assert "0.5" in line


def test_a_patch_larger_than_the_volume_is_padded(tmp_path):
    label = shells((12, 24, 48))
    data = write_tiff_folder(tmp_path / "data", {"a": {"ink": label}})
    words = ["train", "-i", str(data), "-o", str(tmp_path / "out"), "--patch-size", "16,16,16", *SMALL]
    assert main(words) == 0


def test_an_unknown_config_key(folder, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    path.write_text("tr_config:\n  bach_size: 3\n")
    line = refused(capsys, folder, tmp_path / "out", "--config-path", str(path))
    assert str(path) in line
    assert "did you mean batch_size?" in line


def test_an_unknown_loss(folder, tmp_path, capsys):
    line = refused(capsys, folder, tmp_path / "out", "--loss", "SoftDiseLoss")
    assert "SoftDiseLoss" in line
    assert "SoftDiceLoss" in line


def test_losses_beside_malformed_targets(folder, tmp_path, capsys):
    targets = "dataset_config.targets=[ink]"
    line = refused(capsys, folder, tmp_path / "out", "--loss", "SoftDiceLoss", "--set", targets)
    assert "dataset_config.targets" in line
    line = refused(
        capsys, folder, tmp_path / "out", "--loss", "SoftDiceLoss", "--set", "dataset_config.targets={ink: 3}"
    )
    assert "targets.ink" in line


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("{type: distance, source_target: ink, losses: [{name: MaskedMSELoss}]}", ["distance_transform"]),
        ("{type: surface_normals, source_target: inks, losses: [{name: MaskedMSELoss}]}", ["did you mean ink?"]),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_derived(folder, tmp_path, capsys, task, words):
    line = refused(capsys, folder, tmp_path / "out", "--set", f"auxiliary_tasks.d={task}")
    for word in words:
        assert word in line


def test_a_truncated_image(folder, tmp_path, capsys):
    path = folder / "images" / "scroll_1.tif"
    path.write_bytes(path.read_bytes()[:9000])
    line = refused(capsys, folder, tmp_path / "out")
    assert "scroll_1.tif" in line


def test_a_corrupt_chunk_is_told_by_file_and_place(tmp_path, capsys):
    zarr = pytest.importorskip("zarr")
    label = shells((24, 24, 48))
    for part, name, array in (("images", "a", image_of(label)), ("labels", "a_ink", label)):
        store = zarr.create_array(
            tmp_path / "data" / part / f"{name}.zarr", shape=array.shape, chunks=(24, 24, 24), dtype="uint8"
        )
        store[:] = array
    for chunk in (tmp_path / "data" / "images" / "a.zarr" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"not a chunk")
    line = refused(capsys, tmp_path / "data", tmp_path / "out")
    assert "a.zarr" in line


def test_a_folder_that_holds_another_run(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out") == 0
    capsys.readouterr()
    assert "--resume" in refused(capsys, folder, tmp_path / "out")
    foreign = tmp_path / "other" / "model"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("precious")
    line = refused(capsys, folder, tmp_path / "other")
    assert "thesis.txt" in line
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_an_output_that_cannot_be_made(folder, tmp_path, capsys):
    # Nobody, not even root, makes a folder there.
    line = refused(capsys, folder, Path("/proc/volumen"))
    assert "/proc/volumen" in line
    assert "cannot be written" in line


def test_an_output_where_another_run_trains(folder, tmp_path, capsys):
    running = RunDirectory(tmp_path / "out", "model")
    running.open()
    try:
        assert "is training here" in refused(capsys, folder, tmp_path / "out")
    finally:
        running.close()


def test_options_that_make_no_sense(folder, tmp_path, capsys):
    assert "--patch-size" in refused(capsys, folder, tmp_path / "out", "--patch-size", "8,x")
    assert "--device" in refused(capsys, folder, tmp_path / "out", "--device", "cuda:99")
    assert "section.key=value" in refused(capsys, folder, tmp_path / "out", "--set", "batch_size")


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from volumen.cli.main import build_parser; build_parser().format_help(); "
        "print([m for m in ('torch', 'numpy', 'monai', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "bundle", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", ["$__import__('pathlib').Path('hacked').touch()", "@config", "%x.yaml"])
def test_a_flag_is_data(folder, tmp_path, capsys, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    assert f"{value}: has no images/ folder" in refused(capsys, Path(value), tmp_path / "out")
    assert not (tmp_path / "hacked").exists()


def test_an_overlay_with_settings_is_refused(folder, tmp_path, capsys):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("tr_config#max_epoch: 7\n")
    line = refused(capsys, folder, tmp_path / "out", "--config-file", str(overlay))
    assert "--config-path" in line


@pytest.mark.parametrize(
    "key", ["train#preprocessing#transforms#2#classes", "train::preprocessing::transforms::2::classes"]
)
def test_an_overlay_inside_a_copy_is_refused(folder, tmp_path, capsys, key):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(f'"{key}": {{}}\n')
    line = refused(capsys, folder, tmp_path / "out", "--config-file", str(overlay))
    assert "train#preprocessing#transforms#2 is a copy of patch_transforms#classes" in line
    assert "change patch_transforms#classes#classes, for training and validation" in line


def test_no_process_is_told(folder, tmp_path, capsys):
    assert main(["train", "-i", str(folder), "-o", str(tmp_path / "out"), "--nproc", "0"]) == 2
    assert "--nproc: expected at least 1, found 0" in capsys.readouterr().err
