"""Where errors are: objects at every voxel, places of bridges, holes and cavities, and their tables."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage
from test_label_scores import smooth

from volumen.cli.main import main
from volumen.evaluation import cases as cases_module
from volumen.evaluation.cases import Scale, ScoredCase
from volumen.evaluation.error_places import place_of_object
from volumen.evaluation.html.pictures import planes as planes_module
from volumen.evaluation.html.pictures import views as views_module
from volumen.evaluation.html.pictures.planes import SHOWN, planes_through
from volumen.evaluation.html.pictures.views import views_of
from volumen.evaluation.html.pictures.worst_place import CELL, worst_place
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.metrics import label_scores
from volumen.metrics.label_scores import LabelScores, LabelSettings
from volumen.metrics.objects.numbering import OTHER
from volumen.metrics.objects.places import deepest_error, meeting_place, middle_of
from volumen.metrics.objects.run_length import voxel_lengths

BRIDGE = (slice(12, 24), slice(66, 70), slice(70, 74))
HOLE = (slice(24, 28), slice(100, 106), slice(20, 26))
CAVITY = (slice(76, 82), slice(26, 32), slice(96, 102))


def phantom_of_three_errors():
    """Return two sheets and a ball, and a prediction with a bridge, a hole and a cavity in different windows."""
    z, y, x = np.ogrid[:96, :128, :128]
    truth = ((z >= 8) & (z < 12) | (z >= 24) & (z < 28)) & (y >= 0) & (x >= 0)
    truth = truth | ((z - 79) ** 2 + (y - 29) ** 2 + (x - 99) ** 2 <= 12**2)
    pred = truth.copy()
    pred[BRIDGE], pred[HOLE], pred[CAVITY] = True, False, False
    return pred, truth


def write(path, values, spacing):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".nii"):
        image = nibabel.Nifti1Image(values.T, np.diag([*spacing[::-1], 1.0]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)
    elif path.name.endswith(".tif"):
        tifffile.imwrite(
            path, values, imagej=True, resolution=(1 / spacing[2], 1 / spacing[1]),
            metadata={"axes": "ZYX", "spacing": spacing[0], "unit": "mm"},
        )  # fmt: skip
    else:
        group = zarr.open_group(str(path), mode="w", zarr_format=2)
        group.create_array("0", data=values, chunks=(32, 64, 64))
        steps = [{"type": "scale", "scale": list(spacing)}]
        axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
        group.attrs["multiscales"] = [
            {
                "version": "0.4",
                "axes": axes,
                "datasets": [{"path": "0", "coordinateTransformations": steps}],
            }
        ]


def holds(box, place):
    return all(part.start <= at < part.stop for part, at in zip(box, place, strict=True))


@pytest.mark.parametrize("ending", ["nii", "tif", "zarr"])
def test_the_command_finds_counts_and_locates_a_bridge_a_hole_and_a_cavity(tmp_path, ending):
    pred, truth = phantom_of_three_errors()
    spacing = (2.0, 0.5, 0.5)
    write(tmp_path / "found" / f"a_ink.{ending}", pred.astype(np.uint8), spacing)
    write(tmp_path / "data" / "labels" / f"a_ink.{ending}", truth.astype(np.uint8), spacing)
    report = tmp_path / "report"
    folders = ["-p", str(tmp_path / "found"), "-l", str(tmp_path / "data"), "-o", str(report)]
    assert main(["evaluate", *folders, "--quiet"]) in (0, None)
    told = json.loads((report / "metrics.json").read_text())
    assert [told["mean"][f"ink/b{k}_error"] for k in range(3)] == [1, 1, 1]
    rows = list(csv.DictReader((report / "topology.csv").open()))
    # Windows of 64 voxels: the bridge, the hole and the cavity lie in one each.
    errors = {tuple(int(row[f"b{k}_error"]) for k in range(3)): row for row in rows}
    assert len(rows) == len(errors) == 3
    for error, defect, window in (
        ((-1, 0, 0), BRIDGE, (0, 64, 64)),
        ((0, 1, 0), HOLE, (0, 64, 0)),
        ((0, 0, 1), CAVITY, (64, 0, 64)),
    ):
        row = errors[error]
        assert tuple(int(row[f"low_{axis}"]) for axis in "zyx") == window
        place = [int(row[f"place_{axis}"]) for axis in "zyx"]
        assert holds(defect, place), (error, place)
        lengths = [float(row[f"place_{axis}_length"]) for axis in "zyx"]
        assert lengths == pytest.approx([at * side for at, side in zip(place, spacing)])
        assert row["unit"] == "mm"
        assert float(row["high_x_length"]) == pytest.approx(int(row["high_x"]) * 0.5)
    (merged,) = csv.DictReader((report / "objects.csv").open())
    assert merged["error"] == "merged"
    assert len(merged["parts"].split()) == 2
    assert holds(BRIDGE, [int(merged[f"place_{axis}"]) for axis in "zyx"])
    behind = told["details"]["a"]["ink"][""]
    assert [box["low"] for box in behind["cavities"]["prediction"]] == [[part.start for part in CAVITY]]
    page = (report / "report.html").read_text()
    assert "Merged: one predicted object of 2 true ones" in page
    assert "of each target, those with the largest errors first" in page


def scores_of(pred, truth, side, connectivity="26/6"):
    config = LabelSettings(("objects_merged",), (1.0, 1.0, 1.0), 1.0, connectivity)
    scores = LabelScores(pred.shape, config, side)

    def read(region):
        return pred[region], truth[region], np.ones_like(pred[region])

    for number in np.random.default_rng(0).permutation(len(scores.grid)):
        scores.add(int(number), read)
    return scores.result(read)[1], read


@pytest.mark.parametrize("connectivity", ["26/6", "6/26"])
@pytest.mark.parametrize(
    "region", [np.s_[0:20, 0:24, 0:30], np.s_[7:8, 2:23, 0:30], np.s_[3:14, 11:12, 9:29]]
)
def test_objects_of_a_region_are_those_of_the_whole_volume(connectivity, region):
    pred, truth = smooth(1, (20, 24, 30)), smooth(2, (20, 24, 30))
    details, read = scores_of(pred, truth, 7, connectivity)
    structure = ndimage.generate_binary_structure(3, 3 if connectivity == "26/6" else 1)
    for found, mask in zip(details.numbers.read(region, read), (pred, truth), strict=True):
        expected = ndimage.label(mask, structure)[0][region]
        pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert (0, 0) in pairs
    kept = set(np.unique(details.numbers.read(region, read)[0]).tolist()) - {0}
    some = {min(kept)}
    fewer = details.numbers.only(some, set()).read(region, read)
    whole = details.numbers.read(region, read)
    np.testing.assert_array_equal(fewer[0], np.where(np.isin(whole[0], [0, *some]), whole[0], OTHER))
    assert set(np.unique(fewer[1])) <= {0, OTHER}


@pytest.mark.parametrize("side", [16, 40, 128])
def test_a_merged_object_is_located_at_its_bridge_whatever_the_block(side):
    truth = np.zeros((40, 60, 70), bool)
    truth[4:8], truth[20:24] = True, True
    pred = truth.copy()
    pred[8:20, 37:40, 51:54] = True
    details, read = scores_of(pred, truth, side)
    (error,) = details.errors.merged
    # Through two blocks of 16 voxels the bridge runs, neither of which holds both sheets.
    region = details.blocks["merged", error.number]
    assert holds(region, (14, 38, 52))
    assert region[0].stop - region[0].start == {16: 32, 40: 40, 128: 40}[side]
    place = place_of_object(error, region, partial(details.numbers.read, masks=read), (1.0, 1.0, 1.0))
    assert pred[place]
    assert not truth[place]
    assert place[0] in (13, 14)


def test_the_deepest_error_is_the_middle_of_a_bridge_of_a_hole_and_of_what_stands_alone():
    truth = np.zeros((24, 30, 30), bool)
    truth[4:7], truth[17:20] = True, True
    bridge = truth.copy()
    bridge[7:17, 10:13, 20:23] = True
    assert deepest_error(bridge, truth, (1, 1, 1)) == ((11, 11, 21), 5.0)
    hole = truth.copy()
    hole[4:7, 8:13, 8:13] = False
    place, depth = deepest_error(hole, truth, (10, 1, 1))
    assert place == (5, 10, 10)
    assert depth == 3
    assert deepest_error(truth, truth, (1, 1, 1)) is None
    place, depth = deepest_error(hole & False, truth, (1, 1, 1))
    assert truth[place]
    assert depth == np.inf


def test_distances_to_a_meeting_place_respect_the_spacing():
    rng = np.random.default_rng(0)
    through = ndimage.binary_dilation(rng.random((9, 12, 14)) < 0.05, iterations=2)
    one, other = through & (rng.random(through.shape) < 0.02), through & (rng.random(through.shape) < 0.02)
    spacing = (4.0, 1.0, 0.5)
    place = meeting_place(through, one, other, spacing)
    near = np.maximum(*(ndimage.distance_transform_edt(~part, spacing) for part in (one, other)))
    assert through[place]
    assert near[place] == pytest.approx(near[through].min(), abs=1e-4)
    assert meeting_place(through, one, one & False, spacing) is None
    assert middle_of(np.zeros((2, 2, 2), bool), spacing) is None


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (45.0, 4.6, 4.6), (0.5, 2.0, 1.0)])
def test_voxel_lengths_are_those_of_nested_loops_and_add_up_to_lines(spacing):
    skeleton = np.random.default_rng(0).random((6, 7, 8)) < 0.2
    expected = np.zeros(skeleton.shape)
    places = np.argwhere(skeleton)
    for place in places:
        steps = (places - place)[(np.abs(places - place).max(axis=1) == 1)] * spacing
        expected[tuple(place)] = np.linalg.norm(steps, axis=1).mean() if len(steps) else min(spacing)
    np.testing.assert_allclose(voxel_lengths(skeleton, spacing), expected)
    for step in ((1, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)):
        line = np.zeros((20, 20, 20), bool)
        line[tuple(np.arange(20) * s for s in step)] = True
        assert voxel_lengths(line, spacing).sum() == pytest.approx(
            20 * np.linalg.norm(np.multiply(step, spacing))
        )


@pytest.mark.parametrize(("unit", "words"), [("micrometer", "µm"), (None, "voxels")])
def test_the_expected_run_length_of_a_tube_is_its_length_in_the_unit_of_the_voxels(tmp_path, unit, words):
    """A tube of 40 slices of which the prediction holds two parts of 10 and 26, so (10² + 26²) / 40 slices."""
    truth = np.zeros((40, 15, 15), np.uint8)
    truth[:, 7, 7] = 1
    pred = truth.copy()
    pred[10:14] = 0
    step = 1.0 if unit is None else 0.25
    for folder, values in (("found", pred), ("data/labels", truth)):
        (tmp_path / folder).mkdir(parents=True)
        meta = {"axes": "ZYX"}
        if unit:
            meta |= {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", (step, 0.1, 0.1), strict=True)}
            meta |= {f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}
        tifffile.imwrite(tmp_path / folder / "a_tube.ome.tif", values, ome=bool(unit), metadata=meta)
    request = EvaluateRequest(
        str(tmp_path / "found"),
        str(tmp_path / "data"),
        str(tmp_path / "out"),
        metrics=("expected_run_length",),
    )
    found = evaluate(request)
    assert found.mean["tube/expected_run_length"] == pytest.approx((100 + 676) / 40 * step)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<small>larger; {words}</small>" in page


def test_planes_are_as_large_as_their_voxels_and_cross_at_the_place():
    scale = Scale((45.0, 4.5, 4.5), "nm")
    planes = planes_through((7, 900, 40), (30, 1000, 500), (0, 20, 0), scale)
    assert [plane.words.split(",")[0] for plane in planes] == ["z = 7", "y = 920", "x = 40"]
    for plane, axes in zip(planes, ((1, 2), (0, 2), (0, 1)), strict=True):
        lengths = [(plane.box[axis].stop - plane.box[axis].start) * scale.spacing[axis] for axis in axes]
        assert plane.height / plane.width == pytest.approx(lengths[0] / lengths[1])
        for axis, share in zip(axes, plane.cross[::-1], strict=True):
            part = plane.box[axis]
            assert part.start + share * (part.stop - part.start) == pytest.approx((7, 900, 40)[axis] + 0.5)
            assert part.stop <= (30, 1000, 500)[axis]
        assert max(plane.shape) <= SHOWN
    # The same scale in all three.
    assert planes[0].width / SHOWN == pytest.approx(planes[1].width / SHOWN)


class _Errors(ScoredCase):
    """A case that is read in pieces of its own."""

    def pieces(self):
        for start in range(0, 50, 13):
            yield (slice(start, min(start + 13, 50)), slice(0, 40), slice(0, 40))


class _Shape:
    shape = (50, 40, 40)


def test_the_worst_place_is_found_piece_by_piece():
    errors = np.zeros(_Shape.shape)
    errors[3:6, 3:6, 3:6] = 1
    errors[33:38, 18:22, 35:39] = 1
    case = _Errors("a", "ink", "binary", _Shape(), _Shape(), None, (), 1, 0.0)
    place = worst_place(case, lambda case, box: errors[box])
    assert errors[place] == 1
    assert CELL == 16
    assert place[0] in range(33, 38)
    assert worst_place(case, lambda case, box: 0 * errors[box]) == (25, 20, 20)


def test_instances_beyond_the_first_piece_have_their_boxes_and_places(tmp_path, monkeypatch):
    """An error in the last of several blocks: its box is that of the volume, not of the block."""
    monkeypatch.setattr(cases_module, "DERIVED_SIDE", 16)
    truth = np.zeros((20, 40, 50), np.uint16)
    truth[2:6, 30:34, 20:40], truth[2:6, 34:38, 20:40] = 3, 4
    truth[2:6, 2:6, 2:6] = 9
    pred = np.where(truth == 4, 3, truth)
    pred[truth == 9] = 0
    for folder, values in (("found", pred), ("data/labels", truth)):
        (tmp_path / folder).mkdir(parents=True)
        tifffile.imwrite(tmp_path / folder / "a_cell.tif", values, metadata={"axes": "ZYX"})
    request = EvaluateRequest(
        str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out"), instances=("cell",)
    )
    merged, missed = evaluate(request).details["a"]["cell"][""]["objects"]
    assert (merged["error"], merged["low"], merged["high"]) == ("merged", [2, 30, 20], [6, 38, 40])
    assert merged["place"][1] in (33, 34)
    assert pred[tuple(merged["place"])] == 3
    assert (missed["error"], missed["low"], missed["high"]) == ("missed", [2, 2, 2], [6, 6, 6])
    assert truth[tuple(missed["place"])] == 9


class _Recorded:
    """A volume that notes how many voxels each reading takes."""

    def __init__(self, volume, sizes):
        self._volume, self._sizes = volume, sizes

    def __getattr__(self, name):
        return getattr(self._volume, name)

    def read(self, region):
        self._sizes.append(int(np.prod([part.stop - part.start for part in region])))
        return self._volume.read(region)


def test_pictures_read_planes_and_blocks_and_never_the_volume(tmp_path, monkeypatch):
    monkeypatch.setattr(label_scores, "BLOCK", 16)
    monkeypatch.setattr(cases_module, "DERIVED_SIDE", 16)
    monkeypatch.setattr(cases_module, "PIECE_VOXELS", 16**3)
    monkeypatch.setattr(planes_module, "SHOWN", 40)
    monkeypatch.setattr(views_module, "CLOSE", 40)
    pred, truth = phantom_of_three_errors()
    for folder, values in (("found", pred), ("data/labels", truth)):
        write(tmp_path / folder / "a_ink.tif", values.astype(np.uint8), (2.0, 1.0, 1.0))
    request = EvaluateRequest(
        str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out"), worst=0,
        metrics=("dice", "b0_error@16", "objects_merged"),
    )  # fmt: skip
    evaluation = evaluate(request)
    (case,) = evaluation.scored
    sizes = []
    case = replace(case, prediction=_Recorded(case.prediction, sizes), label=_Recorded(case.label, sizes))
    views = views_of(case, 0.5, evaluation.details["a"]["ink"], evaluation.numbers["a"]["ink"])
    assert [view.legend for view in views] == ["overlap", "overlap", "objects"]
    assert all(len(view.planes) == 3 for view in views)
    assert len(sizes) > 100
    assert max(sizes) <= 17**3 < pred.size / 200
