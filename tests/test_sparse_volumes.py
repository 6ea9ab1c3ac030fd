"""What a volume does not store costs nothing: counted in chunks that are visited, equal to the dense volume."""

from __future__ import annotations

import math
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from prediction import save_checkpoint
from test_patches import CaseStub, assert_same_index, find

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.caching.block_cache import BLOCKS
from volumen.data.damage import find_damage
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.formats.zarr_arrays import remote_listing
from volumen.data.formats.zarr_arrays.chunks import ChunkReader
from volumen.data.formats.zarr_arrays.stored_chunks import StoredBlocks, stored_blocks
from volumen.data.index.label_values import label_values
from volumen.data.nonfinite import count_nonfinite
from volumen.data.sampling.regions import RegionDataset
from volumen.data.sampling.split import labelled_profiles
from volumen.inference.windows.plan import PredictPlan
from volumen.inference.windows.stream import needed_batches
from volumen.transforms.intensity_properties import sample_intensity_properties, volume_properties

SIDE, CHUNK = 4096, 32
"""2 million chunks: visiting each would take minutes."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def write_sparse(path, side=SIDE, dtype="u1", fill=0, boxes=3, **options):
    """Write a cube with a few labelled boxes, each over eight chunks."""
    array = zarr.create_array(
        path, shape=(side,) * 3, chunks=(CHUNK,) * 3, dtype=dtype, fill_value=fill, **options
    )
    rng = np.random.default_rng(1)
    for value in range(1, boxes + 1):
        corner = rng.integers(0, side // CHUNK - 2, 3) * CHUNK + CHUNK // 2
        array[tuple(slice(int(c), int(c) + CHUNK) for c in corner)] = value
    return array


@pytest.fixture
def visited(monkeypatch):
    """Count the chunks that are looked for."""
    chunks: list[tuple[int, ...]] = []
    inner = ChunkReader._chunk

    def counted(self, index, *rest):
        chunks.append(index)
        return inner(self, index, *rest)

    monkeypatch.setattr(ChunkReader, "_chunk", counted)
    return chunks


def case_of(volume, image=None):
    return CaseStub({"t": volume}, image=image or volume)


@pytest.mark.parametrize("options", [{}, {"shards": (256,) * 3}])
def test_nothing_but_stored_chunks_is_visited(tmp_path, visited, options):
    write_sparse(tmp_path / "a.zarr", **options)
    volume = open_volume(tmp_path / "a.zarr")
    stored = stored_blocks(volume)
    assert (len(stored.indices), stored.total) == (24, (SIDE // CHUNK) ** 3)
    case = case_of(volume)
    # A read takes several small chunks at once, so that some of its neighbours are looked for too.
    most = len(stored.indices) * (64 // CHUNK) ** 3

    def visits(work):
        visited.clear()
        result = work()
        return result, len(visited)

    profiles, count = visits(lambda: labelled_profiles([case], ["t"], progress=False))
    assert count <= most
    assert sum(int(axis.sum()) for axis in profiles["a"]["t"]) == 3 * 3 * CHUNK**3
    index, count = visits(lambda: find(case, (32, 32, 32), jitter=True))
    assert count <= most
    assert len(index) > 0
    _, count = visits(lambda: find_damage([volume]))
    assert count <= 24 * (4 * 2**20 // CHUNK**3)  # a block of 4 million voxels around each
    values, count = visits(lambda: label_values(volume))
    assert values == (0, 1, 2, 3)
    assert count <= 24 * (4 * 2**20 // CHUNK**3)
    boxes = {"a": [tuple((0, SIDE) for _ in range(3))]}
    dataset, count = visits(
        lambda: RegionDataset([case], boxes, None, patch_size=(32, 32, 32), targets=["t"])
    )
    # Background counts: blocks that hold nothing are scored, and not looked for.
    assert len(dataset) > 24
    assert count <= 24 * 4**3  # blocks of up to 128 voxels per axis


def test_a_mask_that_is_not_stored_is_not_visited(tmp_path, visited):
    write_sparse(tmp_path / "label.zarr", boxes=9)
    write_sparse(tmp_path / "mask.zarr", boxes=1)
    label, mask = open_volume(tmp_path / "label.zarr"), open_volume(tmp_path / "mask.zarr")
    case = CaseStub({"t": label}, {"t": mask})
    assert labelled_profiles([case], ["t"], progress=False)["a"]["t"][0].sum() == CHUNK**3
    assert len(find(case, (32, 32, 32))) > 0
    assert len(visited) <= 4 * 8 * (64 // CHUNK) ** 3


@pytest.mark.parametrize("options", [{}, {"shards": (64,) * 3}])
@pytest.mark.parametrize("classes", [None, {"t": [1, 2]}])
def test_a_sparse_label_gives_the_index_of_a_dense_one(tmp_path, monkeypatch, options, classes):
    array = write_sparse(tmp_path / "a.zarr", side=256, **options)
    dense = np.asarray(array[...])
    monkeypatch.setattr("volumen.data.index.patches.WHOLE_CELLS", 100)
    monkeypatch.setattr("volumen.data.index.patch_grid.WHOLE_CELLS", 100)
    volume = open_volume(tmp_path / "a.zarr")
    settings = {"jitter": True, "classes": classes, "min_labeled_ratio": 0.05}
    sparse_index = find(case_of(volume), (32, 32, 32), **settings)
    monkeypatch.undo()
    assert_same_index(sparse_index, find(case_of(ArrayVolume(dense)), (32, 32, 32), **settings))
    found = labelled_profiles([case_of(volume)], ["t"], progress=False)["a"]["t"]
    for axis, counts in enumerate(found):
        others = tuple(other for other in range(3) if other != axis)
        np.testing.assert_array_equal(counts, (dense != 0).sum(axis=others))


def test_a_fill_value_that_means_unknown_is_not_visited(tmp_path, visited):
    write_sparse(tmp_path / "a.zarr", fill=255)
    case = case_of(open_volume(tmp_path / "a.zarr"))
    options = {"ignore_labels": {"t": 255}, "background": True}
    index = find(case, (32, 32, 32), **options)
    assert len(index) > 0
    assert len(visited) <= 24 * (64 // CHUNK) ** 3
    dense = np.full((256,) * 3, 255, np.uint8)
    small = write_sparse(tmp_path / "b.zarr", side=256, fill=255)
    dense[...] = small[...]
    assert_same_index(
        find(case_of(open_volume(tmp_path / "b.zarr")), (32, 32, 32), **options),
        find(case_of(ArrayVolume(dense)), (32, 32, 32), **options),
    )


@pytest.mark.parametrize("seed", range(6))
def test_tiles_and_cells_are_those_with_a_stored_voxel(seed):
    rng = np.random.default_rng(seed)
    ndim = int(rng.integers(2, 4))
    shape = tuple(int(n) for n in rng.integers(5, 30, ndim))
    block = tuple(int(n) for n in rng.integers(1, 9, ndim))
    grid = [-(-n // b) for n, b in zip(shape, block)]
    chosen = np.argwhere(rng.random(grid) < 0.1)
    dense = np.zeros(shape, bool)
    for index in chosen.tolist():
        dense[tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block))] = True
    stored = StoredBlocks(shape, block, chosen, 0)
    tile = tuple(int(n) for n in rng.integers(1, 12, ndim))
    edges = [np.unique(rng.integers(0, n + 1, 4)) for n in shape]
    edges = [axis if len(axis) > 1 else np.array([0, n]) for axis, n in zip(edges, shape)]
    tiles = [np.arange(0, n + t, t) for n, t in zip(shape, tile)]
    for found, cuts in ((stored.tiles(tile), tiles), (stored.cells(edges), edges)):
        expected = [
            list(index)
            for index in np.ndindex(*(len(axis) - 1 for axis in cuts))
            if dense[tuple(slice(axis[i], axis[i + 1]) for i, axis in zip(index, cuts))].any()
        ]
        assert found.tolist() == expected


def test_an_image_of_fractions_and_its_statistics_visit_few_chunks(tmp_path, visited):
    write_sparse(tmp_path / "a.zarr", dtype="f4")
    volume = open_volume(tmp_path / "a.zarr")
    assert count_nonfinite(volume).total == 0
    properties = sample_intensity_properties([case_of(volume)])
    assert properties["channels"][0]["count"] > 0
    assert len(visited) <= 24 * (4 * 2**20 // CHUNK**3) + 2 * 128 * (64 // CHUNK) ** 3


def test_statistics_come_from_what_is_stored_where_a_sample_of_the_whole_misses_it(tmp_path, caplog):
    array = write_sparse(tmp_path / "a.zarr", boxes=1)
    stored = stored_blocks(open_volume(tmp_path / "a.zarr"))
    ramp = np.broadcast_to(np.arange(CHUNK, dtype=np.uint8), (CHUNK,) * 3)
    array[tuple(slice(first, first + CHUNK) for first in stored.starts[0].tolist())] = ramp
    volume = open_volume(tmp_path / "a.zarr")
    found = sample_intensity_properties([case_of(volume)])["channels"][0]
    assert found["max"] > CHUNK - 4
    assert found["std"] > 0
    assert volume_properties(volume)["channels"][0]["max"] > CHUNK - 4
    assert "every value sampled" not in caplog.text
    # Nothing outside the given part is sampled.
    below = {"a": [[(int(stored.stops[:, 0].max()), SIDE), (0, SIDE), (0, SIDE)]]}
    assert sample_intensity_properties([case_of(volume)], boxes=below)["channels"][0]["max"] == 0
    assert "every value sampled is 0" in caplog.text


def test_the_blocks_of_a_huge_validation_part_take_little_memory(tmp_path):
    write_sparse(tmp_path / "a.zarr")
    case = case_of(open_volume(tmp_path / "a.zarr"))
    boxes = {"a": [((0, 2048), (0, 4096), (0, 4096))]}
    RegionDataset([case], boxes, None, patch_size=(256,) * 3, targets=["t"], most_windows=1)
    tracemalloc.start()
    dataset = RegionDataset([case], boxes, None, patch_size=(32,) * 3, targets=["t"], most_windows=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.table) == 2**20
    assert (
        peak / len(dataset.table) < 40
    )  # bytes; 36 alone for case, start, size and two counts of each block


def test_reading_the_values_of_a_label_leaves_the_cache_of_blocks_alone(tmp_path):
    write_sparse(tmp_path / "a.zarr")
    before = BLOCKS.nbytes
    assert label_values(open_volume(tmp_path / "a.zarr")) == (0, 1, 2, 3)
    assert BLOCKS.nbytes <= before


def test_one_listing_serves_everything(tmp_path, monkeypatch):
    write_sparse(tmp_path / "a.zarr")
    volume = open_volume(tmp_path / "a.zarr")
    stored_blocks(volume)
    monkeypatch.setattr(
        "volumen.data.formats.zarr_arrays.stored_chunks._list", lambda *_: pytest.fail("listed again")
    )
    case = case_of(volume)
    labelled_profiles([case], ["t"], progress=False)
    find(case, (32, 32, 32))
    label_values(volume)


def test_a_damaged_shard_is_found_and_not_taken_for_empty(tmp_path):
    write_sparse(tmp_path / "a.zarr", side=256, boxes=1, shards=(64,) * 3)
    shard = next(path for path in sorted((tmp_path / "a.zarr" / "c").rglob("*")) if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-30])
    assert find_damage([open_volume(tmp_path / "a.zarr")])


class _Server(SimpleHTTPRequestHandler):
    """Serves files, with or without lists of them, and whole or in parts as `Range` asks."""

    listing = True
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        path = Path(self.translate_path(self.path))
        if not (first or last) or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        data = data[int(first) : int(last) + 1 if last else None] if first else data[-int(last) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def list_directory(self, path):
        return super().list_directory(path) if self.listing else self.send_error(403, "no lists")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp")
    handler = type("Handler", (_Server,), {"asked": []})
    # A short queue would drop connections, which the system tries again after a second.
    waiting = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 512})
    running = waiting(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}", handler
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("listing", [True, False])
@pytest.mark.parametrize("options", [{}, {"shards": (64,) * 3}, {"zarr_format": 2}])
def test_stored_chunks_at_a_url_are_those_on_the_disk(
    tmp_path, server, monkeypatch, caplog, listing, options
):
    url, handler = server
    handler.listing = listing
    monkeypatch.setattr(remote_listing, "_MIN_PROBED", 10)
    write_sparse(tmp_path / "a.zarr", side=128, **options)
    local, remote = open_volume(tmp_path / "a.zarr"), open_volume(f"{url}/a.zarr")
    handler.asked.clear()
    found = stored_blocks(remote)
    assert found.block == (CHUNK,) * 3
    np.testing.assert_array_equal(found.indices, stored_blocks(local).indices)
    sharded = "shards" in options
    assert ("each of 64 chunks is asked for" in caplog.text) == (not listing and not sharded)
    # One list per folder, one part of each shard, or one question per chunk.
    most = 8 + (60 if listing else 8 if sharded else 64)
    assert len(handler.asked) <= most
    assert_same_index(find(case_of(remote), (32, 32, 32)), find(case_of(local), (32, 32, 32)))
    handler.asked.clear()
    again = stored_blocks(open_volume(f"{url}/a.zarr"))
    np.testing.assert_array_equal(again.indices, found.indices)
    if not listing and not sharded:  # what the server was asked for once is kept
        assert len(handler.asked) < 10


def test_a_server_that_fails_is_not_taken_for_one_without_chunks(tmp_path, server, monkeypatch):
    url, handler = server
    handler.listing = False
    monkeypatch.setattr(remote_listing, "_MIN_PROBED", 100)
    write_sparse(tmp_path / "a.zarr", side=256)
    volume = open_volume(f"{url}/a.zarr")
    handler.do_GET = lambda self: self.send_error(503, "busy")
    with pytest.raises(Exception, match="check the URL and the network"):
        stored_blocks(volume)


def test_a_few_chunks_at_a_url_are_read_rather_than_asked_for(tmp_path, server):
    url, handler = server
    handler.listing = False
    write_sparse(tmp_path / "a.zarr", side=96, boxes=1)
    assert stored_blocks(open_volume(f"{url}/a.zarr")) is None


@pytest.mark.parametrize("seed", range(5))
def test_needed_batches_of_scattered_blocks_are_those_of_all_windows(seed):
    rng = np.random.default_rng(seed)
    plan = PredictPlan(
        (160, 170, 90), (16, 16, 16), 0.5, block_shape=(16, 16, 8), batch_size=3, tile=(1, 4, 4)
    )
    done = np.ones(plan.blocks, bool)
    for _ in range(3):
        done[tuple(int(rng.integers(0, n)) for n in plan.blocks)] = False
    expected, last = [], range(0)
    for position in range(len(plan)):
        if position not in last and not done[plan.touched(position)].all():
            last = plan.batch_of(position)
            expected.append(last)
    assert list(needed_batches(plan, done)) == expected


@pytest.mark.parametrize("words", [("--batch-size", "3"), ("--region", "10:110,:,4:", "--tta")])
def test_a_sparse_mask_predicts_what_a_dense_one_does(tmp_path, monkeypatch, words):
    shape = (120, 40, 40)
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    zarr.create_array(tmp_path / "image.zarr", data=image, chunks=(32, 32, 32))
    sparse = zarr.create_array(tmp_path / "sparse.zarr", shape=shape, chunks=(16, 16, 16), dtype="u1")
    sparse[20:34, 20:30, 25:35] = 1
    sparse[100:103, 3:8, 0:9] = 1
    tifffile.imwrite(tmp_path / "dense.tif", np.asarray(sparse[...]))
    save_checkpoint(tmp_path / "m.pth")
    for name in ("sparse.zarr", "dense.tif"):
        out = str(tmp_path / f"out_{name[:5]}.zarr")
        flags = ["-i", str(tmp_path / "image.zarr"), "-m", str(tmp_path / "m.pth"), "-o", out, *words]
        flags += ["--overlap", "0.25"]
        assert main(["predict", *flags, "--mask", str(tmp_path / name), "--device", "cpu", "--quiet"]) == 0
    one, other = (zarr.open_group(tmp_path / f"out_{name}.zarr", mode="r") for name in ("spars", "dense"))
    arrays = 0
    for name, group in one.groups():
        for level, array in group.arrays():
            arrays += 1
            np.testing.assert_array_equal(array[...], other[f"{name}/{level}"][...])
    assert arrays > 3
    assert any(array[...].any() for _, group in one.groups() for _, array in group.arrays())


def test_a_huge_volume_is_predicted_where_its_mask_is(tmp_path, visited):
    write_sparse(tmp_path / "image.zarr")
    write_sparse(tmp_path / "mask.zarr")
    save_checkpoint(tmp_path / "m.pth")
    flags = [
        "-i",
        str(tmp_path / "image.zarr"),
        "-m",
        str(tmp_path / "m.pth"),
        "-o",
        str(tmp_path / "o.zarr"),
    ]
    flags += ["--patch-size", "32,32,32", "--overlap", "0", "--no-skip-empty"]
    assert main(["predict", *flags, "--mask", str(tmp_path / "mask.zarr"), "--device", "cpu", "--quiet"]) == 0
    assert len(visited) <= 24 * 200


def test_a_time_budget_looks_at_a_part_of_a_huge_volume(tmp_path):
    from volumen.time_budget.measure import anywhere

    for part, name in (("images", "a"), ("labels", "a_ink")):
        (tmp_path / part).mkdir()
        write_sparse(tmp_path / part / f"{name}.zarr")
    config = ConfigManager(dataset_dir=str(tmp_path), tr_config={"patch_size": [16, 16, 16]}, device="cpu")
    boxes = anywhere(config).split.train["a"]
    assert sum(math.prod((b - a) // 8 for a, b in box) for box in boxes) < 10**6
