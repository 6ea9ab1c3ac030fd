"""Bad input through the command: refused in one line before anything is written, or trained with a warning."""

from __future__ import annotations

import hashlib
import os
import struct
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import zarr
from data_folders import image_of, shells, write_tiff_folder

from volumen.cli.main import main

SHAPE = (24, 24, 48)
CHUNKS = (12, 12, 24)
SMALL = [
    "--set", "model_config.features_per_stage=[4, 8]", "--patch-size", "8,8,8",
    "--max-epochs", "1", "--steps-per-epoch", "1", "--val-steps", "1",
    "--workers", "0", "--batch-size", "1", "--device", "cpu", "--amp", "off",
]  # fmt: skip


class Case(NamedTuple):
    """What makes a folder bad, and what the command must say of it.

    Attributes:
        make: called with the folder to make; may return another path to train on.
        words: that the line must hold.
        options: of the command.
    """

    make: Callable[[Path], Path | None]
    words: Sequence[str]
    options: Sequence[str] = ()


def tiff(
    root: Path, image: np.ndarray | None = None, name: str = "a", label: np.ndarray | None = None
) -> Path:
    label = shells(SHAPE) if label is None else label
    return write_tiff_folder(root, {name: {"ink": label}}, images=None if image is None else {name: image})


def zarrs(root: Path, **options) -> Path:
    label = shells(SHAPE)
    for part, name, array in (("images", "a", image_of(label)), ("labels", "a_ink", label)):
        zarr.create_array(
            root / part / f"{name}.zarr", data=array, **{"chunks": CHUNKS, "config": None, **options}
        )
    return root


def chunk_files(volume: Path) -> list[Path]:
    described = ("zarr.json", ".zarray", ".zattrs", ".zgroup")
    return sorted(file for file in volume.rglob("*") if file.is_file() and file.name not in described)


def truncate(part: str, number: int | None = None, **options) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        zarrs(root, **options)
        (volume,) = (root / part).iterdir()
        files = chunk_files(volume)
        for file in files if number is None else [files[number]]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return make


def with_values(values: Sequence[float], where: object) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        image = image_of(shells(SHAPE)).astype(np.float32)
        image[where] = np.resize(values, image[where].shape)
        tiff(root, image)

    return make


def too_many_classes(root: Path) -> None:
    label = shells(SHAPE)
    label[:, :, 24:] *= 7
    tiff(root, label=label)


def lone_class(root: Path) -> None:
    label = shells(SHAPE)
    label[5, 5, 5] = 9
    tiff(root, label=label)


def differing_in_case(root: Path) -> None:
    tiff(root, name="scroll")
    (root / "labels/scroll_ink.tif").rename(root / "labels/Scroll_ink.tif")


def same_to_the_eye(root: Path) -> None:
    for form in ("NFC", "NFD"):
        tiff(root, name=unicodedata.normalize(form, "größe"))


def label_without_target(root: Path) -> None:
    tiff(root, name="a")
    tiff(root, name="a_ink")  # labels/a_ink is now that of image a and of image a_ink without a target
    (root / "labels/a_ink_ink.tif").unlink()


def dangling(part: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        tiff(root)
        (file,) = (root / part).iterdir()
        file.rename(root / "elsewhere.tif")
        file.symlink_to(root / "gone.tif")

    return make


def round_in_circles(root: Path) -> None:
    tiff(root)
    (root / "images/a.tif").unlink()
    (root / "images/a.tif").symlink_to(root / "images/b.tif")
    (root / "images/b.tif").symlink_to(root / "images/a.tif")


def file_in_place_of(part: str) -> Callable[[Path], None]:
    """A file where a folder should be."""

    def make(root: Path) -> None:
        tiff(root)
        if (root / part).exists():
            (root / part).rename(root / "moved")
        (root / part).write_text("a list of the files")

    return make


def unmounted_masks(root: Path) -> None:
    tiff(root)
    if (root / "masks").exists():
        (root / "masks").rmdir()
    (root / "masks").symlink_to(root / "gone")


def whole_folder_is_a_file(root: Path) -> None:
    root.write_bytes(b"II*\0")


def gap_in_second_label(root: Path) -> None:
    label = shells(SHAPE)
    odd = label.copy()
    odd[5, 5, 5] = 7
    write_tiff_folder(root, {"a": {"ink": label}, "b": {"ink": odd}, "c": {"ink": label}})


def empty_images(root: Path) -> None:
    tiff(root)
    (root / "images/a.tif").unlink()


def no_labels(root: Path) -> None:
    tiff(root)
    (root / "labels/a_ink.tif").unlink()


def one_voxel(root: Path) -> None:
    tiff(root, np.full((1, 1, 1), 7, np.uint8), label=np.ones((1, 1, 1), np.uint8))


def one_voxel_zarr(root: Path) -> None:
    for part, name in (("images", "a"), ("labels", "a_ink")):
        zarr.create_array(root / part / f"{name}.zarr", data=np.ones((1, 1, 1), np.uint8))


def group_without_array(part: str, version: int) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        zarrs(root)
        (volume,) = (root / part).iterdir()
        for file in chunk_files(volume):
            file.unlink()
        for file in volume.iterdir():
            file.unlink() if file.is_file() else None
        zarr.open_group(volume, mode="w", zarr_format=version)

    return make


def lying_tiff(tag: int, value: int, **options) -> Callable[[Path], None]:
    """A TIFF whose first page says another number in one of its tags, as a broken transfer or writer leaves it."""

    def make(root: Path) -> None:
        tiff(root)
        path = root / "images/a.tif"
        tifffile.imwrite(path, image_of(shells(SHAPE)), photometric="minisblack", **options)
        with tifffile.TiffFile(path) as file:
            offsets = [page.tags[tag].valueoffset for page in file.pages]
            sizes = [page.tags[tag].dtype for page in file.pages]
        content = bytearray(path.read_bytes())
        for offset, size in zip(offsets, sizes):
            form = "<H" if int(size) == 3 else "<I"
            struct.pack_into(form, content, offset, min(value, 2 ** (8 * struct.calcsize(form)) - 1))
        path.write_bytes(bytes(content))

    return make


def cut_tiff(share: float, **options) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        tiff(root)
        path = root / "images/a.tif"
        tifffile.imwrite(path, image_of(shells(SHAPE)), photometric="minisblack", **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


REFUSED = {
    "an image's chunks cut off": Case(truncate("images"), ["a.zarr/c/", "chunk ["]),
    "one chunk of an image cut off": Case(truncate("images", 3), ["a.zarr/c/", "chunk ["]),
    "one chunk of a label cut off": Case(truncate("labels", 5), ["a_ink.zarr/c/", "chunk ["]),
    "a zarr 2 chunk cut off": Case(truncate("labels", 5, zarr_format=2), ["a_ink.zarr/", "chunk ["]),
    "a shard cut off": Case(truncate("labels", 0, shards=(24, 24, 48)), ["a_ink.zarr/c/", "chunk ["]),
    "NaN refused": Case(
        with_values([np.nan, np.inf], np.s_[4, 4, :5]),
        ["a.tif", "5 NaN or infinite", "first at (4, 4, 0)"],
        ["--set", "dataset_config.nonfinite=refuse"],
    ),
    "nothing but NaN": Case(with_values([np.nan], np.s_[:]), ["a.tif"]),
    "more classes than configured": Case(
        too_many_classes, ["a_ink.tif", "7"], ["--set", "dataset_config.targets={ink: {out_channels: 3}}"]
    ),
    "a class that no other voxel has": Case(
        lone_class, ["a_ink.tif", "9"], ["--set", "dataset_config.targets={ink: {out_channels: 2}}"]
    ),
    "a name in other letters": Case(differing_in_case, ["Scroll_ink.tif", "upper and lower case"]),
    "two names that look the same": Case(same_to_the_eye, ["größe"]),
    "an image without a label, whose name is a label": Case(label_without_target, ["a_ink"]),
    "an image that is a link to nothing": Case(dangling("images"), ["a.tif"]),
    "a label that is a link to nothing": Case(dangling("labels"), ["a_ink.tif"]),
    "links in circles": Case(round_in_circles, ["a.tif"]),
    "a class number with a gap": Case(gap_in_second_label, ["targets.ink", "found 0, 1, 7", "b_ink.tif"]),
    "images is a file": Case(file_in_place_of("images"), ["images: expected a folder, found a file"]),
    "labels is a file": Case(file_in_place_of("labels"), ["labels: expected a folder, found a file"]),
    "masks is a file": Case(file_in_place_of("masks"), ["masks: expected a folder, found a file"]),
    "masks is a link to nothing": Case(unmounted_masks, ["masks: expected a folder", "leads nowhere"]),
    "the data folder is a file": Case(
        whole_folder_is_a_file, ["data: expected a folder, found a file", "images/"]
    ),
    "a rotation about no axis": Case(
        tiff, ["dataset_config.rotation_axes", "'q'"], ["--set", "dataset_config.rotation_axes=[z, q]"]
    ),
    "no such folder": Case(lambda root: None, ["data"]),
    "an empty folder": Case(lambda root: root.mkdir(), ["data", "images/"]),
    "no image": Case(empty_images, ["images"]),
    "no label": Case(no_labels, ["labels"]),
    "one voxel": Case(one_voxel, ["a: too small", "(1, 1, 1)"]),
    "one voxel in zarr": Case(one_voxel_zarr, ["a: too small", "(1, 1, 1)"]),
    "a group with no array": Case(group_without_array("images", 3), ["a.zarr", "no array"]),
    "a label's group with no array": Case(group_without_array("labels", 2), ["a_ink.zarr", "no array"]),
    "a TIFF of fewer rows than it says": Case(lying_tiff(257, 2000), ["a.tif"]),
    "a TIFF of fewer columns than it says": Case(lying_tiff(256, 60000), ["a.tif"]),
    "a compressed TIFF of fewer rows than it says": Case(lying_tiff(257, 40, compression="zlib"), ["a.tif"]),
    "a TIFF that ends early": Case(cut_tiff(0.6), ["a.tif"]),
    "a compressed TIFF that ends early": Case(cut_tiff(0.6, compression="zlib"), ["a.tif"]),
    "a tiled TIFF that ends early": Case(cut_tiff(0.6, tile=(16, 16)), ["a.tif"]),
}


def state(root: Path) -> dict[str, tuple]:
    """What a folder holds, also times, so that whatever writes there is seen."""
    found = {}
    for path in sorted([root, *root.rglob("*")]) if root.exists() else []:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_size, content)
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(root: Path, out: Path, *options: str) -> int:
    return main(["train", "-i", str(root), "-o", str(out), *SMALL, *options])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, capfd, name):
    case, root, out = REFUSED[name], tmp_path / "data", tmp_path / "out"
    case.make(root)
    before = state(root)
    code = run(root, out, *case.options)
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert code == 2
    assert len(errors) == 1, lines
    assert "Traceback" not in "".join(lines)
    for word in case.words:
        assert word in errors[0], errors[0]
    assert not out.exists() or not list(out.iterdir())
    assert state(root) == before


def missing_chunks(root: Path) -> None:
    zarrs(root)
    for file in chunk_files(root / "images/a.zarr")[:2]:
        file.unlink()


def label_in_two_formats(root: Path) -> None:
    tiff(root)
    zarr.create_array(root / "labels/a_ink.zarr", data=shells(SHAPE), chunks=CHUNKS)


def prefixes(root: Path) -> None:
    names = {"scroll": shells(SHAPE), "scroll_1": 2 * shells(SHAPE), "scroll_10": shells(SHAPE)}
    write_tiff_folder(root, {name: {"ink": label} for name, label in names.items()})


def decomposed_name(root: Path) -> None:
    tiff(root, name="größe")
    path = root / "labels/größe_ink.tif"
    path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))


def through_links(root: Path) -> None:
    real = root.with_name("real")
    tiff(real)
    zarrs(root.with_name("zarrs"))
    (root / "images").mkdir(parents=True)
    (root / "labels").symlink_to(real / "labels")
    (root / "images/a.tif").symlink_to(real / "images/a.tif")


def one_voxel_beside_a_volume(root: Path) -> None:
    one_voxel(root)
    tiff(root, name="b")
    tiff(root, name="c")


def masked_classes(root: Path) -> None:
    """A class beyond the configured ones where the mask says that nothing is known."""
    label = shells(SHAPE)
    label[:, :, 40:] = 9
    mask = np.ones(SHAPE, np.uint8)
    mask[:, :, 40:] = 0
    write_tiff_folder(root, {"a": {"ink": label}}, masks={"a": {"ink": mask}})


def unknown_is_255(root: Path) -> None:
    label = shells(SHAPE)
    label[:, :, 40:] = 255
    tiff(root, label=label)


LEGAL = {
    "chunks that are not stored": Case(
        missing_chunks, ["a.zarr: 2 of 8 chunks are not stored and read as 0"]
    ),
    "NaN and infinity": Case(
        with_values([np.nan, np.inf, -np.inf], np.s_[::5]),
        ["a.tif: ", "values sampled are NaN or infinite"],
    ),
    "a label in two formats": Case(
        label_in_two_formats, ["a_ink.zarr is left out", "a_ink.tif has the images'"]
    ),
    "names that begin alike": Case(prefixes, []),
    "a label's name in other code points": Case(decomposed_name, []),
    "links": Case(through_links, []),
    "one voxel beside a volume": Case(one_voxel_beside_a_volume, []),
    "an ignore label beyond the classes": Case(
        unknown_is_255, [], ["--set", "dataset_config.targets={ink: {out_channels: 2, ignore_label: 255}}"]
    ),
    "foreign classes outside the mask": Case(
        masked_classes, [], ["--set", "dataset_config.targets={ink: {out_channels: 2}}"]
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEGAL)
def test_legal(tmp_path, capfd, name):
    case, root, out = LEGAL[name], tmp_path / "data", tmp_path / "out"
    case.make(root)
    before = state(root)
    assert run(root, out, *case.options) == 0
    told = capfd.readouterr().err
    for word in case.words:
        assert word in told
    assert "Traceback" not in told
    assert (out / "model" / "model_1.pth").is_file()
    assert state(root) == before


def forbid(monkeypatch, name: str) -> None:
    """Have the system forbid a file as it would to anybody but root, who runs some tests."""
    for module, function in ((Path, "open"), (os, "open")):
        real = getattr(module, function)

        def guarded(path, *args, _real=real, **options):
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return _real(path, *args, **options)

        monkeypatch.setattr(module, function, guarded)


@pytest.mark.parametrize(
    ("make", "name"),
    [(tiff, "labels/a_ink.tif"), (zarrs, "images/a.zarr/c/0/0/0"), (zarrs, "a_ink.zarr/c/1/1/1")],
)
def test_files_that_may_not_be_read(tmp_path, capfd, monkeypatch, make, name):
    root, out = make(tmp_path / "data"), tmp_path / "out"
    forbid(monkeypatch, name)
    assert run(root, out) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert name in line
    assert "chmod u+r" in line
    assert not out.exists()
