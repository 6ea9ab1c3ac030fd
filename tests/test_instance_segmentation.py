"""Instances from walls, foreground and affinities: known cells, segmented in one piece and block by block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from instance_cases import cells, predicted, walls
from prediction import make_predictor

from volumen.derived.arrays.affinities import affinities
from volumen.inference.postprocess.blocks import aligned_block
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import instances_of
from volumen.inference.predict import predict
from volumen.inference.record.reproduce import settings_to_reproduce
from volumen.inference.request import PredictRequest
from volumen.inference.rules import InstanceRules, read_rules, resolve_rules
from volumen.inference.settings import request_fields
from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.partition import adapted_rand_error, voi_merge, voi_split
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
