"""TIFF and NIfTI at URLs."""

from __future__ import annotations

import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.utils.errors import VolumenError

fsspec = pytest.importorskip("fsspec")
ARRAY = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype("u1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache" / "patches"))


@pytest.fixture
def server(tmp_path):
    """A folder and the URL at which it is served; notes what is asked for."""
    pytest.importorskip("aiohttp")
    asked = []

    class Quiet(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    root = tmp_path / "served"
    root.mkdir()
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()
    running.server_close()


def whole(volume):
    return volume.read(tuple(slice(0, size) for size in volume.shape))


def test_a_file_is_fetched_once_and_again_when_it_changes(server):
    root, url, asked = server
    tifffile.imwrite(root / "a.tif", ARRAY)
    for _ in range(2):
        np.testing.assert_array_equal(whole(open_volume(f"{url}/a.tif"))[0], ARRAY)
    assert asked.count("/a.tif") == 1
    tifffile.imwrite(root / "a.tif", np.concatenate([ARRAY, ARRAY]))
    assert open_volume(f"{url}/a.tif").shape == (10, 6, 7)


def test_a_folder_of_nifti_at_a_url(server):
    root, url, _ = server
    for part, name, values in (("images", "a", ARRAY), ("labels", "a_ink", ARRAY > 100)):
        (root / part).mkdir()
        image = nibabel.Nifti1Image(values.T.astype("u1"), np.diag([1, 2, 3, 1]))
        nibabel.save(image, root / part / f"{name}.nii.gz")
    (case,) = open_cases(discover(url))
    assert case.spacing == (3, 2, 1)
    np.testing.assert_array_equal(whole(case.image)[0], ARRAY)
    np.testing.assert_array_equal(whole(case.labels["ink"])[0], ARRAY > 100)


def write_slices(folder, array):
    folder.mkdir(parents=True)
    for number, plane in enumerate(array):
        tifffile.imwrite(folder / f"s{number + 8}.tif", plane)  # s8, s9, s10, ...


def test_slices_are_fetched_as_they_are_needed(server):
    root, url, asked = server
    write_slices(root / "a", ARRAY)
    volume = open_volume(f"{url}/a/")
    assert volume.shape == ARRAY.shape
    np.testing.assert_array_equal(volume.read(np.s_[3:5, 1:4, 2:6])[0], ARRAY[3:5, 1:4, 2:6])
    assert {path for path in asked if path.endswith(".tif")} == {"/a/s8.tif", "/a/s11.tif", "/a/s12.tif"}
    again = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(whole(again)[0], ARRAY)
    assert again.fingerprint() == open_volume(f"{url}/a").fingerprint()
    assert asked.count("/a/s11.tif") == 1


def test_a_folder_of_slices_and_of_zarr_without_ending_at_a_url(server):
    root, url, _ = server
    for name in ("images/a", "labels/a_ink"):
        write_slices(root / name, ARRAY)
    (case,) = open_cases(discover(url))
    np.testing.assert_array_equal(whole(case.image), whole(case.labels["ink"]))
    zarr.create_array(root / "zarrs/images/b", data=ARRAY, chunks=ARRAY.shape)
    zarr.create_array(root / "zarrs/labels/b_ink.zarr", data=ARRAY, chunks=ARRAY.shape)
    (case,) = open_cases(discover(f"{url}/zarrs"), axes="zyx")
    np.testing.assert_array_equal(whole(case.image)[0], ARRAY)


def test_a_slice_of_another_shape_is_named_by_its_url(server):
    root, url, _ = server
    write_slices(root / "a", ARRAY)
    tifffile.imwrite(root / "a/s10.tif", ARRAY[0, :3])
    with pytest.raises(VolumenError, match=f"^{url}/a/s10.tif: expected shape"):
        whole(open_volume(f"{url}/a"))


def test_slices_in_memory(tmp_path):
    write_slices(tmp_path / "a", ARRAY)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tmp_path / "a"), "/slices", recursive=True)
    volume = open_volume("memory://slices")
    np.testing.assert_array_equal(whole(volume)[0], ARRAY)
    before = volume.fingerprint()
    filesystem.pipe("/slices/s10.tif", filesystem.cat("/slices/s9.tif"))
    assert volume.fingerprint() != before
    filesystem.rm("/slices", recursive=True)


def test_slices_on_a_server_that_lists_nothing_are_one_line(server, monkeypatch):
    root, url, _ = server
    write_slices(root / "a", ARRAY)
    monkeypatch.setattr(
        SimpleHTTPRequestHandler, "list_directory", lambda self, path: self.send_error(403, "no listing")
    )
    with pytest.raises(VolumenError, match="only on a server that lists it"):
        open_volume(f"{url}/a")


def test_memory_urls(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, ARRAY)
    fsspec.filesystem("memory").pipe("/fetched/a.tif", path.read_bytes())
    np.testing.assert_array_equal(whole(open_volume("memory://fetched/a.tif"))[0], ARRAY)


def test_what_is_not_there_is_one_line(server):
    _, url, _ = server
    with pytest.raises(VolumenError, match=r"http://.*/no\.tif: cannot be fetched \(FileNotFoundError"):
        open_volume(f"{url}/no.tif")


def test_without_a_cache_copies_last_as_long_as_the_process(server, monkeypatch, tmp_path):
    root, url, _ = server
    monkeypatch.setenv("VOLUMEN_CACHE", "off")
    tifffile.imwrite(root / "a.tif", ARRAY)
    volume = open_volume(f"{url}/a.tif")
    np.testing.assert_array_equal(whole(volume)[0], ARRAY)
    assert not (tmp_path / "cache").exists()
