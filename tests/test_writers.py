"""Outputs: OME-Zarr, TIFF, NIfTI; interrupted, repeated, refused and damaged ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from prediction import make_predictor, save_checkpoint

from volumen.cli.predict import add_predict_arguments, request_from
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.jobs import Job
from volumen.inference.output.block_log import STATE_FOLDER
from volumen.inference.output.ome_zarr import ZarrOutput, level_factors
from volumen.inference.output.stored import OutputSpec
from volumen.inference.predict import predict, predict_volume
from volumen.inference.predictor import load_predictor, predict_array
from volumen.inference.record.provenance import plain
from volumen.inference.request import PredictRequest
from volumen.inference.windows.heads import Head
from volumen.utils.errors import VolumenError

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"


@pytest.fixture
def scroll(tmp_path):
    """Return (request, image) for a small zarr image and a checkpoint."""
    image = np.random.default_rng(0).integers(0, 256, (13, 24, 19), dtype=np.uint8)
    array = zarr.create_array(tmp_path / "scroll.zarr", shape=image.shape, chunks=(8, 8, 8), dtype="uint8")
    array[...] = image
    checkpoint = save_checkpoint(tmp_path / "model_3.pth")
    request = PredictRequest(
        str(tmp_path / "scroll.zarr"), str(checkpoint), str(tmp_path / "out.zarr"), amp="off", device="cpu"
    )
    return request, image


def content(folder: Path) -> dict[str, str]:
    """Return a hash per file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_results_are_stored_as_asked(scroll, tmp_path):
    request, image = scroll
    expected = predict_array(load_predictor(request.checkpoint), image[None])
    for dtype in ("uint8", "float16", "float32", "labels"):
        predict(replace(request, dtype=dtype, output=str(tmp_path / f"{dtype}.zarr")))
    read = {
        d: zarr.open_group(tmp_path / f"{d}.zarr", mode="r")
        for d in ("uint8", "float16", "float32", "labels")
    }
    ink = expected["ink"][0]
    assert np.abs(read["uint8"]["ink/0"][...] / 255 - ink).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_allclose(read["float16"]["ink/0"][...], ink, atol=1e-3)
    np.testing.assert_allclose(read["float32"]["ink/0"][...], ink, atol=1e-6)
    assert (read["labels"]["labels/ink/0"][...] != (ink >= 0.5)).mean() < 1e-4
    assert (read["labels"]["labels/tissue/0"][...] != expected["tissue"].argmax(0)).mean() < 1e-4
    assert read["uint8"]["normals/0"].dtype == np.float16
    assert read["float32"]["normals/0"].dtype == np.float32


def test_the_group_follows_ome_zarr_and_reads_back(scroll):
    request, _ = scroll
    predict(request)
    root = zarr.open_group(request.output, mode="r")
    assert root.attrs["ome"]["bioformats2raw.layout"] == 3
    assert root["OME"].attrs["ome"]["series"] == ["ink", "tissue", "normals"]
    for name in ("ink", "normals"):
        (image,) = root[name].attrs["ome"]["multiscales"]
        levels = [root[name][entry["path"]] for entry in image["datasets"]]
        assert len(levels) >= 3
        for level, entry in zip(levels, image["datasets"]):
            assert len(image["axes"]) == level.ndim == len(entry["coordinateTransformations"][0]["scale"])
            assert [axis["name"] for axis in image["axes"]] == list(level.metadata.dimension_names)
    volume = open_volume(Path(request.output) / "ink")
    assert volume.shape == (13, 24, 19)
    assert open_volume(Path(request.output) / "normals").channels == 3
    assert not (Path(request.output) / STATE_FOLDER).exists()


def test_the_group_is_valid_for_ome_zarr_models(scroll):
    models = pytest.importorskip("ome_zarr_models")
    request, _ = scroll
    predict(request)
    for name in ("ink", "tissue", "normals"):
        models.open_ome_zarr(zarr.open_group(Path(request.output) / name, mode="r"))


def test_pyramid_levels_are_means_and_vectors_stay_unit(scroll):
    request, _ = scroll
    predict(replace(request, dtype="float32"))
    root = zarr.open_group(request.output, mode="r")
    fine, coarse = root["ink/0"][...], root["ink/1"][...]
    assert coarse.shape == (7, 12, 10)
    np.testing.assert_allclose(
        coarse[:6, :, :9], fine[:12, :, :18].reshape(6, 2, 12, 2, 9, 2).mean((1, 3, 5)), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(root["normals/1"][...], axis=0), 1, atol=1e-5)


def test_thin_axes_are_halved_when_the_others_caught_up():
    assert level_factors((32, 256, 256), (4, 1, 1), (8, 64, 64)) == [(1, 2, 2)] * 2 + [(2, 2, 2)] * 2
    assert level_factors((8, 8), (1, 1), (8, 8)) == []


def test_a_finished_output_is_not_computed_again(scroll):
    request, _ = scroll
    predict(request)
    before = content(Path(request.output))
    report = predict(request)
    assert report.volumes[0].already_done
    assert content(Path(request.output)) == before


def test_other_settings_need_overwrite_which_spares_what_is_not_its_own(scroll):
    request, _ = scroll
    predict(request)
    other = replace(request, overlap=0.25)
    with pytest.raises(
        VolumenError, match=r"another prediction: windows\.count was .*windows\.overlap was 0\.5, is 0\.25"
    ):
        predict(other)
    note = Path(request.output) / "note.txt"
    note.write_text("mine")
    with pytest.raises(VolumenError, match=r"note\.txt, which no prediction made"):
        predict(replace(other, overwrite=True))
    note.unlink()
    predict(replace(other, overwrite=True))
    recipe = zarr.open_group(request.output, mode="r").attrs["volumen"]["recipe"]
    assert recipe["windows"]["overlap"] == 0.25


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_content_is_refused(scroll, overwrite):
    request, _ = scroll
    Path(request.output).mkdir()
    (Path(request.output) / "thesis.tex").write_text("all my work")
    with pytest.raises(VolumenError, match=r"found other content \(thesis\.tex\)"):
        predict(replace(request, overwrite=overwrite))
    assert os.listdir(request.output) == ["thesis.tex"]  # noqa: PTH208


class Stop(Exception):
    """Stands for whatever ends a run in the middle."""


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("after", [1, 40, 60])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    scroll, tmp_path, monkeypatch, after, batch_size
):
    request = replace(scroll[0], batch_size=batch_size)
    whole = replace(request, output=str(tmp_path / "whole.zarr"))
    predict(whole)
    count = 0
    write = ZarrOutput.write

    def failing(self, name, box, values, level=0):
        nonlocal count
        count += 1
        if count > after:
            raise Stop
        write(self, name, box, values, level)

    monkeypatch.setattr(ZarrOutput, "write", failing)
    with pytest.raises(Stop):
        predict(request)
    monkeypatch.undo()
    (Path(request.output) / STATE_FOLDER / "blocks").open("ab").write(b"5")  # a line cut short by a kill
    chunks = next(path for path in Path(request.output).iterdir() if path.name[0] != "." and path.is_dir())
    half = [Path(request.output) / STATE_FOLDER / ".recipe.json.a1.tmp", chunks / "0.a1.partial"]
    for path in half:
        path.write_bytes(b"half")
    first = predict(whole).volumes[0]
    assert first.already_done
    report = predict(request).volumes[0]
    assert not report.already_done
    assert not any(path.exists() for path in half)
    assert content(Path(request.output)) == content(Path(whole.output))


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_bytes(scroll, tmp_path):
    request, _ = scroll
    whole = replace(request, output=str(tmp_path / "whole.zarr"))
    predict(whole)
    script = f"""
        import sys, time
        from pathlib import Path
        import volumen.inference.blocks.finish as module
        from volumen.inference.predict import PredictRequest, predict
        finish = module.BlockWriter.__call__
        def slow(self, finished):
            finish(self, finished)
            time.sleep(0.05)
        module.BlockWriter.__call__ = slow
        predict({request!r})
    """
    environment = {**os.environ, "PYTHONPATH": str(BUNDLE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    journal = Path(request.output) / STATE_FOLDER / "blocks"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n")
    report = predict(request).volumes[0]
    assert done > 0
    assert 0 < report.blocks < 18
    assert content(Path(request.output)) == content(Path(whole.output))


def test_a_full_disk_is_survived(scroll, tmp_path, monkeypatch):
    request, _ = scroll
    write = ZarrOutput.write
    count = 0

    def full(self, name, box, values, level=0):
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, box, values, level)

    monkeypatch.setattr(ZarrOutput, "write", full)
    with pytest.raises(VolumenError, match="no space left on the disk; make room"):
        predict(request)
    monkeypatch.undo()
    predict(request)
    predict(replace(request, output=str(tmp_path / "whole.zarr")))
    assert content(Path(request.output)) == content(tmp_path / "whole.zarr")


def test_too_little_space_is_told_before_anything_is_written(scroll, monkeypatch):
    request, _ = scroll
    monkeypatch.setattr(
        "volumen.inference.checks.disk_space.shutil.disk_usage", lambda _: type("U", (), {"free": 1000})()
    )
    with pytest.raises(VolumenError, match="of free space, found"):
        predict(request)
    assert not Path(request.output).exists()


def test_like_makes_the_same_bytes(scroll, tmp_path):
    import argparse

    request, _ = scroll
    predict(
        replace(request, overlap=0.3, targets=("ink",), region=((2, 11), (None, 23), (1, None)), tta="mirror")
    )
    parser = argparse.ArgumentParser()
    add_predict_arguments(parser)
    arguments = parser.parse_args(["--like", request.output, "-o", str(tmp_path / "new.zarr")])
    predict(request_from(arguments))
    assert content(Path(request.output)) == content(tmp_path / "new.zarr")


def test_like_takes_a_copy_and_refuses_other_voxels(scroll, tmp_path, caplog):
    import logging
    import shutil

    request, image = scroll
    predict(replace(request, dtype="float32"))
    copy = tmp_path / "elsewhere" / "renamed.zarr"
    shutil.copytree(request.input, copy)  # with other times
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    again = replace(
        request, dtype="float32", input=str(copy), like=request.output, output=str(tmp_path / "new.zarr")
    )
    with caplog.at_level(logging.INFO):
        predict(again)
    assert "settings, versions and machine are those of" in caplog.text
    for target in ("ink", "tissue", "normals"):
        assert content(Path(request.output) / target) == content(tmp_path / "new.zarr" / target)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        predict(replace(again, tta="mirror", output=str(tmp_path / "mirror.zarr")))
    assert "other settings than of" in caplog.text
    assert 'tta was "none", is "mirror"' in caplog.text
    zarr.open_array(copy, mode="r+")[:8] = 255 - image[:8]
    with pytest.raises(VolumenError, match="holds other voxels than when"):
        predict(replace(again, output=str(tmp_path / "other.zarr")))
    assert not (tmp_path / "other.zarr").exists()


def test_like_refuses_an_image_of_another_shape_and_another_mask(scroll, tmp_path):
    request, image = scroll
    mask = zarr.create_array(tmp_path / "mask.zarr", shape=image.shape, chunks=(8, 8, 8), dtype="uint8")
    mask[2:] = 1
    predict(replace(request, mask=str(tmp_path / "mask.zarr")))
    recipe = zarr.open_group(request.output, mode="r").attrs["volumen"]["recipe"]
    assert recipe["mask"]["path"] == str(tmp_path / "mask.zarr")
    like = replace(
        request, mask=str(tmp_path / "mask.zarr"), like=request.output, output=str(tmp_path / "new.zarr")
    )
    zarr.save_array(tmp_path / "longer.zarr", np.concatenate([image, image[:1]]))
    with pytest.raises(
        VolumenError, match=r"expected shape \[13, 24, 19\] of uint8.*give that image with -i"
    ):
        predict(replace(like, input=str(tmp_path / "longer.zarr"), mask=None))
    mask[:2] = 1
    with pytest.raises(VolumenError, match=r"holds other voxels than when.*the file of then with --mask"):
        predict(like)


def test_a_recipe_is_as_json_gives_it_back():
    given = {"clip": (-np.inf, 1.5), 3: [np.nan, None, True, Path("a")]}
    assert plain(given) == {"clip": ["-inf", 1.5], "3": ["nan", None, True, "a"]}
    assert json.loads(json.dumps(plain(given), allow_nan=False)) == plain(given)


def test_like_warns_of_other_versions(scroll, tmp_path, caplog):
    request, _ = scroll
    predict(request)
    path = Path(request.output) / "zarr.json"
    record = json.loads(path.read_text())
    record["attributes"]["volumen"]["recipe"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    predict(replace(request, like=request.output, output=str(tmp_path / "new.zarr")))
    assert re.search(r'last bits may differ from .*: torch was "1\.0", is ', caplog.text)


def test_like_reads_the_record_beside_a_file(scroll, tmp_path):
    from volumen.inference.record.reproduce import provenance_of

    request, _ = scroll
    predict(replace(request, output=str(tmp_path / "ink.tif"), targets=("ink",)))
    assert provenance_of(tmp_path / "ink.tif") == provenance_of(tmp_path / "ink.volumen.json")
    with pytest.raises(VolumenError, match="records no finished prediction"):
        provenance_of(tmp_path / "model_3.pth")


def test_the_command_predicts(scroll):
    import argparse

    from volumen.cli.predict import run_predict

    request, _ = scroll
    parser = argparse.ArgumentParser()
    add_predict_arguments(parser)
    flags = ["-i", request.input, "-m", request.checkpoint, "-o", request.output, "--targets", "ink"]
    assert run_predict(parser.parse_args([*flags, "--region", "0:8,:,:9", "--amp", "off"])) == 0
    assert zarr.open_array(Path(request.output) / "ink" / "0", mode="r").shape == (8, 24, 9)


def test_like_refuses_another_checkpoint(scroll, tmp_path):
    request, _ = scroll
    predict(request)
    other = save_checkpoint(tmp_path / "other.pth", seed=1)
    again = replace(request, checkpoint=str(other), like=request.output, output=str(tmp_path / "new.zarr"))
    with pytest.raises(VolumenError, match="give that checkpoint with -m"):
        predict(again)


def damage(request) -> None:
    path = Path(request.input) / "c" / "1" / "0" / "1"
    assert path.exists()
    path.write_bytes(b"not a chunk")


def test_a_corrupt_chunk_stops_the_prediction(scroll):
    request, _ = scroll
    damage(request)
    with pytest.raises(VolumenError, match=r"scroll\.zarr.*--on-corrupt skip"):
        predict(request)


def test_what_stopped_at_damage_goes_on_when_told_to_skip_it(scroll, tmp_path):
    request, _ = scroll
    damage(request)
    with pytest.raises(VolumenError, match="--on-corrupt skip"):
        predict(replace(request, workers=1))
    predict(replace(request, on_corrupt="skip"))
    predict(replace(request, on_corrupt="skip", output=str(tmp_path / "whole.zarr")))
    assert content(Path(request.output)) == content(tmp_path / "whole.zarr")


def test_an_output_without_a_finished_block_may_be_begun_with_other_settings(scroll, monkeypatch):
    request, _ = scroll
    with monkeypatch.context() as patch:
        patch.setattr(ZarrOutput, "write", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            predict(request)
    predict(replace(request, overlap=0.25))
    recipe = zarr.open_group(request.output, mode="r").attrs["volumen"]["recipe"]
    assert recipe["windows"]["overlap"] == 0.25


def test_a_corrupt_chunk_is_skipped_and_listed_on_demand(scroll, tmp_path):
    request, _ = scroll
    predict(replace(request, output=str(tmp_path / "whole.zarr"), dtype="float32"))
    damage(request)
    report = predict(replace(request, on_corrupt="skip", dtype="float32")).volumes[0]
    box = ((8, 13), (0, 8), (8, 16))
    assert report.corrupt == (box,)
    root = zarr.open_group(request.output, mode="r")
    assert root.attrs["volumen"]["corrupt"] == [[8, 16], [0, 16], [16, 32]] or root.attrs["volumen"][
        "corrupt"
    ] == [[list(side) for side in box]]
    ink = root["ink/0"][...]
    assert not ink[8:13, 0:8, 8:16].any()
    whole = zarr.open_array(tmp_path / "whole.zarr" / "ink" / "0", mode="r")[...]
    np.testing.assert_array_equal(ink[:, 20:], whole[:, 20:])


@pytest.mark.parametrize("compress", ["zstd", "none"])
def test_tiff_files_hold_the_same_values(scroll, tmp_path, compress):
    import tifffile

    request, _ = scroll
    predict(request)
    out = tmp_path / "files"
    tiff = replace(request, output=str(out), format="tif", compress=compress)
    predict(tiff)
    assert sorted(p.name for p in out.iterdir()) == [
        "scroll.volumen.json", "scroll_ink.tif", "scroll_normals.tif", "scroll_tissue.tif",
    ]  # fmt: skip
    root = zarr.open_group(request.output, mode="r")
    for name in ("ink", "tissue", "normals"):
        values, expected = tifffile.imread(out / f"scroll_{name}.tif"), root[f"{name}/0"][...]
        assert values.dtype == (np.float32 if name == "normals" else np.uint8)
        # The group holds directions as float16, the file as float32.
        np.testing.assert_array_equal(values.astype(expected.dtype), expected)
    assert predict(tiff).volumes[0].already_done
    with pytest.raises(VolumenError, match="another prediction"):
        predict(replace(tiff, overlap=0.1))
    predict(replace(tiff, overlap=0.1, overwrite=True))


def test_nifti_keeps_the_affine_of_the_image_and_the_place_of_a_region(scroll, tmp_path):
    import nibabel

    request, image = scroll
    affine = np.array([[-2.0, 0, 0.1, 5], [0, 1.5, 0, -7], [0.2, 0, 3, 11], [0, 0, 0, 1]])
    nibabel.Nifti1Image(image.T, affine).to_filename(tmp_path / "head.nii.gz")
    region = ((3, 12), (0, 24), (4, 19))
    whole = replace(request, input=str(tmp_path / "head.nii.gz"), targets=("ink",), region=region)
    predict(replace(whole, output=str(tmp_path / "head_ink.nii.gz")))
    predict(replace(whole, output=str(tmp_path / "plain.zarr")))
    read = nibabel.load(tmp_path / "head_ink.nii.gz")
    values = zarr.open_array(tmp_path / "plain.zarr" / "ink" / "0", mode="r")[...]
    np.testing.assert_array_equal(np.asanyarray(read.dataobj), values.T)
    np.testing.assert_allclose(read.affine @ [0, 0, 0, 1], affine @ [4, 0, 3, 1], atol=1e-4)
    np.testing.assert_allclose(read.affine[:, :3], affine[:, :3], atol=1e-4)
    sidecar = json.loads((tmp_path / "head_ink.volumen.json").read_text())
    assert sidecar["files"] == ["head_ink.nii.gz"]


def test_a_file_that_no_prediction_made_is_not_replaced(scroll, tmp_path):
    request, _ = scroll
    (tmp_path / "mine.tif").write_bytes(b"a picture")
    with pytest.raises(VolumenError, match="no prediction made it"):
        predict(replace(request, output=str(tmp_path / "mine.tif"), targets=("ink",), overwrite=True))
    assert (tmp_path / "mine.tif").read_bytes() == b"a picture"


def test_a_folder_of_images_gives_a_prediction_each(scroll, tmp_path):
    import tifffile

    request, image = scroll
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "a_1.tif", image, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "images" / "b.tif", image[:9], metadata={"axes": "ZYX"})
    (tmp_path / "images" / "readme.txt").write_text("no image")
    report = predict(replace(request, input=str(tmp_path / "images"), output=str(tmp_path / "all")))
    assert [Path(v.output).name for v in report.volumes] == ["a_1.zarr", "b.zarr"]


def test_2d_images_with_colours(tmp_path):
    import tifffile

    image = np.random.default_rng(1).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "eye.tif", image, photometric="rgb")
    checkpoint = save_checkpoint(tmp_path / "m.pth", 2, (16, 16), in_channels=3)
    request = PredictRequest(
        str(tmp_path / "eye.tif"), str(checkpoint), str(tmp_path / "o"), amp="off", format="tif"
    )
    predict(request)
    expected = predict_array(load_predictor(checkpoint), np.moveaxis(image, -1, 0))
    ink = tifffile.imread(tmp_path / "o" / "eye_ink.tif")
    assert np.abs(ink / 255 - expected["ink"][0]).max() <= 0.5 / 255 + 1e-6
    assert tifffile.imread(tmp_path / "o" / "eye_normals.tif").shape == (2, 50, 61)


def test_chunks_of_nothing_are_not_stored(tmp_path):
    image = np.zeros((8, 8, 64), np.uint8)
    image[:, :, :8] = np.random.default_rng(2).integers(0, 256, (8, 8, 8))
    request = PredictRequest("", "", "", amp="off", pyramid=False)
    predict_volume(make_predictor(), Job(ArrayVolume(image), tmp_path / "o.zarr"), request)
    assert len(list((tmp_path / "o.zarr" / "ink" / "0" / "c").rglob("*/*/*"))) == 1


@pytest.mark.parametrize("kind", ["uint8", "float16", "float32", "labels"])
def test_a_coarser_constant_is_the_constant(kind):
    stored = OutputSpec(Head("ink", 2, "sigmoid", "multilabel"), kind)
    values = np.full((2, 5, 7), 1, stored.dtype)
    assert (stored.coarser(values, (2, 2)) == 1).all()
    assert stored.coarser(values, (1, 2)).shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_largest": 0, "dtype": "labels"}, r"postprocess: expected min_size"),
        ({"targets": ("blood",)}, r"a target among ink, tissue, normals, found 'blood'"),
        ({"overlap": 1.0}, r"--overlap: expected a share"),
        ({"batch_size": 0}, r"--batch-size: expected at least 1"),
        ({"patch_size": (9, 8, 8)}, r"--patch-size: expected sides divisible by \(2, 2, 2\)"),
        ({"region": ((0, 99), (0, 1), (0, 1))}, r"--region: expected start:stop"),
        ({"dtype": "int7"}, r"dtype must be one of"),
        ({"threshold": 1.5}, r"threshold must be above 0 and at most 1"),
        ({"device": "abacus"}, r"--device: expected auto, cpu"),
        ({"amp": "half"}, r"--amp: expected one of auto"),
        ({"checkpoint": "nowhere.pth"}, r"nowhere\.pth: no such checkpoint"),
    ],
)
def test_impossible_requests_are_one_line_and_leave_nothing(scroll, change, message):
    request, _ = scroll
    with pytest.raises(VolumenError, match=message) as caught:
        predict(replace(request, **change))
    assert "\n" not in str(caught.value)
    assert not Path(request.output).exists()


def test_a_checkpoint_cut_short_is_told(scroll):
    request, _ = scroll
    path = Path(request.checkpoint)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VolumenError, match="damaged or of another kind"):
        predict(request)


def test_labels_are_cleaned_after_prediction_and_after_an_interruption(scroll, tmp_path, monkeypatch):
    from scipy import ndimage

    request = replace(scroll[0], targets=("ink", "normals"), threshold=0.5, pyramid=False)
    predict(replace(request, output=str(tmp_path / "raw.zarr")))
    cleaned = replace(request, min_size=20, fill_holes=5)
    predict(replace(cleaned, output=str(tmp_path / "whole.zarr")))
    raw = zarr.open_array(tmp_path / "raw.zarr" / "labels" / "ink" / "0", mode="r")[...]
    holes, count = ndimage.label(raw == 0)
    border = np.zeros_like(raw, bool)
    border[1:-1, 1:-1, 1:-1] = True
    for hole in range(1, count + 1):
        where = holes == hole
        if where.sum() <= 5 and border[where].all():
            raw[where] = 1
    labels, count = ndimage.label(raw)
    small = np.flatnonzero(np.bincount(labels.reshape(-1)) < 20)
    expected = raw * ~np.isin(labels, small)
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / "whole.zarr" / "labels" / "ink" / "0", mode="r")[...], expected
    )

    def stop(*_):
        raise Stop

    monkeypatch.setattr("volumen.inference.postprocess.cleaning.ChoosePass.make", stop)
    with pytest.raises(Stop):
        predict(cleaned)
    monkeypatch.undo()
    assert predict(cleaned).volumes[0].windows == 0
    assert content(Path(cleaned.output)) == content(tmp_path / "whole.zarr")


def test_cleaning_needs_labels(scroll):
    with pytest.raises(VolumenError, match="add --threshold or --dtype labels"):
        predict(replace(scroll[0], min_size=5))
    with pytest.raises(VolumenError, match="tissue has several classes"):
        predict(replace(scroll[0], fill_holes=5, dtype="labels"))
