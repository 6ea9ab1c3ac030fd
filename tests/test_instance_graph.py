"""Instances by one graph: the same bytes for all blocks, orders and interruptions; tables as by direct loops."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from instance_cases import cells, predicted, walls
from scipy import ndimage

from volumen.derived.arrays.descriptors import local_shape_descriptors
from volumen.derived.arrays.instance_distance import instance_distance
from volumen.inference.postprocess.blocks import block_box, block_counts
from volumen.inference.postprocess.graph import edges as edge_tables
from volumen.inference.postprocess.graph.agglomerate import agglomerate
from volumen.inference.postprocess.graph.edges import EdgeFiles, EdgeSums, RegionTable, add_rows, links_of
from volumen.inference.postprocess.graph.flooding import flood
from volumen.inference.postprocess.graph.fragments import pieces_of
from volumen.inference.postprocess.graph.landscape import CERTAIN, Landscape
from volumen.inference.postprocess.graph.links import join_pieces, shell_of
from volumen.inference.postprocess.graph.passes import FACE_BITS, NO_PASS, check_faces
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import VolumeGraph, instances_of
from volumen.inference.rules import InstanceRules
from volumen.utils.errors import VolumenError

pytest.importorskip("bioimage_cpp", exc_type=ImportError)

OFFSETS = ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (-4, 0, 0), (0, -6, 0), (0, 0, 6), (3, 0, -5))
SHAPE = (30, 44, 52)
BLOCKS = [(12, 11, 12), (7, 16, 11), (30, 5, 52), (16, 32, 32), (30, 44, 52)]


def smooth_noise(shape, seed):
    return predicted(np.zeros(shape), 1.0, seed)


def boundary_case():
    truth = cells(SHAPE, 14, seed=3)
    wall = np.rint(255 * predicted(walls(truth), 0.2)).astype(np.uint8)
    wall[:, :9, :9] = 0  # plateaus
    wall[10:22, 20:40, 30:50] = 255  # a wall that fragments do not fill
    return {"wall": wall[None]}, Source(InstanceRules("wall", halo=6), (1.0, 1.0, 1.0))


def thick_case():
    heads, _ = boundary_case()
    return heads, Source(InstanceRules("wall", halo=9), (2.5, 1.0, 1.2))


def foreground_case():
    heads, _ = boundary_case()
    heads["cell"] = smooth_noise((1, *SHAPE), 1).astype(np.float16)
    rules = InstanceRules("wall", "cell", halo=6, threshold=0.3, agglomeration="multicut")
    return heads, Source(rules, (1.0, 1.0, 1.0))


def affinity_case():
    truth = cells(SHAPE, 14, seed=5)
    truth[:, 36:] = 0
    rng = np.random.default_rng(0)
    found = np.zeros((len(OFFSETS), *SHAPE), np.float32)
    for values, offset in zip(found, OFFSETS):
        moved = np.roll(truth, tuple(-step for step in offset), (0, 1, 2))
        values[...] = np.abs((moved == truth) * (truth > 0) - 0.4 * rng.random(SHAPE))
    rules = InstanceRules(affinities="affs", halo=6)
    return {"affs": np.rint(255 * found).astype(np.uint8)}, Source(rules, (1.0, 1.0, 1.0), OFFSETS)


def smooth_field(channels, seed):
    """Return a random field of unit vectors, float16."""
    found = np.stack([smooth_noise(SHAPE, seed + channel) for channel in range(channels)]) - 0.5
    return (found / np.maximum(np.linalg.norm(found, axis=0), 1e-6)).astype(np.float16)


def distance_case():
    truth = cells(SHAPE, 14, seed=4)
    signed = instance_distance(truth)[0] + 2 * smooth_noise(SHAPE, 7)
    return {"depth": signed[None].astype(np.float16)}, Source(
        InstanceRules(distance="depth"), (2.0, 1.0, 1.0)
    )


def sheets_case():
    heads, _ = distance_case()
    heads |= {"ink": 1 - boundary_case()[0]["wall"] / np.float32(255), "up": smooth_field(3, 9)}
    rules = InstanceRules(foreground="ink", normals="up", distance="depth", min_size=20)
    return heads, Source(rules, (1.0, 1.0, 1.0))


def descriptors_case():
    found = local_shape_descriptors(cells(SHAPE, 14, seed=6), 4.0, (1.0, 1.0, 1.0))
    noisy = found + 0.2 * np.random.default_rng(0).normal(size=found.shape)
    rules = InstanceRules(descriptors="lsd", halo=6)
    return {"lsd": noisy.astype(np.float16)}, Source(rules, (1.0, 1.0, 1.0))


CASES = {
    "distance": distance_case,
    "sheets": sheets_case,
    "descriptors": descriptors_case,
    "walls": boundary_case,
    "thick": thick_case,
    "foreground": foreground_case,
    "affinities": affinity_case,
}


def whole_box(array):
    return tuple(slice(0, n) for n in array.shape)


def mask_of(shape):
    mask = np.ones(shape, bool)
    mask[:, 30:, :7] = False
    return mask


class Run:
    """A segmentation in blocks, of arrays in memory."""

    def __init__(self, heads, source, block, folder, mask=None):
        self.heads_of, self.mask_of, self.cancel = heads, mask, lambda: None
        shape = next(iter(heads.values())).shape[1:]
        self.graph = VolumeGraph(shape, block, source, folder)
        self.graph.create()
        self.local, self.final = np.zeros((2, *shape), np.uint32)

    def heads(self, box):
        return {name: values[(slice(None), *box)] for name, values in self.heads_of.items()}

    def mask(self, box):
        return None if self.mask_of is None else self.mask_of[box]

    def labels(self, box):
        return self.local[box]

    def fragments(self, number):
        self.graph.find_fragments(number, self.heads, self.mask, self.local.__setitem__, self.cancel)

    def edges(self, number):
        self.graph.find_edges(number, self.labels, self.heads, self.mask, self.cancel)

    def number(self, number):
        box, values = self.graph.numbered(number, self.labels)
        self.final[box] = values

    def __call__(self, each=lambda function, numbers: list(map(function, numbers))):
        each(self.fragments, range(self.graph.count))
        self.graph.join()
        each(self.edges, range(self.graph.count))
        count = self.graph.agglomerate()
        each(self.number, range(self.graph.count))
        assert self.final.max() == count
        return self.final


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_division_into_blocks_gives_the_bytes_of_the_whole(case, block, tmp_path):
    heads, source = CASES[case]()
    mask = mask_of(SHAPE)
    whole = instances_of(heads, source, mask)
    assert len(np.unique(whole)) > 8
    assert not whole[~mask].any()
    np.testing.assert_array_equal(Run(heads, source, block, tmp_path, mask)(), whole)


@pytest.mark.parametrize("case", ["walls", "affinities", "foreground"])
def test_one_instance_that_fills_the_volume_is_warned_of(case, tmp_path, caplog):
    heads, source = CASES[case]()
    Run(heads, source, SHAPE, tmp_path / "parted")()
    assert not caplog.records
    walls = source.rules.boundary
    weak = {name: np.full_like(values, 255 * (name != walls)) for name, values in heads.items()}
    found = Run(weak, source, SHAPE, tmp_path / "weak")()
    assert found.max() == 1
    # A foreground without a gap may well be one object.
    assert ("instances: one of them has 100 % of all voxels" in caplog.text) is (case != "foreground")


def test_a_flat_volume_without_blocks_is_one_instance_or_none(tmp_path):
    source = Source(InstanceRules("wall"), (1.0, 1.0))
    for value, count in ((0, 1), (255, 0)):
        heads = {"wall": np.full((1, 40, 50), value, np.uint8)}
        for block in ((40, 50), (16, 7)):
            found = Run(heads, source, block, tmp_path / f"{value}-{block}")()
            assert len(np.unique(found)) == 1
            assert found.max() == count


@pytest.mark.parametrize("case", ["walls", "affinities"])
def test_order_and_threads_do_not_matter(case, tmp_path):
    heads, source = CASES[case]()
    whole = instances_of(heads, source)

    def shuffled(function, numbers):
        order = list(numbers)
        random.Random(0).shuffle(order)
        list(map(function, order))

    def threads(function, numbers):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(function, numbers))

    for name, each in (("shuffled", shuffled), ("threads", threads)):
        found = Run(heads, source, (8, 16, 16), tmp_path / name)(each)
        np.testing.assert_array_equal(found, whole)


def test_a_step_that_is_interrupted_anywhere_is_repeated_alone(tmp_path):
    heads, source = boundary_case()
    whole = instances_of(heads, source)
    run = Run(heads, source, (16, 16, 32), tmp_path)
    calls = itertools.count(1)

    def stopped():
        if next(calls) % 2 == 0:
            raise KeyboardInterrupt

    stops = 0
    run.cancel = stopped
    while True:
        try:
            found = run()
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= run.graph.count
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("case", ["walls", "affinities", "sheets"])
def test_blocks_are_repeated_alone_after_an_edit(case, tmp_path):
    heads, source = CASES[case]()
    heads = {name: values.copy() for name, values in heads.items()}
    run = Run(heads, source, (12, 11, 12), tmp_path)
    run()
    read, made = run.heads, []

    def counted(box):
        made.append(box)
        return read(box)

    run.heads = counted
    for seed, box in enumerate([(15, 20, 25), (0, 0, 0), (28, 40, 50)]):
        region = tuple(slice(start, start + 2) for start in box)
        for values in heads.values():
            part = values[(slice(None), *region)]
            part[...] = (
                np.random.default_rng(seed).permuted(values[:, :2, :2, :2], axis=None).reshape(part.shape)
            )
            part[:, 0] = values.max()
        made.clear()
        run.graph.forget(region)
        run.graph.forget(region)
        found = run()
        assert 2 <= len(made) < 2 * run.graph.count
        np.testing.assert_array_equal(found, instances_of(heads, source))
    made.clear()
    run()
    assert not made


def direct_bottoms(landscape):
    """Return the bottom of every voxel by following the lowest neighbour across a face, voxel by voxel."""
    shape = landscape.inside.shape

    def rank(place):
        return landscape.height[place], place

    def following(place):
        near = []
        for axis, step in itertools.product(range(3), (-1, 1)):
            there = tuple(n + step * (axis == k) for k, n in enumerate(place))
            if 0 <= there[axis] < shape[axis] and landscape.inside[there]:
                near.append(there)
        best = min(near, key=rank, default=place)
        return best if rank(best) < rank(place) else place

    found = np.full(shape, -1, np.int64)
    for place in map(tuple, np.argwhere(landscape.inside)):
        end = place
        while following(end) != end:
            end = following(end)
        found[place] = np.ravel_multi_index(end, shape)
    return found


def direct_peaks(landscape):
    """Return the free voxels than which no free neighbour is deeper, with free voxels between."""
    free, depth = landscape.free, landscape.depth
    found = free.copy()
    for place in map(tuple, np.argwhere(free)):
        for step in itertools.product((-1, 0, 1), repeat=3):
            there = tuple(a + b for a, b in zip(place, step))
            if any(not 0 <= n < size for n, size in zip(there, free.shape)):
                continue
            between = itertools.product(*({a, b} for a, b in zip(place, there)))
            deeper = (depth[there], place) > (depth[place], there)
            found[place] &= not (deeper and all(free[voxel] for voxel in between))
    return found


def direct_regions(landscape):
    """Return the seed's number for each voxel, by basins and a sorted list of all passes; 0 without a seed."""
    bottoms, peaks = direct_bottoms(landscape), direct_peaks(landscape)
    height, tree, seeded = landscape.height.astype(int), {}, set(bottoms[peaks])
    passes = []
    for place in map(tuple, np.argwhere(landscape.inside)):
        for axis in range(3):
            there = tuple(n + (axis == k) for k, n in enumerate(place))
            if there[axis] < height.shape[axis] and landscape.inside[there]:
                passes.append(
                    (max(height[place], height[there]), place, axis, bottoms[place], bottoms[there])
                )

    def end(bottom):
        while tree.get(bottom, bottom) != bottom:
            bottom = tree[bottom]
        return bottom

    for *_, first, second in sorted(passes):
        u, v = end(first), end(second)
        if u != v and not (u in seeded and v in seeded):
            tree[max(u, v)] = min(u, v)
            if u in seeded or v in seeded:
                seeded.add(min(u, v))
    found = np.zeros(height.shape, np.int64)
    for place in map(tuple, np.argwhere(landscape.inside)):
        root = end(bottoms[place])
        found[place] = (root + 1) * (root in seeded)
    return found


def numbered_by_first(labels):
    """Return labels by the order of their first voxels."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].reshape(labels.shape)


def small_landscape():
    heads, source = boundary_case()
    part = (slice(None), slice(0, 12), slice(0, 20), slice(0, 18))
    mask = mask_of(SHAPE)[part[1:]] & (heads["wall"][0][part[1:]] != 7)
    return source.landscape({"wall": heads["wall"][part]}, mask)


@pytest.mark.parametrize("block", [(12, 20, 18), (5, 9, 7), (12, 20, 1), (1, 1, 1)], ids=str)
def test_fragments_are_parts_of_what_flooding_joins(block):
    """Basins and regions by loops over voxels: a fragment is a union of basins of one region, with one seed at most."""
    landscape = small_landscape()
    shape = landscape.wall.shape
    counts = block_counts(shape, block)
    local, files = np.zeros(shape, np.uint32), {}
    for number in range(int(np.prod(counts))):
        box = block_box(number, shape, block)
        pieces = pieces_of(landscape, box, shape, (0, 0, 0))
        local[box] = pieces.labels
        files[number] = {**vars(pieces), **shell_of(pieces.labels, box, shape)}
    found = join_pieces(lambda number, *_: files[number], shape, block)
    fragment = np.zeros(shape, np.int64)
    for number in files:
        box = block_box(number, shape, block)
        own = found.number[found.offsets[number] : found.offsets[number + 1]]
        fragment[box] = np.concatenate([[0], own])[local[box]]
    inside, bottoms, peaks = landscape.inside, direct_bottoms(landscape), direct_peaks(landscape)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(fragment > 0, inside)
    regions = direct_regions(landscape)
    for inner, outer in ((bottoms, fragment), (fragment, regions)):
        pairs = np.unique(np.stack([inner[inside], outer[inside]]), axis=1)
        assert (
            len(np.unique(pairs[0])) == pairs.shape[1]
        )  # each of the finer division lies in one of the coarser
    for number in range(1, len(found.sizes) + 1):
        chosen = fragment == number
        assert found.sizes[number - 1] == chosen.sum()
        assert found.lowest[number - 1] == landscape.height[chosen].min()
        assert found.seeds[number - 1] == peaks[chosen].sum()
        assert found.bottoms[number - 1] == bottoms[chosen].min()
        assert len(np.unique(bottoms[chosen & np.isin(bottoms, bottoms[peaks])])) <= 1
    assert (np.diff(found.bottoms) > 0).all()
    sums = EdgeSums(fragment.astype(np.uint32), whole_box(fragment))
    sums.add_faces(landscape.wall, landscape.height)
    rows = sums.rows()
    flooded = np.concatenate([[0], flood(lambda: [links_of(rows)], found.seeds)])[fragment]
    np.testing.assert_array_equal(numbered_by_first(flooded), numbered_by_first(regions))
    if block == shape:
        assert len(found.sizes) < len(np.unique(bottoms)) / 2
        assert (found.seeds > 0).all()
    parts, count = ndimage.label(landscape.free)
    assert len(np.unique(parts[peaks])) == count


def test_flooding_gives_each_fragment_to_the_seed_over_the_lowest_pass():
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = 25
        pairs = np.array([pair for pair in itertools.combinations(range(count), 2) if rng.random() < 0.12])
        passes = rng.permutation(10 * len(pairs))[: len(pairs)]
        table = np.zeros((len(pairs) + 1, 7), np.int64)
        table[:-1, :2], table[:-1, 4] = pairs + 1, passes
        table[-1, :2], table[-1, 4] = (1, count), NO_PASS  # distant pairs are no way
        seeds = (rng.random(count) < 0.2).astype(np.int64)
        height = np.full((count, count), np.inf)
        np.fill_diagonal(height, -1)
        height[pairs[:, 0], pairs[:, 1]] = height[pairs[:, 1], pairs[:, 0]] = passes
        for middle in range(count):
            height = np.minimum(height, np.maximum(height[:, [middle]], height[[middle]]))
        links = links_of(rng.permutation(table))
        found = flood(lambda links=links: np.array_split(links, 3), seeds)
        chosen = np.flatnonzero(seeds)
        for number in range(count):
            reached = height[number, chosen]
            if not len(chosen) or np.isinf(reached.min()):
                assert found[number] == 0
            else:
                assert found[number] in found[chosen[reached == reached.min()]]
        assert set(found) - {0} == set(range(1, len(chosen) + 1))


@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_edges_of_regions_are_the_sums_of_those_of_their_fragments(rows, monkeypatch):
    monkeypatch.setattr(edge_tables, "ROWS", rows)
    rng = np.random.default_rng(3)
    pairs = np.array(list(itertools.combinations(range(1, 13), 2)))
    table = np.concatenate([pairs, rng.integers(0, 99, (len(pairs), 5))], axis=1)
    table[:, 4] = (table[:, 4] << FACE_BITS) | rng.integers(0, 99, len(pairs))
    region = rng.integers(0, 4, 12).astype(np.uint32)
    expected = {}
    for row in table:
        u, v = sorted(int(region[n - 1]) for n in row[:2])
        if u and u != v:
            row = [*row[2:4], row[4] >> FACE_BITS, *row[5:]]
            old = expected.setdefault((u, v), [0, 0, 1 << 17, 0, 0])
            expected[u, v] = [a + b if k != 2 else min(a, b) for k, (a, b) in enumerate(zip(old, row))]
    sums = RegionTable()
    for part in np.array_split(table, 5):
        sums.add(part, region)
    found = sums.rows()
    assert [tuple(row[:2]) for row in found] == sorted(expected)
    assert {tuple(row[:2]): list(row[2:]) for row in found} == expected


def direct_rows(labels, wall, height, links=None, affinities=(), offsets=()):
    """Return the rows of the edges by a loop over all pairs of voxels."""
    found = {}

    def add(u, v, columns):
        if u and v and u != v:
            row = found.setdefault((min(u, v), max(u, v)), [0, 0, NO_PASS, 0, 0])
            for column, value in columns.items():
                row[column] = min(row[column], value) if column == 2 else row[column] + value

    shape = labels.shape
    for place in np.ndindex(shape):
        for axis in range(3):
            there = tuple(n + (axis == k) for k, n in enumerate(place))
            if there[axis] < shape[axis]:
                over = max(int(height[place]), int(height[there]))
                if links is not None and links[(axis, *there)]:
                    over = (1 << 16) + int(links[(axis, *there)])
                over = (over << FACE_BITS) + 3 * int(np.ravel_multi_index(place, shape)) + axis
                sums = {} if wall is None else {0: 1, 1: int(wall[place]) + int(wall[there])}
                add(labels[place], labels[there], {**sums, 2: over})
        for values, offset in zip(affinities, offsets):
            there = tuple(a + b for a, b in zip(place, offset))
            if all(0 <= n < size for n, size in zip(there, shape)):
                value = CERTAIN - int(values[place])
                near = sum(map(abs, offset)) == 1
                columns = {0: 1, 1: 2 * value} if near else {3: 1, 4: 2 * value}
                add(labels[place], labels[there], columns)
    rows = [[u, v, *columns] for (u, v), columns in sorted(found.items())]
    return np.array(rows, np.int64)


def test_edges_are_those_of_a_direct_loop():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 9, (5, 6, 7)).astype(np.uint32)
    wall, height = rng.integers(0, CERTAIN + 1, (2, *labels.shape)).astype(np.uint16)
    inside = labels > 0
    landscape = Landscape(wall, inside, inside, height.astype(np.float32), height)
    source = Source(InstanceRules("wall"), (1.0, 1.0, 1.0))
    sums = EdgeSums(labels, whole_box(labels))
    source.add_edges(sums, landscape, {}, whole_box(labels))
    np.testing.assert_array_equal(sums.rows(), direct_rows(labels, wall, height))
    links = rng.integers(0, CERTAIN + 1, (3, *labels.shape)).astype(np.uint16)
    affinities = rng.integers(0, CERTAIN + 1, (len(OFFSETS), *labels.shape)).astype(np.uint16)
    source = Source(InstanceRules(affinities="affs"), (1.0, 1.0, 1.0), OFFSETS)
    sums = EdgeSums(labels, whole_box(labels))
    source.add_edges(
        sums, replace(landscape, links=links), {"affs": affinities / np.float32(CERTAIN)}, whole_box(labels)
    )
    np.testing.assert_array_equal(sums.rows(), direct_rows(labels, None, height, links, affinities, OFFSETS))


def test_many_edges_outgrow_the_first_table():
    rng = np.random.default_rng(2)
    labels = rng.integers(1, 4000, (4, 40, 40)).astype(np.uint32)
    wall, height = rng.integers(0, CERTAIN + 1, (2, *labels.shape)).astype(np.uint16)
    sums = EdgeSums(labels, whole_box(labels))
    sums.add_faces(wall, height)
    assert len(sums.rows()) > 1 << 12
    np.testing.assert_array_equal(sums.rows(), direct_rows(labels, wall, height))


def test_passes_are_numbered_by_the_volume_in_whatever_part_they_are_found():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 30, (6, 7, 8)).astype(np.uint32)
    height = rng.integers(0, 3, labels.shape).astype(np.uint16)  # many equal heights
    whole = {tuple(row[:2]): row[4] for row in direct_rows(labels, height, height)}
    found = {}
    for start in (0, 3):
        part = (slice(start, start + 4), *[slice(None)] * 2)
        owned = (slice(0, 3), slice(0, 7), slice(0, 8))
        sums = EdgeSums(labels[part], owned, (start, 0, 0), labels.shape)
        sums.add_faces(None, height[part])
        for row in sums.rows():
            key = tuple(row[:2])
            found[key] = min(found.get(key, NO_PASS), row[4])
    assert found == whole
    assert len(set(found.values())) == len(found)


def test_a_volume_with_more_faces_than_numbers_is_refused():
    check_faces((20_000, 30_000, 30_000))
    with pytest.raises(VolumenError, match="at most 23456248059221 voxels, found 30000x30000x30000"):
        check_faces((30_000, 30_000, 30_000))


def test_regions_and_their_edges_are_stored_once(tmp_path, monkeypatch):
    """Rows of several blocks, by the places of bottoms: flooded, then added up, as by the rows in memory."""
    monkeypatch.setattr(edge_tables, "LINKS", 70)
    rng = np.random.default_rng(0)
    files = EdgeFiles(tmp_path)
    bottoms, seeds = np.arange(90) * 7 + 3, (rng.random(90) < 0.2).astype(np.int64)
    runs = []
    for number in range(4):
        pairs = np.sort(rng.integers(1, 90, (300 * (number != 2), 2)), axis=1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        run = np.concatenate([pairs, rng.integers(0, 99, (len(pairs), 5))], axis=1)
        run[:, 4] = (run[:, 4] << FACE_BITS) + rng.permutation(len(run)) + 1000 * number
        runs.append(add_rows(run))
        named = runs[-1].copy()
        named[:, :2] = bottoms[named[:, :2] - 1]
        files.save(number, named)
    everything = np.concatenate(runs)
    files.merge(4, bottoms, seeds)
    region = flood(lambda: [links_of(everything)], seeds)
    np.testing.assert_array_equal(files.regions(), region)
    table = RegionTable()
    table.add(everything.copy(), region)
    np.testing.assert_array_equal(files.table(), table.rows())
    assert len(files.table())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["regions.npy", "regions_table.npy", *(f"rows_{number}.npy" for number in range(4))]
    )
    before = files.table()
    files.save(0, named)
    files.merge(4, bottoms, seeds)  # the table exists
    np.testing.assert_array_equal(files.table(), before)
    files.forget(0)
    assert not files.has_table


def rows_of(*edges):
    """Return the table of edges (u, v, faces, mean wall[, pairs, mean wall of pairs])."""
    out = []
    for u, v, faces, mean, *far in edges:
        pairs, beyond = far or (0, 0)
        out.append(
            [u, v, faces, round(2 * CERTAIN * faces * mean), 0, pairs, round(2 * CERTAIN * pairs * beyond)]
        )
    return np.array(out, np.int64)


def test_linkage_is_the_mean_over_all_faces():
    # 1 and 2 merge first; the wall of both towards 3 is then (10 * 0.2 + 90 * 0.7) / 100 = 0.65.
    table = rows_of((1, 2, 5, 0.1), (1, 3, 10, 0.2), (2, 3, 90, 0.7))
    np.testing.assert_array_equal(agglomerate(table, 4, "mean", 0.6), [0, 0, 1, 2])
    np.testing.assert_array_equal(agglomerate(table, 4, "mean", 0.7), [0, 0, 0, 1])


def test_necks_part_whatever_the_size():
    table = rows_of((1, 2, 4, 0.0), (2, 3, 400, 0.0))
    lowest = CERTAIN - np.array([8000, 8000, 40000])
    table[:, 4] = CERTAIN - np.array([6400, 3200])  # depths of the necks: 0.8 and 0.4 of the shallower side
    assert agglomerate(table, 3, "mean", 0.5, lowest, 1).tolist() == [0, 0, 1]
    assert agglomerate(table, 3, "mean", 0.1, lowest, 1).tolist() == [0, 1, 2]
    assert agglomerate(table, 3, "mean", 0.5, lowest, 6).tolist() == [0, 0, 0]
    assert agglomerate(table, 3, "mean", 0.5, lowest).tolist() == [0, 0, 0]


def test_distant_pairs_repel():
    table = rows_of((1, 2, 5, 0.1), (2, 3, 5, 0.2), (1, 3, 0, 0, 50, 0.85))
    np.testing.assert_array_equal(agglomerate(table, 3, "mutex", 0.5), [0, 0, 1])
    np.testing.assert_array_equal(agglomerate(table[:, :], 3, "mutex", 0.9), [0, 0, 0])
    # What does not touch never merges, however alike it is.
    apart = rows_of((1, 2, 0, 0, 9, 0.0), (1, 3, 4, 0.1))
    for how in ("mean", "mutex", "multicut"):
        np.testing.assert_array_equal(agglomerate(apart, 3, how, 0.5), [0, 1, 0])
    assert agglomerate(np.zeros((0, 7), np.int64), 3, "mean", 0.5).tolist() == [0, 1, 2]
