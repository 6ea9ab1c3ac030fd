"""Instances from walls, foreground and affinities: known cells, segmented in one piece and block by block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from instance_cases import cells, nuclei, predicted, walls
from prediction import make_predictor
from scipy import ndimage

from volumen.derived.arrays.affinities import affinities
from volumen.derived.arrays.descriptors import local_shape_descriptors
from volumen.derived.arrays.instance_distance import instance_distance
from volumen.inference.postprocess.blocks import aligned_block
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import instances_of
from volumen.inference.postprocess.instance_output import resolve_request
from volumen.inference.predict import predict
from volumen.inference.record.reproduce import settings_to_reproduce
from volumen.inference.request import PredictRequest
from volumen.inference.rules import HEADS, InstanceRules, read_rules, resolve_rules
from volumen.inference.settings import request_fields
from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.errors import object_errors
from volumen.metrics.objects.partition import adapted_rand_error, voi_merge, voi_split
from volumen.phantom.geometry import Roll, sheet_geometry
from volumen.utils.errors import VolumenError

pytest.importorskip("bioimage_cpp", exc_type=ImportError)

OFFSETS = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-5, 0, 0], [0, -5, 0], [0, 0, -5], [0, -5, -5]]


def affinity_maps(labels):
    """Return the affinities at `OFFSETS`; beyond the border, those of the voxels at the border."""
    wide = np.pad(labels, 5, mode="edge")
    found, _ = affinities(wide[None], np.ones(wide.shape, bool), OFFSETS)
    return found[:, 5:-5, 5:-5, 5:-5]


def errors(found, truth):
    counts = overlaps(found, truth)
    return adapted_rand_error(counts), voi_split(counts), voi_merge(counts)


def from_boundary(boundary, inside=None, steps=None, **rules):
    """Return the instances that walls enclose, within a foreground."""
    heads = {"wall": boundary[None]}
    if inside is not None:
        heads["cell"] = inside[None].astype(np.float32)
        rules["foreground"] = "cell"
    return instances_of(heads, Source(InstanceRules("wall", **rules), steps or (1.0,) * boundary.ndim))


def from_affinities(found, offsets=OFFSETS, **rules):
    """Return the instances that affinities describe."""
    source = Source(
        InstanceRules(affinities="affs", **rules), (1.0,) * (found.ndim - 1), tuple(map(tuple, offsets))
    )
    return instances_of({"affs": found}, source)


@pytest.mark.parametrize(
    ("shape", "steps", "count"),
    [((32, 48, 48), (1, 1, 1), 12), ((12, 80, 80), (3, 1, 1), 10), ((110, 100), (1, 1), 20)],
    ids=["isotropic", "thick slices", "2d"],
)
def test_cells_are_found(shape, steps, count):
    truth = cells(shape, count, steps)
    boundary = predicted(walls(truth), 0.1)
    found = from_boundary(boundary, None, steps)
    assert max(errors(found, truth)) < 0.1
    assert (found > 0).all()


def test_foreground_bounds_instances_and_touching_ones_are_parted():
    grid = np.indices((60, 100))
    discs = [np.hypot(grid[0] - 30, grid[1] - x) < 18 for x in (32, 64)]
    inside = discs[0] | discs[1]
    found = from_boundary(1 - inside.astype(np.float32), inside)
    assert found.max() >= 1
    assert not found[~inside].any()
    wall = inside & (np.abs(grid[1] - 48) < 2)
    parted = from_boundary(wall.astype(np.float32), inside)
    assert parted.max() == 2
    assert parted[30, 20] != parted[30, 76]
    assert (parted[inside] > 0).all()


@pytest.mark.parametrize("agglomeration", ["mutex", "mean", "multicut"])
def test_affinities_find_cells(agglomeration):
    truth = cells((24, 48, 48), 20)
    truth[:, :, 44:] = 0
    found = affinity_maps(truth)
    rng = np.random.default_rng(0)
    noisy = np.clip(np.abs(found - 0.3 * rng.random(found.shape)), 0, 1).astype(np.float32)
    whole = from_affinities(noisy, agglomeration=agglomeration)
    assert max(errors(whole, truth)) < 0.05
    assert not whole[:, :, 45:].any()
    exact = from_affinities(found.astype(np.float32), agglomeration=agglomeration)
    assert errors(exact, truth) == (0, 0, 0)


def counts(found, truth):
    """Return how many true objects are broken, merged and missed."""
    wrong = object_errors(overlaps(found, truth))
    return len(wrong.broken), len(wrong.merged), len(wrong.missed)


def rough(shape, size, seed=0):
    """Return smooth noise of a standard deviation."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0)
    return size * noise / noise.std()


@pytest.mark.parametrize("steps", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0)], ids=str)
def test_distances_part_nuclei_that_touch(steps):
    truth = nuclei((round(48 / steps[0]), 96, 96), 40, steps)
    plain, _ = ndimage.label(truth > 0)
    assert counts(plain, truth)[1] > 3
    signed = instance_distance(truth, spacing=steps)[0]
    signed = ndimage.gaussian_filter(signed, [0.7 / step for step in steps]) + rough(truth.shape, 0.3)
    heads = {"depth": signed[None].astype(np.float16)}
    found = instances_of(heads, Source(InstanceRules(distance="depth", min_size=30), steps))
    broken, merged, missed = counts(found, truth)
    assert broken <= 1
    assert merged <= 1
    assert missed == 0


def test_descriptors_part_nuclei_that_touch():
    truth = nuclei((48, 96, 96), 40)
    field = local_shape_descriptors(truth, 4.0, (1.0, 1.0, 1.0))
    heads = {"lsd": field + rough(field.shape, 0.15), "cell": (truth > 0).astype(np.float32)[None]}
    rules = InstanceRules(foreground="cell", descriptors="lsd", min_size=30)
    found = instances_of(heads, Source(rules, (1.0, 1.0, 1.0)))
    assert sum(counts(found, truth)) <= 1
    np.testing.assert_array_equal(found[truth == 0], 0)


@pytest.mark.parametrize("gap", [2, 3, 5, 8])
def test_sheets_that_touch_are_parted_wrap_by_wrap(gap):
    heads, truth = sheets(gap)
    plain, _ = ndimage.label(heads["ink"][0] >= 0.5)
    assert counts(plain, truth)[1] > 0
    rules = InstanceRules(foreground="ink", normals="up", distance="depth", min_size=100)
    found = instances_of(heads, Source(rules, (1.0, 1.0, 1.0)))
    assert counts(found, truth) == (0, 0, 0)


def sheets(gap, shape=(48, 96, 96)):
    """Return simulated heads of a roll beside its axis, and its wraps as instances."""
    roll = replace(
        Roll.draw((96, 320, 320), 0), pitch=3.0 + gap, thickness=3.0, centre=(-40.0, 48.0), squeeze=min(0.3 * gap, 1.5),
        last_turn=round(160 / (3 + gap)),
    )  # fmt: skip
    true = sheet_geometry(roll, shape)
    ink = ndimage.gaussian_filter(1 / (1 + np.exp(true.distance / 0.45)), 1.0)
    normals = np.stack([ndimage.gaussian_filter(part, 1.0) for part in true.normals]) + rough(
        true.normals.shape, 0.15
    )
    heads = {
        "ink": np.clip(1.3 * ink + rough(shape, 0.15, 1), 0, 1)[None].astype(np.float32),
        "up": (normals / np.linalg.norm(normals, axis=0)).astype(np.float16),
        "depth": (ndimage.gaussian_filter(true.distance, 1.0) + rough(shape, 0.3, 2))[None].astype(
            np.float16
        ),
    }
    truth, _ = ndimage.label(true.distance < 0)
    truth[np.bincount(truth.ravel())[truth] < 500] = 0
    return heads, truth


def test_nothing_gives_nothing():
    empty = np.zeros((8, 9, 10), np.float32)
    assert not from_boundary(empty, empty > 0).any()
    assert not from_boundary(empty + 1).any()
    assert (from_boundary(empty) == 1).all()
    assert not from_affinities(np.zeros((3, 8, 9, 10), np.float32), OFFSETS[:3]).any()


def identity_predictor(heads, channels=1):
    """Return a predictor whose heads return the image as logits: 0 is certainly background, 255 foreground."""
    predictor = make_predictor(3, (8, 16, 16), heads, in_channels=channels)
    for convolution in predictor.network.heads.values():
        torch.nn.init.zeros_(convolution.weight)
        torch.nn.init.constant_(convolution.bias, -6.0)
        for channel in range(convolution.weight.shape[0]):
            convolution.weight.data[channel, channel % channels, 2, 2, 2] = 12.0
    return predictor


def write_image(path, values, axes=None):
    array = zarr.create_array(
        path, shape=values.shape, chunks=values.shape, dtype="uint8", dimension_names=axes
    )
    array[...] = values


def test_prediction_writes_instances_beside_their_heads(tmp_path):
    truth = cells((24, 40, 40), 6)
    write_image(tmp_path / "s.zarr", np.rint(255 * predicted(walls(truth), 0.05)).astype(np.uint8))
    predictor = identity_predictor({"membrane": (1, "sigmoid", "binary"), "ink": (1, "sigmoid", "binary")})
    request = PredictRequest(
        str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"), amp="off", threshold=0.5,
        instances=read_rules("membrane"),
    )  # fmt: skip
    predict(request, predictor=predictor)
    root = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert root["labels/membrane_instances/0"].dtype == np.uint32
    whole = from_boundary(root["membrane/0"][...])
    np.testing.assert_array_equal(root["labels/membrane_instances/0"][...], whole)
    assert errors(whole, truth)[0] < 0.1
    assert root["membrane/0"].dtype == np.uint8
    assert len(np.unique(root["membrane/0"][...])) > 2
    assert set(np.unique(root["labels/ink/0"][...])) <= {0, 1}
    coarse = root["labels/membrane_instances/1"][...]
    fine = root["labels/membrane_instances/0"][...]
    cells_of_8 = fine.reshape(12, 2, 20, 2, 20, 2).transpose(0, 2, 4, 1, 3, 5).reshape(12, 20, 20, 8)
    frequency = (cells_of_8[..., None] == coarse[..., None, None]).sum(axis=(-2, -1))
    most = (cells_of_8[..., :, None] == cells_of_8[..., None, :]).sum(axis=-1).max(axis=-1)
    np.testing.assert_array_equal(frequency, most)
    recipe = root.attrs["volumen"]["recipe"]
    again = settings_to_reproduce(recipe)
    assert again["targets"] == ("membrane", "ink")
    assert again["instances"] == request.instances
    assert predict(request, predictor=predictor).volumes[0].already_done
    with pytest.raises(VolumenError, match=r"instances\.min_size was 0, is 50"):
        predict(replace(request, instances=read_rules("boundary=membrane,min_size=50")), predictor=predictor)
    predict(replace(request, instances=None, overwrite=True), predictor=predictor)
    assert not (tmp_path / "p.zarr" / "membrane_instances").exists()


def test_blocks_of_a_prediction_give_files_and_respect_the_mask(tmp_path):
    truth = cells((24, 40, 40), 6)
    write_image(tmp_path / "s.zarr", np.rint(255 * predicted(walls(truth), 0.05)).astype(np.uint8))
    mask = np.ones(truth.shape, np.uint8)
    mask[:, :, 30:] = 0
    write_image(tmp_path / "m.zarr", mask)
    predictor = identity_predictor({"membrane": (1, "sigmoid", "binary")})
    rules = read_rules("boundary=membrane,block=16x16x16,halo=8")
    predict(
        PredictRequest(
            str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.tif"), amp="off", instances=rules,
            mask=str(tmp_path / "m.zarr"),
        ),
        predictor=predictor,
    )  # fmt: skip
    import tifffile

    found = tifffile.imread(tmp_path / "p_membrane_instances.tif")
    assert not found[:, :, 30:].any()
    assert errors(found[:, :, :30], truth[:, :, :30])[0] < 0.3


def test_affinity_heads_are_known_by_their_task(tmp_path):
    truth = cells((16, 32, 32), 8)
    found = affinity_maps(truth)
    values = np.where(found, 255, 0).astype(np.uint8)
    write_image(tmp_path / "s.zarr", values, ["c", "z", "y", "x"])
    predictor = identity_predictor({"affs": (len(OFFSETS), "sigmoid", "multilabel")}, len(OFFSETS))
    predictor.config["auxiliary_tasks"] = {
        "affs": {"type": "affinities", "source_target": "cell", "offsets": OFFSETS}
    }
    request = PredictRequest(
        str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"), amp="off", axes="czyx",
        instances=read_rules("affs"),
    )  # fmt: skip
    predict(request, predictor=predictor)
    root = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert max(errors(root["labels/affs_instances/0"][...], truth)) < 0.1


def test_a_predicted_distance_parts_nuclei_in_any_blocks(tmp_path):
    truth = nuclei((24, 48, 48), 12)
    signed = np.clip(instance_distance(truth)[0], -6, 6)
    write_image(tmp_path / "s.zarr", np.rint(255 * (signed + 6) / 12).astype(np.uint8))
    predictor = identity_predictor({"cell": (1, "none", "distance"), "ink": (1, "sigmoid", "binary")})
    results = []
    for words in ("cell", "distance=cell,block=8x16x16"):
        request = PredictRequest(
            str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"), amp="off", threshold=0.5,
            instances=read_rules(words), overwrite=True,
        )  # fmt: skip
        predict(request, predictor=predictor)
        results.append(zarr.open_array(tmp_path / "p.zarr" / "labels/cell_instances/0", mode="r")[...])
    np.testing.assert_array_equal(*results)
    assert counts(results[0], truth) == (0, 0, 0)
    rules = read_rules("distance=ink")
    with pytest.raises(
        VolumenError, match=r"--instances: expected predicted targets with a distance: cell, found ink"
    ):
        predict(replace(request, instances=rules), predictor=predictor)


@pytest.mark.parametrize(("learned", "foreground"), [("boundary", None), ("foreground", "neuron")])
def test_a_head_of_borders_is_no_foreground(learned, foreground):
    predictor = identity_predictor({"neuron": (1, "sigmoid", "binary"), "lsd": (10, "none", "field")})
    predictor.config["dataset_config"] = {"targets": {"neuron": {"instances": learned}, "other": None}}
    predictor.config["auxiliary_tasks"] = {
        "lsd": {"type": "local_shape_descriptors", "source_target": "neuron"}
    }
    request = PredictRequest("s.zarr", "random.pth", "p.zarr", instances=read_rules("lsd"))
    rules = resolve_request(request, predictor).instances
    assert rules.foreground == foreground
    assert rules.sources == (("neuron", "lsd") if foreground else ("lsd",))


def test_affinities_without_neighbours_are_refused(tmp_path):
    write_image(tmp_path / "s.zarr", np.zeros((8, 16, 16), np.uint8))
    predictor = identity_predictor({"affs": (2, "sigmoid", "multilabel")})
    task = {"type": "affinities", "source_target": "cell", "offsets": [[-1, 0, 0], [0, -3, 0]]}
    predictor.config["auxiliary_tasks"] = {"affs": task}
    request = PredictRequest(
        str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"), instances=read_rules("affs")
    )
    with pytest.raises(
        VolumenError, match=r"affs\.offsets: expected an offset of one voxel along every axis"
    ):
        predict(request, predictor=predictor)
    assert not (tmp_path / "p.zarr").exists()


def test_rules_are_read_from_text_and_mappings():
    rules = read_rules("foreground=cell, boundary=wall, block=8x16x16, merge_threshold=0.3")
    assert rules == InstanceRules("wall", "cell", merge_threshold=0.3, block=(8, 16, 16))
    assert rules.name == "cell_instances"
    assert read_rules(rules.plain()) == rules
    assert read_rules({"affinities": "affs", "foreground": None}).sources == ("affs",)
    assert request_fields({"instances": {"boundary": "wall"}})["instances"] == InstanceRules("wall")
    assert read_rules(None) is None
    task = {"edge": {"type": "boundary", "source_target": "cell"}}
    assert resolve_rules(read_rules("edge"), task).sources == ("cell", "edge")


def test_heads_are_used_by_their_task():
    tasks = {
        "edge": {"type": "boundary", "source_target": "cell"},
        "depth": {"type": "distance_transform", "source_target": "cell"},
        "up": {"type": "surface_normals", "source_target": "cell"},
        "lsd": {"type": "local_shape_descriptors", "source_target": "cell"},
        "other": {"type": "distance_transform", "source_target": "nucleus"},
    }
    kinds = {"cell": "binary", "nucleus": "distance", **dict.fromkeys(tasks, "field")}

    def resolved(words):
        rules = resolve_rules(read_rules(words), tasks, kinds)
        return {key: getattr(rules, key) for key in HEADS if getattr(rules, key) is not None}

    assert resolved("depth") == {"distance": "depth", "foreground": "cell"}
    assert resolved("up") == {"normals": "up", "foreground": "cell"}
    assert resolved("lsd") == {"descriptors": "lsd", "foreground": "cell"}
    assert resolved("nucleus") == {"distance": "nucleus"}
    assert resolved("other") == {"distance": "other"}
    assert resolved("distance=nucleus,boundary=edge") == {
        "distance": "nucleus", "boundary": "edge", "foreground": "cell",
    }  # fmt: skip
    assert resolved("sheets") == {"foreground": "cell", "normals": "up", "distance": "depth"}
    assert resolve_rules(read_rules("sheets"), {}, {"sheets": "binary"}).boundary == "sheets"
    two = {**tasks, "down": {"type": "surface_normals", "source_target": "page"}}
    with pytest.raises(VolumenError, match=r"--instances sheets: expected one label.*found cell, page"):
        resolve_rules(read_rules("sheets"), two, kinds)
    with pytest.raises(VolumenError, match=r"surface_normals.*found none"):
        resolve_rules(read_rules("sheets"), {}, kinds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold=0.5", "instances: expected boundary=TARGET"),
        ("boundary=a,affinities=b", "instances: expected boundary=TARGET"),
        ("boundry=a", "instances.boundry: unknown key"),
        ("boundary=a,threshold=high", "instances.threshold: expected a value like 0.5, found 'high'"),
        ("boundary=a,threshold=2", "instances.threshold: expected a probability"),
        ("boundary=a,block=0x4", "block of at least 1"),
        (
            "boundary=a,agglomeration=men",
            "instances.agglomeration: expected auto, mean, mutex, multicut, found men",
        ),
    ],
)
def test_impossible_rules_are_refused(text, message):
    with pytest.raises(VolumenError, match=message):
        read_rules(text)


def test_a_missing_head_is_refused(tmp_path):
    write_image(tmp_path / "s.zarr", np.zeros((8, 16, 16), np.uint8))
    predictor = identity_predictor({"membrane": (1, "sigmoid", "binary")})
    request = PredictRequest(str(tmp_path / "s.zarr"), "random.pth", str(tmp_path / "p.zarr"), amp="off")
    with pytest.raises(VolumenError, match=r"--instances: expected .*membrane, found cell"):
        predict(replace(request, instances=read_rules("cell")), predictor=predictor)


def test_blocks_are_whole_chunks():
    assert aligned_block((10, 100, 100), (60, 500, 500), (8, 64, 64), 1) == (16, 128, 128)
    assert aligned_block((), (20, 30, 40), (8, 16, 16), 10**9) == (24, 32, 48)
    block = aligned_block((), (400, 4000, 4000), (16, 64, 64), 1 << 21)
    assert np.prod(block) <= 1 << 21
    assert all(b % c == 0 for b, c in zip(block, (16, 64, 64)))
