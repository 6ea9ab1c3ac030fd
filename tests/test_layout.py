"""Folders of images, labels and masks: what is paired with what, and what is refused in which words."""

from __future__ import annotations

import logging
import os
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.layout import discover, open_cases
from volumen.utils.errors import VolumenError

SHAPE = (6, 7, 8)


def touch(root: Path, *names: str, dtype="u1", shape=SHAPE) -> Path:
    """Write volumes of ones below a folder, each in the format that its name says."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        array = np.ones(shape, dtype)
        if name.endswith(".zarr"):
            zarr.create_array(file, data=array)
        elif ".nii" in name:
            nibabel.Nifti1Image(array.T, np.diag([1, 2, 3, 1])).to_filename(file)
        elif name.endswith((".tif", ".tiff")):
            axes = "ZYX"[-len(shape) :]
            tifffile.imwrite(file, array, photometric="minisblack", metadata={"axes": axes})
        else:
            file.write_text("not a volume")
    return root


def pairs(layout) -> dict[str, dict[str, str]]:
    return {case.name: {t: Path(path).name for t, path in case.labels.items()} for case in layout.cases}


@pytest.mark.parametrize("ending", [".zarr", ".ome.zarr", ".tif", ".ome.tiff", ".TIF", ".nii", ".nii.gz"])
def test_layout_of_each_format(tmp_path, ending):
    names = [f"{name}{ending}" for name in ("images/a", "labels/a_ink", "labels/a_damage", "masks/a_ink")]
    if ending == ".TIF":
        touch(tmp_path, *(name.lower() for name in names))
        for name in names:
            (tmp_path / name.lower()).rename(tmp_path / name)
    else:
        touch(tmp_path, *names)
    layout = discover(tmp_path)
    assert (
        layout.format
        == {"z": "zarr", "r": "zarr", "f": "tif", "F": "tif", "i": "nifti"}[
            {"ii": "i", "gz": "i", "rr": "r"}.get(ending[-2:], ending[-1])
        ]
    )
    assert layout.targets == ("damage", "ink")
    assert list(layout.cases[0].masks) == ["ink"]
    (case,) = open_cases(layout)
    assert case.image.shape == case.labels["ink"].shape == SHAPE
    assert case.spacing == ((3.0, 2.0, 1.0) if ".nii" in ending else (1.0, 1.0, 1.0))


def test_longest_image_name_wins(tmp_path):
    images = ["scan", "scan_1", "scan_1_b", "scan_10"]
    labels = ["scan_ink", "scan_1_ink", "scan_1_b_ink", "scan_10_ink", "scan_papyrus_fibre", "scan_1_b_x_y"]
    touch(tmp_path, *(f"images/{n}.tif" for n in images), *(f"labels/{n}.tif" for n in labels))
    layout = discover(tmp_path, allow_unlabeled=True)
    assert pairs(layout) == {
        "scan": {"ink": "scan_ink.tif", "papyrus_fibre": "scan_papyrus_fibre.tif"},
        "scan_1": {"ink": "scan_1_ink.tif"},
        "scan_10": {"ink": "scan_10_ink.tif"},
        "scan_1_b": {"ink": "scan_1_b_ink.tif", "x_y": "scan_1_b_x_y.tif"},
    }
    assert layout.targets == ("ink", "papyrus_fibre", "x_y")


def test_given_targets_settle_what_the_longest_name_would_not(tmp_path):
    touch(tmp_path, "images/a.tif", "images/a_b.tif", "labels/a_b_ink.tif", "labels/a_b_b_ink.tif")
    assert pairs(discover(tmp_path, targets=["b_ink"])) == {
        "a": {"b_ink": "a_b_ink.tif"},
        "a_b": {"b_ink": "a_b_b_ink.tif"},
    }


def test_masks_by_target_and_for_all(tmp_path):
    touch(
        tmp_path,
        *(f"images/{n}.tif" for n in "abcd"),
        *(f"labels/{n}_{t}.tif" for n in "abcd" for t in ("ink", "hole")),
        "masks/a_ink.tif",
        "masks/a_mask.tif",
        "masks/b.tif",
        "masks/c_hole_mask.tif",
    )
    masks = {c.name: {t: Path(p).name for t, p in c.masks.items()} for c in discover(tmp_path).cases}
    assert masks == {
        "a": {"hole": "a_mask.tif", "ink": "a_ink.tif"},
        "b": {"hole": "b.tif", "ink": "b.tif"},
        "c": {"hole": "c_hole_mask.tif"},
        "d": {},
    }


def test_a_target_may_be_called_mask(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_mask.tif", "masks/a_mask.tif")
    layout = discover(tmp_path)
    assert layout.targets == ("mask",)
    assert list(layout.cases[0].masks) == ["mask"]


def test_chosen_targets_leave_out_the_others(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif", "labels/a_hole.tif", "masks/a_hole.tif")
    layout = discover(tmp_path, targets=["ink"])
    assert (layout.targets, pairs(layout), layout.cases[0].masks) == (
        ("ink",),
        {"a": {"ink": "a_ink.tif"}},
        {},
    )


def test_unicode_names_are_compared_after_normalisation(tmp_path):
    name = "übung"
    image, label = unicodedata.normalize("NFD", name), unicodedata.normalize("NFC", name)
    touch(tmp_path, f"images/{image}.tif", f"labels/{label}_ink.tif")
    (case,) = discover(tmp_path).cases
    assert case.name == label
    assert "ink" in case.labels


def test_case_matters_and_is_told(tmp_path):
    touch(tmp_path, "images/Scan.tif", "labels/scan_ink.tif")
    with pytest.raises(
        VolumenError, match=r"scan_ink\.tif: differs from image 'Scan' in upper and lower case"
    ):
        discover(tmp_path)


def test_links_are_followed(tmp_path):
    touch(tmp_path, "far/image.tif", "far/label.zarr", "data/images/readme.txt")
    (tmp_path / "data/labels").mkdir()
    (tmp_path / "data/images/a.tif").symlink_to(tmp_path / "far/image.tif")
    (tmp_path / "data/labels/a_ink.zarr").symlink_to("../../far/label.zarr", target_is_directory=True)
    (case,) = open_cases(discover(tmp_path / "data"))
    assert case.labels["ink"].shape == SHAPE
    (tmp_path / "data/images/b.tif").symlink_to(tmp_path / "nowhere.tif")
    with pytest.raises(VolumenError, match=r"b\.tif: is a link that leads nowhere"):
        discover(tmp_path / "data")


def test_zarr_folder_without_ending_and_files_of_other_kinds(tmp_path):
    touch(tmp_path, "images/.DS_Store", "images/notes.txt", "images/x.zarr", "labels/x_ink.zarr")
    (tmp_path / "images/x.zarr").rename(tmp_path / "images/x")
    assert pairs(discover(tmp_path)) == {"x": {"ink": "x_ink.zarr"}}


def test_labels_in_the_image_s_own_group(tmp_path):
    image = zarr.open_group(tmp_path / "images/a.zarr", mode="w")
    axes = [{"name": n, "type": "space"} for n in "zyx"]
    scale = {"type": "scale", "scale": [4, 2, 2]}
    multiscale = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
    labels = image.create_group("labels", attributes={"ome": {"labels": ["ink", "hole"]}})
    for group in (image, labels.create_group("ink"), labels.create_group("hole")):
        group.create_array("0", data=np.ones(SHAPE, "u1"))
        group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
    touch(tmp_path, "labels/a_hole.zarr")
    layout = discover(tmp_path)
    assert layout.targets == ("hole", "ink")
    assert layout.cases[0].labels["ink"].endswith("images/a.zarr/labels/ink")
    assert layout.cases[0].labels["hole"].endswith("labels/a_hole.zarr")
    (case,) = open_cases(layout)
    assert case.spacing == (4.0, 2.0, 2.0)


def test_url_root():
    for name in ("images/a.zarr", "labels/a_ink.zarr", "masks/a.zarr"):
        zarr.create_array(f"memory://layout/{name}", data=np.ones(SHAPE, "u1"), overwrite=True)
    layout = discover("memory://layout")
    assert layout.cases[0].labels == {"ink": "memory://layout/labels/a_ink.zarr"}
    (case,) = open_cases(layout)
    assert case.masks["ink"].read((slice(0, 2),) * 3).all()
    with pytest.raises(VolumenError, match=r"memory://nothing: has no images/ folder"):
        discover("memory://nothing")


def test_layers_saved_by_napari(tmp_path):
    touch(tmp_path, "a.tif", "a_ink.tif", "a_mask.tif", "b.tif", "b_ink.tif", "points.csv")
    layout = discover(tmp_path, format="napari")
    assert pairs(layout) == {"a": {"ink": "a_ink.tif"}, "b": {"ink": "b_ink.tif"}}
    assert [sorted(case.masks) for case in layout.cases] == [["ink"], []]
    assert layout.format == "napari"
    touch(tmp_path / "folders", "images/a.tif", "labels/a_ink.tif")
    assert pairs(discover(tmp_path / "folders", format="napari")) == {"a": {"ink": "a_ink.tif"}}


def test_format_settles_twins(tmp_path):
    names = ("images/a", "labels/a_ink")
    touch(tmp_path, *(name + ending for name in names for ending in (".tif", ".zarr")), "masks/a.nii")
    with pytest.raises(
        VolumenError, match=r"images: expected one format, found tif and zarr; pass --format tif"
    ):
        discover(tmp_path)
    layout = discover(tmp_path, format="zarr")
    assert pairs(layout) == {"a": {"ink": "a_ink.zarr"}}
    assert layout.cases[0].masks["ink"].endswith("a.nii")


def refusal(root, **options) -> str:
    with pytest.raises(VolumenError) as caught:
        open_cases(discover(root, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


def test_folders_that_are_wrong(tmp_path):
    assert refusal(tmp_path / "x") == "ROOT: has no images/ folder; there is no such folder: check the path"
    (tmp_path / "empty").mkdir()
    assert "put the images into images/" in refusal(tmp_path / "empty")
    touch(tmp_path / "outer", "data/images/a.tif")
    assert refusal(tmp_path / "outer").endswith("did you mean ROOT/data?")
    inside = tmp_path / "outer/data/images"
    assert refusal(inside).endswith(f"give the folder above it, {inside.parent}")
    touch(tmp_path / "typo", "Image/a.tif")
    assert refusal(tmp_path / "typo").endswith("rename Image to images")
    (tmp_path / "void/images").mkdir(parents=True)
    assert "ROOT/images: expected images (.ome.zarr, .zarr, " in refusal(tmp_path / "void")
    assert "found an empty folder" in refusal(tmp_path / "void")
    touch(tmp_path / "jpgs", "images/a.jpg", "images/b.jpg")
    assert "found only a.jpg, b.jpg; add images, or convert them" in refusal(tmp_path / "jpgs")
    assert refusal(tmp_path / "outer/data", format="zarr").endswith("found only a.tif; pass --format tif")
    assert refusal(tmp_path, format="jpg").startswith(
        "--format: expected one of zarr, tif, nifti, png, hdf5, mrc, nrrd, precomputed, n5, "
    )


def test_labels_that_are_missing(tmp_path):
    touch(tmp_path, "images/a.tif", "images/b.tif")
    assert refusal(tmp_path) == "ROOT/labels: expected labels named <image>_<target>, found none; add them"
    touch(tmp_path, "labels/a_ink.tif")
    assert refusal(tmp_path) == (
        "ROOT/images/b.tif: expected a label b_ink, found labels of no target; "
        "add it, or set dataset_config.allow_unlabeled_data: true"
    )
    assert len(discover(tmp_path, allow_unlabeled=True).cases) == 2
    assert "expected a label of target 'hole', found labels of ink" in refusal(tmp_path, targets=["hole"])
    touch(tmp_path, "labels/b.tif")
    assert "b.tif: names no target" in refusal(tmp_path)


def test_doubled_names(tmp_path):
    touch(tmp_path, "images/a.tif", "images/a.ome.tif", "labels/a_ink.tif")
    assert "has the name 'a', as ROOT/images/a.ome.tif has" in refusal(tmp_path)
    (tmp_path / "images/a.ome.tif").unlink()
    touch(tmp_path, "labels/a_ink.tiff")
    assert "stands for the same as ROOT/labels/a_ink.tif" in refusal(tmp_path)


def test_mask_of_an_unknown_target(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif", "masks/a_imk.tif")
    assert "masks/a_imk.tif: expected a mask of target ink, or one for all" in refusal(tmp_path)


def test_label_of_no_image_is_told(tmp_path, caplog):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif", "labels/z_ink.tif")
    with caplog.at_level(logging.WARNING):
        assert pairs(discover(tmp_path)) == {"a": {"ink": "a_ink.tif"}}
    assert "z_ink.tif belongs to no image" in caplog.text


def test_shapes_that_differ(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif")
    touch(tmp_path, "labels/a_ink.tif", shape=(6, 7, 9))
    assert refusal(tmp_path) == (
        "ROOT/labels/a_ink.tif: expected shape (6, 7, 8) of ROOT/images/a.tif, found (6, 7, 9); "
        "resample it to the image's grid"
    )
    touch(tmp_path, "labels/a_ink.tif")
    touch(tmp_path, "masks/a_ink.tif", shape=(5, 7, 8))
    assert "masks/a_ink.tif: expected shape (6, 7, 8)" in refusal(tmp_path)


def test_images_of_different_kinds(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif")
    touch(tmp_path, "images/b.tif", "labels/b_ink.tif", shape=(20, 30))
    assert "expected 3D with 1 channel, as in ROOT/images/a.tif, found 2D with 1 channel" in refusal(tmp_path)


def test_float_labels_are_taken_if_whole(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a_organ.nii.gz", dtype="f4")
    (case,) = open_cases(discover(tmp_path))
    label = case.labels["organ"]
    assert label.dtype == np.int32
    assert label.read((slice(0, 2),) * 3).dtype == np.int32
    array = np.ones(SHAPE, "f4")
    array[3, 4, 5] = 0.25
    nibabel.Nifti1Image(array.T, np.eye(4)).to_filename(tmp_path / "labels/a_organ.nii.gz")
    label = open_cases(discover(tmp_path))[0].labels["organ"]
    assert label.read((slice(0, 3),) * 3).all()
    with pytest.raises(VolumenError, match=r"a_organ\.nii\.gz: .*found 0\.25 at voxel \(3, 4, 5\); round it"):
        label.read((slice(2, 6),) * 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12])
def test_label_values_outside_integers(tmp_path, value):
    touch(tmp_path, "images/a.tif")
    (tmp_path / "labels").mkdir()
    tifffile.imwrite(tmp_path / "labels/a_ink.tif", np.full(SHAPE, value, "f8"), photometric="minisblack")
    (case,) = open_cases(discover(tmp_path))
    with pytest.raises(VolumenError, match=r"a_ink\.tif: expected a label with whole numbers"):
        case.labels["ink"].read((slice(0, 1),) * 3)


def test_boolean_labels(tmp_path):
    touch(tmp_path, "images/a.zarr")
    zarr.create_array(tmp_path / "labels/a_ink.zarr", data=np.ones(SHAPE, bool))
    label = open_cases(discover(tmp_path))[0].labels["ink"]
    assert label.dtype == label.read((slice(0, 1),) * 3).dtype == np.uint8


def test_label_settles_an_ambiguous_image(tmp_path):
    touch(tmp_path, "images/a.zarr", shape=(3, 40, 50))
    touch(tmp_path, "labels/a_ink.zarr", shape=(40, 50))
    (case,) = open_cases(discover(tmp_path))
    assert (case.image.channels, case.image.shape) == (3, (40, 50))
    touch(tmp_path / "thin", "images/a.zarr", "labels/a_ink.zarr", shape=(3, 40, 50))
    assert "can be read in two ways: is the small axis a channel?" in refusal(tmp_path / "thin")
    (case,) = open_cases(discover(tmp_path / "thin"), axes="zyx")
    assert case.image.shape == (3, 40, 50)


def test_label_drawn_at_a_coarser_level(tmp_path):
    group = zarr.open_group(tmp_path / "images/a.zarr", mode="w")
    axes = [{"name": n, "type": "space"} for n in "zyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]
    group.create_array("0", data=np.ones((12, 14, 16), "u1"))
    group.create_array("1", data=np.ones(SHAPE, "u1"))
    touch(tmp_path, "labels/a_ink.tif")
    layout = discover(tmp_path)
    assert open_cases(layout, level=1)[0].image.shape == SHAPE
    with pytest.raises(VolumenError, match=r"a_ink\.tif: expected shape \(12, 14, 16\)"):
        open_cases(layout)
    touch(tmp_path / "plain", "images/a.zarr", "labels/a_ink.zarr")
    with pytest.raises(
        VolumenError, match=r"a\.zarr: has a single resolution, not a level 1; set dataset_config"
    ):
        open_cases(discover(tmp_path / "plain"), level=1)


def test_file_url(tmp_path):
    touch(tmp_path / "a b", "images/a.tif", "labels/a_ink.tif")
    assert len(open_cases(discover((tmp_path / "a b").as_uri()))) == 1


def test_one_setting_of_axes_serves_images_and_labels(tmp_path):
    touch(tmp_path, "images/a.zarr", shape=(2, 6, 7, 8))
    touch(tmp_path, "labels/a_ink.zarr", shape=(6, 7, 8))
    (case,) = open_cases(discover(tmp_path), axes="czyx")
    assert (case.image.channels, case.labels["ink"].channels) == (2, 1)


def test_spacing_given(tmp_path):
    touch(tmp_path, "images/a.nii", "labels/a_ink.nii")
    layout = discover(tmp_path)
    assert open_cases(layout, spacing=[45, 4.6, 4.6])[0].spacing == (45.0, 4.6, 4.6)
    for wrong in ([1, 2], [1, 2, 0]):
        with pytest.raises(VolumenError, match=r"dataset_config\.spacing: expected 3 positive values"):
            open_cases(layout, spacing=wrong)


def test_warnings_of_geometry_and_missing_chunks(tmp_path, caplog):
    touch(tmp_path, "images/a.nii")
    (tmp_path / "labels").mkdir()
    nibabel.Nifti1Image(np.ones(SHAPE[::-1], "u1"), np.diag([-1, 2, 3, 1])).to_filename(
        tmp_path / "labels/a_x.nii"
    )
    open_cases(discover(tmp_path))
    assert "lies elsewhere in space" in caplog.text
    root = touch(tmp_path / "sparse", "labels/a_ink.zarr")
    image = zarr.create_array(root / "images/a.zarr", shape=SHAPE, chunks=(3, 7, 8), dtype="u1")
    image[:3] = 1
    open_cases(discover(root))
    assert "1 of 2 chunks are not stored" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_permissions(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif")
    (tmp_path / "labels/a_ink.tif").chmod(0)
    assert "a_ink.tif: may not be read; give yourself read permission" in refusal(tmp_path)
    (tmp_path / "images").chmod(0)
    assert "images: may not be read" in refusal(tmp_path)
    (tmp_path / "images").chmod(0o755)


def test_permissions_as_the_system_tells_them(tmp_path, monkeypatch):
    """The same refusals where tests run as root: the system's errors are put in by hand."""
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif")
    real = Path.open

    def forbidden(self, *args, **kwargs):
        if self.name == "a_ink.tif":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidden)
    assert (
        refusal(tmp_path)
        == "ROOT/labels/a_ink.tif: may not be read; give yourself read permission (chmod u+r)"
    )


def test_files_that_are_not_what_they_seem(tmp_path):
    touch(tmp_path, "images/a.tif", "labels/a_ink.tif")
    (tmp_path / "labels/a_ink.tif").write_bytes(b"")
    assert "a_ink.tif: is empty (0 bytes)" in refusal(tmp_path)
    (tmp_path / "labels/a_ink.tif").write_bytes(b"hello, I am no image")
    assert (
        "a_ink.tif: expected zarr, TIFF, NIfTI, PNG, HDF5, MRC, NRRD, MetaImage or DICOM, "
        "found a file that starts with b'hello, I'" in refusal(tmp_path)
    )
    (tmp_path / "labels/a_ink.tif").unlink()
    (tmp_path / "labels/a_ink.zarr").mkdir()
    assert "a_ink.zarr: no zarr array or group there" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "format", "targets", "cases", "masks"),
    [
        ("fib25", "tif", ("membrane",), 1, 0),
        ("vnc", "tif", ("membrane", "mito", "synapse"), 1, 0),
        ("drive", "tif", ("vessel",), 20, 20),
        ("hippocampus", "nifti", ("hippocampus",), 100, 0),
    ],
)
def test_real_data(real_data, name, format, targets, cases, masks):
    layout = discover(real_data(name))
    assert (layout.format, layout.targets, len(layout.cases)) == (format, targets, cases)
    opened = open_cases(layout)
    assert sum(len(case.masks) for case in opened) == masks
    first = opened[0]
    region = tuple(slice(0, 5) for _ in first.image.shape)
    for volume in (first.image, *first.labels.values(), *first.masks.values()):
        assert volume.read(region).shape == (volume.channels, *(5,) * len(region))


def test_labels_group_without_a_list(tmp_path):
    image = zarr.open_group(tmp_path / "images/a.zarr", mode="w")
    image.create_array("0", data=np.ones(SHAPE, "u1"))
    image.create_group("labels").create_group("ink").create_array("0", data=np.ones(SHAPE, "u1"))
    assert discover(tmp_path).targets == ("ink",)


def test_warnings_of_what_reads_slowly(tmp_path, caplog):
    touch(tmp_path, "images/a.nii.gz", "labels/a_ink.zarr")
    bound = BLOCKS.max_bytes
    try:
        BLOCKS.resize(300)
        open_cases(discover(tmp_path))
    finally:
        BLOCKS.resize(bound)
    assert "1 compressed NIfTI volumes hold 0 MB" in caplog.text
    assert "every patch decodes chunks of 0 MB; rechunk it" in caplog.text


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    from volumen.data.formats import open_handles

    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("open files are counted where Linux lists them")
    monkeypatch.setattr(open_handles.HANDLES, "limit", 10)
    touch(tmp_path, *(f"images/a{i}.tif" for i in range(20)), *(f"labels/a{i}_ink.tif" for i in range(20)))
    touch(
        tmp_path / "n", *(f"images/a{i}.nii" for i in range(20)), *(f"labels/a{i}_ink.nii" for i in range(20))
    )
    cases = open_cases(discover(tmp_path)) + open_cases(discover(tmp_path / "n"))
    before = len(list(descriptors.iterdir()))
    for _ in range(2):
        for case in cases:
            for volume in (case.image, case.labels["ink"]):
                assert volume.read((slice(0, 2),) * 3).all()
    assert len(list(descriptors.iterdir())) <= before + 2 * 10
