"""Boxes to paint of every kind of label, in 2D and 3D, with channels, units and places, and what comes back of them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import zarr
from prediction import make_predictor

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.pairing import Case
from volumen.data.space.geometry import stated_geometry
from volumen.suggestion.accept import accept
from volumen.suggestion.crops import create_volume
from volumen.suggestion.labelled import LabelledImage, Labelling
from volumen.suggestion.record import read_record
from volumen.suggestion.request import AcceptRequest, SuggestRequest
from volumen.suggestion.subject import Subject
from volumen.suggestion.suggest import suggest
from volumen.suggestion.table import measure
from volumen.transforms.normalize import Normalizer

HEADS = {
    "ink": (1, "sigmoid", "binary"),
    "tissue": (3, "softmax", "multiclass"),
    "parts": (2, "sigmoid", "multilabel"),
    "tumour": (2, "sigmoid", "multilabel"),
}
TARGETS = {
    "ink": {"kind": "binary"},
    "tissue": {
        "kind": "multiclass",
        "out_channels": 3,
        "classes": ["none", "grey", "white"],
        "ignore_label": 255,
    },
    "parts": {"kind": "multilabel", "out_channels": 2},
    "tumour": {"regions": {"whole": [1, 2], "core": [2]}, "region_values": [1, 2], "ignore_label": 9},
}
VALUES = {"ink": (0, 1), "tissue": (0, 1, 2, 255), "parts": (0, 1), "tumour": (0, 1, 2, 9)}


def write_data(root, shape, channels, geometry):
    """Write an image, and a label of `tissue` that is known in its first half only, by the ignore label."""
    rng = np.random.default_rng(0)
    lead = (channels,) if channels > 1 else ()
    image = create_volume(root / "images" / "a.zarr", shape, np.dtype("uint8"), geometry, channels=channels)
    image[...] = rng.integers(0, 255, (*lead, *shape), np.uint8)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    label[..., shape[-1] // 2 :] = 255
    create_volume(root / "labels" / "a_tissue.zarr", shape, np.dtype("uint8"), geometry)[...] = label
    return label


@pytest.mark.parametrize(
    ("shape", "size", "channels", "geometry"),
    [
        (
            (9, 26, 30),
            (4, 8, 8),
            1,
            stated_geometry((45.0, 4.6, 4.6), "nanometer", origin=(-900.0, 0.5, 1e6)),
        ),
        ((3, 17, 40), (8, 8, 8), 2, stated_geometry(None)),
        ((40, 36), (12, 10), 3, stated_geometry((0.5, 0.25), "micrometer", origin=(7.0, 0.0))),
    ],
    ids=["anisotropic and far away", "thinner than the box, two channels", "2D, colours"],
)
def test_every_kind_of_label_comes_back_as_it_was_painted(
    tmp_path, monkeypatch, shape, size, channels, geometry
):
    predictor = make_predictor(len(shape), (8,) * len(shape), HEADS, channels)
    heads = dict(predictor.targets)
    heads["tumour"] = replace(heads["tumour"], values=(1, 2))
    predictor = replace(predictor, targets=heads, config={"dataset_config": {"targets": TARGETS}})
    monkeypatch.setattr("volumen.suggestion.suggest.load_model", lambda *_, **__: predictor)
    earlier = write_data(tmp_path / "data", shape, channels, geometry)
    folder = tmp_path / "s"
    # All targets but `tissue` are unlabelled everywhere, so any box may be suggested.
    suggest(SuggestRequest("m.pth", str(tmp_path / "data"), str(folder), 3, size, device="cpu", overlap=0.0))
    record = read_record(folder)
    assert len(record.boxes) == 3
    rng = np.random.default_rng(1)
    painted = {}
    for box in record.boxes:
        inside = tuple(slice(*side) for side in box.box)
        for target, values in VALUES.items():
            array = zarr.open_array(folder / "boxes" / box.folder / f"{target}.zarr" / "0", mode="r+")
            assert set(np.unique(array[...])) <= set(values)
            if target == "tissue":
                known = earlier[inside] != 255
                assert np.array_equal(np.asarray(array[...])[known], earlier[inside][known])
            painted[box.rank, target] = rng.choice(values, array.shape).astype(np.uint8)
            array[...] = painted[box.rank, target]
        crop = open_volume(folder / "boxes" / box.folder / "ink.zarr")
        if geometry.origin is not None:
            expected = geometry.moved([start for start, _ in box.box])
            assert crop.geometry.origin == pytest.approx(expected.origin)
            assert crop.geometry.spacing == pytest.approx(expected.spacing)
            assert crop.unit == expected.unit
        (folder / "boxes" / box.folder / "done").touch()
    new = tmp_path / "new"
    report = accept(AcceptRequest(str(folder), str(tmp_path / "data"), str(new)))
    image = open_volume(new / "images" / "a.zarr")
    for target in VALUES:
        label = open_volume(new / "labels" / f"a_{target}.zarr")
        assert label.geometry == image.geometry, "a label states no size that its image does not state"
        values = label.read(tuple(slice(0, n) for n in shape))
        mask_path = new / "masks" / f"a_{target}.zarr"
        assert mask_path.exists() == (target != "tissue"), "the ignore label says it where there was no mask"
        expected = np.zeros_like(values) if target != "tissue" else earlier[None].copy()
        mask = np.zeros(shape, np.uint8)
        new_voxels = 0
        for box in record.boxes:
            inside = tuple(slice(*side) for side in box.box)
            own = painted[box.rank, target]
            own = own if target == "parts" else own[None]
            ignore = {"tissue": 255, "tumour": 9}.get(target)
            written = np.ones(own.shape[1:], bool) if ignore is None else (own != ignore).all(axis=0)
            if target == "tissue":
                written &= earlier[inside] == 255
            expected[(slice(None), *inside)] = np.where(written, own, expected[(slice(None), *inside)])
            mask[inside] = written
            new_voxels += int(written.sum())
        assert np.array_equal(values, expected)
        assert report.new[target] == new_voxels
        if target != "tissue":
            found = open_volume(mask_path).read(tuple(slice(0, n) for n in shape))[0]
            assert np.array_equal(found, mask)
    again = accept(AcceptRequest(str(folder), str(new), str(tmp_path / "newer")))
    assert not any(again.new.values())


class Noise:
    """A volume of random voxels that exists only where it is read."""

    def __init__(self, shape):
        self.shape, self.dtype, self.ndim = shape, np.dtype("uint8"), len(shape)

    def __getitem__(self, region):
        return np.random.default_rng(0).integers(
            0, 255, tuple(part.stop - part.start for part in region), np.uint8
        )


def test_memory_does_not_grow_with_the_volume():
    subject = Subject(make_predictor().targets["ink"], ("ink",))

    def peak(shape):
        volume = LabelledImage(
            Case("a", "a", {}, {}), ArrayVolume(Noise(shape), axes="zyx"), {"ink": Labelling(None)}
        )
        predicted = {"ink": ArrayVolume(Noise(shape), axes="zyx")}
        tracemalloc.start()
        table = measure(volume, predicted, [subject], Normalizer("unit"), (32, 32, 32), block_voxels=1 << 16)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, len(table.corners)

    peak((32, 64, 64))  # compiles
    small, few = peak((32, 128, 128))
    large, many = peak((32, 512, 512))
    assert many > 15 * few
    assert large < small + 400 * many, "16 times the voxels need the table of their boxes only"
