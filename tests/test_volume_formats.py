"""Neuroglancer's volumes, N5, zipped zarr, MetaImage and WEBKNOSSOS datasets, written by other libraries."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import zarr
from test_more_formats import check

from volumen.data.formats.detection import detect_format
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import SingleLevelError
from volumen.data.layout import discover, open_cases
from volumen.inference.jobs import image_paths
from volumen.utils.errors import VolumenError

FILES = Path(__file__).parent / "files"
SHAPE = (20, 25, 35)


def values(shape=SHAPE, dtype="uint8", seed=0):
    found = np.random.default_rng(seed).integers(0, 200, shape)
    return found.astype(dtype)


def whole(volume):
    return volume.read(tuple(slice(0, n) for n in volume.shape))


# Neuroglancer precomputed


def write_precomputed(folder, array, scales=1, sharding=None, **scale):
    """Write an array (C, Z, Y, X) by TensorStore; level k has every 2^k-th voxel of Y and X."""
    tensorstore = pytest.importorskip("tensorstore")
    kind = "segmentation" if scale.get("encoding") == "compressed_segmentation" else "image"
    for level in range(scales):
        part = array[:, :, :: 2**level, :: 2**level]
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": f"file://{folder}/",
            "multiscale_metadata": {
                "data_type": array.dtype.name, "num_channels": len(array), "type": kind,
            },
            "scale_metadata": {
                "size": list(part.shape[:0:-1]),
                "resolution": [4 * 2**level, 4 * 2**level, 40],
                "voxel_offset": [6 // 2**level, 4 // 2**level, 7],
                "chunk_size": [16, 8, 8],
                **({"sharding": sharding} if sharding else {}),
                **scale,
            },
        }  # fmt: skip
        store = tensorstore.open(spec, create=True).result()
        store[...] = part.transpose(3, 2, 1, 0)
    return folder


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float32", "int16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_raw_chunks_are_read_by_region(tmp_path, dtype, channels):
    array = values((channels, *SHAPE), dtype)
    write_precomputed(tmp_path / "a", array, encoding="raw")
    assert detect_format(tmp_path / "a") == "precomputed"
    volume = open_volume(tmp_path / "a")
    check(volume, array)
    assert (volume.spacing, volume.unit) == ((40.0, 4.0, 4.0), "nanometer")
    assert volume.geometry.origin == (280.0, 16.0, 24.0)
    assert volume.chunks == (8, 8, 16)


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
@pytest.mark.parametrize("largest", [1, 3, 200, 2**31])
def test_compressed_segmentations_are_read(tmp_path, dtype, largest):
    array = np.random.default_rng(0).integers(0, largest, (1, *SHAPE)).astype(dtype)
    array[:, 5:15, :16] = 7  # blocks with one value
    if dtype == "uint64":
        array *= np.uint64(2**33 - 1)
    write_precomputed(
        tmp_path / "a",
        array,
        encoding="compressed_segmentation",
        compressed_segmentation_block_size=[8, 4, 2],
    )
    check(open_volume(tmp_path / "a"), array)


@pytest.mark.parametrize("hashing", ["identity", "murmurhash3_x86_128"])
@pytest.mark.parametrize("packing", ["raw", "gzip"])
@pytest.mark.parametrize("bits", [(0, 0, 0), (1, 1, 2), (2, 3, 0), (0, 0, 4)])
def test_chunks_in_shards_are_found(tmp_path, hashing, packing, bits):
    array = values((1, *SHAPE), "uint16")
    array[:, :8, :8, :16] = 0
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1", "preshift_bits": bits[0], "hash": hashing,
        "minishard_bits": bits[1], "shard_bits": bits[2], "minishard_index_encoding": packing,
        "data_encoding": packing,
    }  # fmt: skip
    write_precomputed(tmp_path / "a", array, sharding=sharding, encoding="raw")
    check(open_volume(tmp_path / "a"), array)


@pytest.mark.parametrize(("encoding", "error"), [("png", 0), ("jpeg", 60)])
def test_pictures_as_chunks_are_read(tmp_path, encoding, error):
    array = values((1, *SHAPE)) // 4 + 100
    write_precomputed(tmp_path / "a", array.astype(np.uint8), encoding=encoding)
    found = whole(open_volume(tmp_path / "a"))
    assert np.abs(found.astype(int) - array).max() <= error
    assert np.abs(found.astype(int) - array).mean() <= error / 4


def test_scales_are_levels_in_their_place(tmp_path):
    array = values((1, *SHAPE))
    write_precomputed(tmp_path / "a", array, scales=2, encoding="raw")
    volume = open_volume(tmp_path / "a", level=1)
    check(volume, array[:, :, ::2, ::2])
    assert volume.spacing == (40.0, 8.0, 8.0)
    # Low corner of voxel 0 of both levels: 16 - 2 and 18 - 4; 24 - 2 and 26 - 4.
    assert volume.geometry.origin == (280.0, 18.0, 26.0)
    with pytest.raises(SingleLevelError, match="a level from 0 to 1, found 2"):
        open_volume(tmp_path / "a", level=2)


def test_compressed_files_of_cloud_volume_are_read(tmp_path):
    import gzip

    array = values((1, *SHAPE))
    folder = write_precomputed(tmp_path / "a", array, encoding="raw")
    for path in folder.rglob("*_*-*"):
        if path.is_file():
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    check(open_volume(folder), array)


@pytest.mark.parametrize("kind", ["truncated", "shard", "encoding", "info", "mesh"])
def test_what_is_no_volume_in_precomputed_is_one_line(tmp_path, kind):
    array = values((1, *SHAPE))
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1", "preshift_bits": 0, "hash": "identity", "minishard_bits": 0,
        "shard_bits": 0,
    }  # fmt: skip
    folder = write_precomputed(
        tmp_path / "a", array, sharding=sharding if kind == "shard" else None, encoding="raw"
    )
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "info"]
    info = json.loads((folder / "info").read_text())
    if kind in ("truncated", "shard"):
        files[0].write_bytes(files[0].read_bytes()[:-10])
    elif kind == "encoding":
        info["scales"][0]["encoding"] = "compresso"
    elif kind == "info":
        del info["scales"][0]["size"]
    else:
        info = {"@type": "neuroglancer_legacy_mesh", "scales": None}
    (folder / "info").write_text(json.dumps(info))
    with pytest.raises(VolumenError) as caught:
        whole(open_volume(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# N5


def write_n5(folder, array, compression=None, **attributes):
    """Write an array in C order by TensorStore."""
    tensorstore = pytest.importorskip("tensorstore")
    store = tensorstore.open(
        {
            "driver": "n5",
            "kvstore": f"file://{folder}/",
            "metadata": {
                "dimensions": list(array.shape[::-1]), "blockSize": [8, 7, 6, 2][: array.ndim],
                "dataType": array.dtype.name, "compression": compression or {"type": "gzip"}, **attributes,
            },
        },
        create=True,
    ).result()  # fmt: skip
    store[...] = array.transpose()
    return folder


@pytest.mark.parametrize(
    "compression",
    [
        {"type": "raw"},
        {"type": "gzip"},
        {"type": "gzip", "useZlib": True},
        {"type": "bzip2"},
        {"type": "xz"},
        {"type": "zstd"},
        {"type": "blosc", "cname": "lz4", "clevel": 3, "shuffle": 1},
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint64", "float32"])
def test_blocks_of_n5_are_read_by_region(tmp_path, compression, dtype):
    array = values(dtype=dtype)
    array[:6, :7, :8] = 0
    write_n5(tmp_path / "a.n5" / "raw", array, compression)
    volume = open_volume(tmp_path / "a.n5")
    check(volume, array[None])
    assert detect_format(tmp_path / "a.n5") == detect_format(tmp_path / "a.n5" / "raw") == "n5"


def test_channels_of_n5_have_a_name_or_a_place(tmp_path):
    array = values((3, *SHAPE))
    write_n5(tmp_path / "a.n5", array)
    check(open_volume(tmp_path / "a.n5"), array)
    named = np.moveaxis(array, 0, 1)
    write_n5(tmp_path / "b.n5", named, axes=["x", "y", "c", "z"])
    check(open_volume(tmp_path / "b.n5"), array)


def attributes(folder, **entries):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attributes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **entries}))


@pytest.mark.parametrize(
    "convention", ["n5-viewer", "n5-viewer group", "paintera", "cosem", "cosem F", "n5-ij"]
)
def test_sizes_of_n5_in_every_convention(tmp_path, convention):
    array = values()
    group = tmp_path / "a.n5" / "em"
    for level in range(2):
        write_n5(group / f"s{level}", array[:, :: 2**level, :: 2**level])
    if convention == "n5-viewer":
        for level in range(2):
            attributes(
                group / f"s{level}",
                pixelResolution={"dimensions": [4, 5, 40], "unit": "nm"},
                downsamplingFactors=[2**level, 2**level, 1],
            )
    elif convention == "n5-viewer group":
        scales = [[1, 1, 1], [2, 2, 1]]
        attributes(group, pixelResolution={"dimensions": [4, 5, 40], "unit": "nm"}, scales=scales)
    elif convention == "paintera":
        attributes(group, resolution=[4, 5, 40], units="nm", offset=[0, 0, 0])
        attributes(group / "s1", downsamplingFactors=[2, 2, 1])
    elif convention == "n5-ij":
        for level in range(2):
            f = 2**level
            attributes(group / f"s{level}", resolution=[4 * f, 5 * f, 40], units=["nm", "nm", "nm"])
    else:
        for level in range(2):
            f, turn = 2**level, -1 if convention == "cosem F" else 1
            transform = {
                "axes": ["z", "y", "x"][::turn], "scale": [40, 5 * f, 4 * f][::turn], "units": ["nm"] * 3,
                "translate": [0, 5 * (f - 1) / 2, 4 * (f - 1) / 2][::turn],
            }  # fmt: skip
            if turn < 0:
                transform["ordering"] = "F"
            attributes(group / f"s{level}", transform=transform)
    for level in range(2):
        volume = open_volume(tmp_path / "a.n5", level=level)
        check(volume, array[None, :, :: 2**level, :: 2**level])
        assert volume.spacing == (40.0, 5.0 * 2**level, 4.0 * 2**level)
        assert volume.unit == "nanometer"
        if level and convention != "n5-ij":
            assert volume.geometry.origin == (0.0, 2.5, 2.0)
    with pytest.raises(SingleLevelError):
        open_volume(tmp_path / "a.n5", level=2)


def test_several_datasets_of_n5_are_listed_and_usual_names_are_chosen(tmp_path):
    raw, ids, other = values(), values(dtype="uint64", seed=1), values(seed=2)
    write_n5(tmp_path / "a.n5" / "volumes" / "raw", raw)
    write_n5(tmp_path / "a.n5" / "volumes" / "labels" / "neuron_ids", ids)
    check(open_volume(tmp_path / "a.n5"), raw[None])
    check(open_volume(tmp_path / "a.n5", labels=True), ids[None])
    write_n5(tmp_path / "b.n5" / "one", raw)
    write_n5(tmp_path / "b.n5" / "two", other)
    with pytest.raises(VolumenError, match=r"found /one \(20, 25, 35\), /two .*b\.n5/one"):
        open_volume(tmp_path / "b.n5")
    check(open_volume(tmp_path / "b.n5" / "two"), other[None])
    assert image_paths(str(tmp_path / "b.n5")) == [str(tmp_path / "b.n5")]


@pytest.mark.parametrize("kind", ["truncated", "multiset", "lz4", "empty", "attributes"])
def test_what_is_no_volume_in_n5_is_one_line(tmp_path, kind):
    folder = tmp_path / "a.n5"
    if kind == "empty":
        folder.mkdir()
    else:
        write_n5(folder, values())
    if kind == "truncated":
        (folder / "0/0/0").write_bytes((folder / "0/0/0").read_bytes()[:-30])
    elif kind == "multiset":
        attributes(folder, isLabelMultiset=True)
    elif kind == "lz4":
        attributes(folder, compression={"type": "lz4"})
    elif kind == "attributes":
        (folder / "attributes.json").write_text('{"dimensions": [1, 2')
    with pytest.raises(VolumenError) as caught:
        whole(open_volume(folder))
    assert "a.n5" in str(caught.value)


# Zipped zarr


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("suffix", [".zarr.zip", ".ozx"])
def test_a_zipped_zarr_is_read(tmp_path, version, folder, suffix):
    array = values()
    inside = {"shards": (8, 16, 32)} if version == 3 else {}
    zarr.create_array(
        tmp_path / "a.zarr", data=array, chunks=(8, 8, 16), zarr_format=version, **inside
    ).attrs["voxel_size"] = [4.0, 2.0, 1.0]
    path = tmp_path / f"a{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tmp_path / "a.zarr").rglob("*")):
            archive.write(file, file.relative_to(tmp_path if folder else tmp_path / "a.zarr"))
    volume = open_volume(path)
    check(volume, array[None])
    assert volume.spacing == (4.0, 2.0, 1.0)
    before = volume.fingerprint()
    zarr.open_array(tmp_path / "a.zarr", mode="r+")[0] = 1
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "a.zarr")
    (tmp_path / "b.zip").replace(path)
    assert open_volume(path).fingerprint() != before
    assert (whole(open_volume(path))[0, 0] == 1).all()


def test_levels_and_labels_of_a_zipped_ome_zarr_are_read(tmp_path):
    from test_placement import write_ome

    write_ome(tmp_path / "a.zarr", values(), (8.0, 4.0, 4.0), translation=(1.0, 2.0, 3.0))
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a.zarr")
    (tmp_path / "a.zip").replace(tmp_path / "a.ome.zarr.zip")
    for path in (tmp_path / "a.ome.zarr.zip", tmp_path / "a.ome.zarr.zip" / "0"):
        volume = open_volume(path)
        check(volume, values()[None])
        assert volume.geometry.origin == (1.0, 2.0, 3.0)
        assert volume.spacing == (8.0, 4.0, 4.0)


@pytest.mark.parametrize("kind", ["cut", "other", "missing"])
def test_a_zip_that_is_no_zarr_is_one_line(tmp_path, kind):
    path = tmp_path / "a.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt" if kind == "other" else ".zgroup", '{"zarr_format": 2}' * 50)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(VolumenError, match=r"a\.zarr\.zip"):
        open_volume(path / "0" if kind == "missing" else path)


# MetaImage


@pytest.fixture
def itk(tmp_path):
    with zipfile.ZipFile(FILES / "itk_images.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


ITK = (np.indices((5, 6, 7)).sum(0) * 11 - 20).astype(np.int16)


@pytest.mark.parametrize(
    "name", ["raw.mha", "packed.mha", "raw.mhd", "packed.mhd", "long.mha", "slicer.nrrd"]
)
def test_images_of_itk_have_values_place_and_direction(itk, name):
    volume = open_volume(itk / name)
    check(volume, ITK[None].astype(np.int64 if name == "long.mha" else np.int16))
    cos, sin = np.cos(0.3), np.sin(0.3)
    lps = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) * [0.5, 2.0, 3.0]
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = lps, [10, 20, 30]
    np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-12)
    np.testing.assert_allclose(volume.spacing, (3.0, 2.0, 0.5))
    assert (volume.unit, volume.geometry.orientation) == ("millimeter", "SPL")
    first = volume.geometry.matrix() @ [2, 3, 4, 1]  # (z, y, x) of a voxel
    np.testing.assert_allclose(first[:3][::-1], (volume.affine @ [4, 3, 2, 1])[:3])


def test_channels_and_flat_images_of_itk_are_read(itk):
    check(open_volume(itk / "vector.mha"), np.stack([ITK, ITK + 1, ITK + 2]).astype(np.float32))
    flat = open_volume(itk / "flat.mha")
    check(flat, ITK[:1].astype(np.uint8))
    assert flat.spacing == (2.0, 0.5)


@pytest.mark.parametrize("kind", ["truncated", "cut", "missing", "list", "skewed", "packed"])
def test_what_is_no_volume_in_metaimage_is_one_line(itk, kind):
    path = itk / "raw.mha"
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:-10])
    elif kind == "cut":
        path.write_bytes(content[:60])
    elif kind == "missing":
        (itk / "raw.raw").unlink()
        path = itk / "raw.mhd"
    elif kind == "list":
        path.write_bytes(content.replace(b"LOCAL", b"LIST\n"))
    elif kind == "skewed":
        path.write_bytes(content.replace(b"0.29552020666133955 0 ", b"0.39552020666133955 0 "))
    else:
        path = itk / "packed.mha"
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(VolumenError) as caught:
        whole(open_volume(path))
    assert "\n" not in str(caught.value)


# WEBKNOSSOS


@pytest.fixture
def dataset(tmp_path):
    with zipfile.ZipFile(FILES / "webknossos_wkw.zip") as archive:
        archive.extractall(tmp_path / "d")
    return tmp_path / "d"


WKW = (np.indices((12, 10, 9)).sum(0) * 7 % 256).astype(np.uint8).T
CELLS = (np.indices((12, 10, 9))[0] // 4 * 2**20).astype(np.uint32).T


def as_zarr3(dataset):
    """Rewrite a dataset with zarr arrays, as newer versions of WEBKNOSSOS lay them out."""
    content = json.loads((dataset / "datasource-properties.json").read_text())
    for layer in content["dataLayers"]:
        layer["dataFormat"] = "zarr3"
        for mag in layer["mags"]:
            source = open_volume(dataset / layer["name"], level=len(mag["path"]) > 10)
            first = source._start
            full = np.zeros([a + n for a, n in zip(first, source.shape)], source.dtype)
            full[tuple(slice(a, None) for a in first)] = whole(source)[0]
            folder = dataset / mag["path"]
            shutil.rmtree(folder)
            zarr.create_array(
                folder, data=full.T[None], chunks=(1, 8, 8, 8), shards=(1, 16, 16, 16),
                dimension_names=["c", "x", "y", "z"],
            )  # fmt: skip
    (dataset / "datasource-properties.json").write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["wkw", "zarr3"])
def test_layers_of_webknossos_are_read_in_their_box(dataset, form):
    if form == "zarr3":
        as_zarr3(dataset)
    image, cells = open_volume(dataset), open_volume(dataset, labels=True)
    check(image, WKW[None])
    check(cells, CELLS[None])
    check(open_volume(dataset / "cells"), CELLS[None])
    for volume in (image, cells):
        assert (volume.spacing, volume.unit) == ((40.0, 4.0, 4.0), "nanometer")
        assert volume.geometry.origin == (280.0, 20.0, 12.0)
    coarse = open_volume(dataset, level=1)
    assert coarse.shape == (9, 6, 7)  # the box of 3 to 15 and 5 to 15 in voxels of 2
    assert coarse.spacing == (40.0, 8.0, 8.0)
    assert coarse.geometry.origin == (280.0, 18.0, 10.0)
    np.testing.assert_array_equal(whole(coarse)[0][:, 1:6, 1:7], WKW[:, 1::2, 1::2])
    with pytest.raises(
        SingleLevelError, match=r"expected magnification 2-2-1 \(level 1\), found magnifications 1"
    ):
        open_volume(dataset / "cells", level=1)


@pytest.mark.parametrize("kind", ["layer", "several", "truncated", "header", "json", "box", "n5"])
def test_what_is_no_volume_in_webknossos_is_one_line(dataset, kind):
    path, properties = dataset, dataset / "datasource-properties.json"
    content = json.loads(properties.read_text())
    if kind == "layer":
        path = dataset / "nuclei"
        path.mkdir()
    elif kind == "several":
        content["dataLayers"][1]["category"] = "color"
    elif kind == "truncated":
        cube = dataset / "color/1/z0/y0/x0.wkw"
        cube.write_bytes(cube.read_bytes()[:-40])
    elif kind == "header":
        (dataset / "color/1/header.wkw").unlink()
    elif kind == "box":
        del content["dataLayers"][0]["boundingBox"]
    elif kind == "n5":
        content["dataLayers"][0]["dataFormat"] = "n5"
    properties.write_text("{" if kind == "json" else json.dumps(content))
    with pytest.raises(VolumenError) as caught:
        whole(open_volume(path))
    assert str(dataset) in str(caught.value)


# All of them


class Ranges(SimpleHTTPRequestHandler):
    """A server that answers requests for parts of files, unless it is `plain`."""

    plain = False

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        stated = self.headers.get("Range", "").removeprefix("bytes=")
        if not stated or self.plain or not path.is_file():
            super().do_GET()
            return
        start, _, stop = stated.partition("-")
        part = path.read_bytes()[int(start) : int(stop) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=[False, True], ids=["ranges", "whole files"])
def http_folder(tmp_path, request):
    pytest.importorskip("aiohttp")
    root = tmp_path / "served"
    root.mkdir()
    handler = type("Handler", (Ranges,), {"plain": request.param})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def save(folder, name, array, kind):
    if kind == "precomputed":
        write_precomputed(folder / name, array[None], encoding="raw")
    elif kind == "n5":
        write_n5(folder / f"{name}.n5" / "data", array)
    elif kind == "zip":
        zarr.save_array(folder.parent / "z", array)
        shutil.make_archive(str(folder / f"{name}.zarr"), "zip", folder.parent / "z")
        shutil.rmtree(folder.parent / "z")


@pytest.mark.parametrize("kind", ["precomputed", "n5", "zip"])
def test_a_data_folder_may_hold_them_and_worker_processes_read_them(tmp_path, kind):
    import multiprocessing

    for folder, name in (("images", "a"), ("labels", "a_cell"), ("masks", "a_cell")):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder, name, (values() > 100).astype(np.uint8), kind)
    assert image_paths(str(tmp_path))[0].startswith(str(tmp_path / "images" / "a"))
    (case,) = open_cases(discover(tmp_path))
    np.testing.assert_array_equal(whole(case.labels["cell"])[0] > 0, values() > 100)
    assert case.image.shape == SHAPE
    whole(case.image)
    with multiprocessing.get_context("fork").Pool(2) as pool:  # as a data loader, after the labels were read
        for found in pool.map(whole, [case.image] * 4):
            np.testing.assert_array_equal(found[0], values() > 100)


@pytest.mark.parametrize("kind", ["precomputed", "n5", "webknossos", "zip"])
def test_they_are_read_over_http(tmp_path, http_folder, kind, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    root, url = http_folder
    array = values()
    if kind == "webknossos":
        with zipfile.ZipFile(FILES / "webknossos_wkw.zip") as archive:
            archive.extractall(root / "d")
        check(open_volume(f"{url}/d"), WKW[None])
        return
    save(root, "a", array, kind)
    name = {"n5": "a.n5/data", "zip": "a.zarr.zip", "precomputed": "a"}[kind]
    check(open_volume(f"{url}/{name}"), array[None])
    if kind in ("n5", "precomputed"):
        check(open_volume(f"{kind}://{url}/{name}"), array[None])


def test_shards_are_read_over_http(http_folder):
    root, url = http_folder
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1", "preshift_bits": 1, "hash": "murmurhash3_x86_128",
        "minishard_bits": 1, "shard_bits": 2, "minishard_index_encoding": "gzip", "data_encoding": "gzip",
    }  # fmt: skip
    write_precomputed(root / "a", values((1, *SHAPE)), sharding=sharding, encoding="raw")
    check(open_volume(f"precomputed://{url}/a"), values((1, *SHAPE)))
