"""Folds share no voxel, validate every labelled voxel once, share the labels evenly and keep groups together."""

from __future__ import annotations

import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from data_folders import SHORT, shells, write_tiff_folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_split import boxes_overlap, profiles_of

from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.sampling.folds import held_out_groups, make_folds, read_fold
from volumen.data.sampling.groups import find_groups
from volumen.data.sampling.split import MIN_REGION, Split, labelled_profiles, make_split
from volumen.data.sampling.split_file import given_split, split_text
from volumen.utils.errors import VolumenError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def painted(shapes, boxes):
    """How often each voxel of each volume lies in a box."""
    count = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for name, regions in boxes:
        for box in regions:
            count[name][tuple(slice(*span) for span in box)] += 1
    return count


@st.composite
def problems(draw):
    ndim = draw(st.sampled_from([2, 3]))
    sizes = st.integers(1, 40)
    number = draw(st.integers(1, 7))
    shapes = {f"v{i}": tuple(draw(sizes) for _ in range(ndim)) for i in range(number)}
    empty = set(draw(st.lists(st.sampled_from(sorted(shapes)), max_size=2)))
    return shapes, empty, draw(st.integers(2, 6)), draw(st.integers(0, 1000))


@given(problems())
@settings(max_examples=80, deadline=None)
def test_every_labelled_voxel_validates_once_and_never_trains_there(problem):
    shapes, empty, count, seed = problem
    assume(set(shapes) - empty)
    profiles = {
        name: {"t": profiles_of(np.full(shape, name not in empty, np.uint8))}
        for name, shape in shapes.items()
    }
    labelled = [name for name in shapes if name not in empty]
    pieces = count // np.gcd(count, len(labelled)) if len(labelled) < count else 1
    if pieces > 1 and any(max(shapes[name]) < pieces * MIN_REGION for name in labelled):
        with pytest.raises(VolumenError, match="too small to be cut into"):
            make_folds(shapes, count, 0.8, seed, profiles)
        return
    folds = make_folds(shapes, count, 0.8, seed, profiles)
    assert len(folds) == count
    for fold in folds:
        assert fold.val
        assert fold.train
        both = painted(shapes, [*fold.train.items(), *fold.val.items()])
        assert all((times == 1).all() for times in both.values())
        assert not empty & set(fold.val)
        assert Split.from_dict(json.loads(json.dumps(fold.to_dict()))) == fold
        for boxes in (*fold.train.values(), *fold.val.values()):
            assert not any(boxes_overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    validated = painted(shapes, [item for fold in folds for item in fold.val.items()])
    assert all((times == (name not in empty)).all() for name, times in validated.items())
    assert folds == make_folds(dict(reversed(shapes.items())), count, 0.8, seed, profiles)


def test_folds_of_volumes_have_equal_numbers_and_shares():
    # Labels that differ a hundredfold, and a class in three volumes of twelve alone.
    rng = np.random.default_rng(0)
    shapes = {f"v{i:02d}": (20, 20) for i in range(12)}
    profiles = {}
    for number, name in enumerate(shapes):
        label = rng.random((20, 20)) < (0.9 if number % 4 == 0 else 0.05)
        rare = np.zeros((20, 20), bool)
        rare[:2] = number in (0, 1, 2)
        profiles[name] = {"t": profiles_of(label.astype(int)), "t=3": profiles_of(rare.astype(int))}
    folds = make_folds(shapes, 3, 0.8, 0, profiles)
    assert [len(fold.val) for fold in folds] == [4, 4, 4]
    total = {key: sum(p[key][0].sum() for p in profiles.values()) for key in ("t", "t=3")}
    for fold in folds:
        held = {key: sum(profiles[name][key][0].sum() for name in fold.val) / total[key] for key in total}
        assert abs(held["t"] - 1 / 3) < 0.05
        assert held["t=3"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("places", [slice(0, 30), slice(70, 100), slice(None)])
def test_slabs_have_labels_in_every_fold(places):
    label = np.zeros((100, 40, 30), np.uint8)
    label[places] = 1
    folds = make_folds({"a": label.shape}, 4, 0.8, 0, {"a": {"t": profiles_of(label)}})
    held = [sum(label[tuple(slice(*s) for s in box)].sum() for box in fold.val["a"]) for fold in folds]
    assert min(held) > 0.15 * label.sum()


def test_folds_do_not_depend_on_the_patch(tmp_path):
    write_tiff_folder(tmp_path / "data", {"a": {"ink": shells((24, 24, 96))}})

    def split(patch):
        return ConfigManager(
            tr_config={"patch_size": patch},
            dataset_config={"fold": "1/3"},
            dataset_dir=str(tmp_path / "data"),
        ).split

    assert split([8, 8, 8]) == split([24, 24, 24])


def test_groups_stay_together_and_take_their_unlabelled_volumes_along():
    shapes = {f"p{i}_{k}": (16, 16) for i in range(6) for k in range(i % 3 + 1)}
    groups = find_groups(list(shapes), r"^(p\d+)_")
    profiles = {name: {"t": profiles_of(np.full((16, 16), not name.endswith("_1")))} for name in shapes}
    for split in [
        *make_folds(shapes, 3, 0.8, 1, profiles, groups),
        held_out_groups(shapes, 0.7, 1, groups, profiles),
    ]:
        assert not {groups[name] for name in split.val} & {groups[name] for name in split.train}
        assert set(split.val) | set(split.train) == set(shapes)
    with pytest.raises(VolumenError, match=r"at least 7 groups with labels.*found 6: p0, p1, p2, p3, p4"):
        make_folds(shapes, 7, 0.8, 1, profiles, groups)
    alone = dict.fromkeys(shapes, "one")
    with pytest.raises(VolumenError, match="at least 2 groups"):
        held_out_groups(shapes, 0.7, 1, alone, profiles)
    assert held_out_groups(shapes, 1.0, 1, alone, profiles).val == {}


def test_groups_of_a_table(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("\ufeffvolume,site,group\na.nii.gz, x, 1\nb,x,1\nc,y,2\nunused,y,2\n", encoding="utf-8")
    assert find_groups(["a", "b", "c"], str(table)) == {"a": "1", "b": "1", "c": "2"}
    for text, said in (
        ("volume,group\na,1\n", "a row for every volume, also for 'b'"),
        ("volume,patient\na,1\n", "the columns volume and group, found volume, patient"),
        ("volume,group\na,1\na,2\nb,1\n", "puts 'a' into two groups, 1 and 2"),
        ("volume,group\na,1\nb,\n", "a group of 'b'"),
        ("", "found no row"),
    ):
        table.write_text(text)
        with pytest.raises(VolumenError, match=said):
            find_groups(["a", "b"], str(table))
    with pytest.raises(VolumenError, match="cannot be read"):
        find_groups(["a"], str(tmp_path / "none.csv"))
    with pytest.raises(VolumenError, match="finds a group in every name, also in 'b'"):
        find_groups(["p1_a", "b"], r"p(\d)")
    with pytest.raises(VolumenError, match="expected a regular expression"):
        find_groups(["a"], "(")


@pytest.mark.parametrize("bad", ["5/5", "0/1", "7/3"])
def test_a_fold_that_does_not_exist(bad):
    with pytest.raises(VolumenError, match=bad):
        read_fold(bad)


def test_classes_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (9, 7, 11)).astype(np.uint8)
    mask = rng.integers(0, 2, label.shape).astype(np.uint8)
    volume, known = ArrayVolume(label), ArrayVolume(mask)
    case = SimpleNamespace(name="a", labels={"t": volume}, masks={"t": known})
    found = labelled_profiles([case], ["t"], classes={"t": (1, 3)}, objects_only=True, progress=False)["a"]
    for key, where in {"t": label > 0, "t=1": label == 1, "t=3": label == 3}.items():
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            assert np.array_equal(found[key][axis], (where & (mask > 0)).sum(axis=others))


# ---------------------------------------------------------------------------------------------- split files

SHAPES = {"a": (20, 20), "b": (20, 20), "c": (30, 20)}


def read(tmp_path, content, fold=None):
    path = tmp_path / "my_split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return given_split(path, SHAPES, 0.8, 0, fold)


def test_a_split_file_of_a_run_or_of_names(tmp_path):
    own = make_split(SHAPES, (8, 8), 0.6, 4)
    again = read(tmp_path, split_text(own, "f00"))
    assert (again.train, again.val) == (own.train, own.val)
    by_name = read(tmp_path, {"val": ["b"]})
    assert set(by_name.train) == {"a", "c"}
    assert by_name.val == {"b": [((0, 20), (0, 20))]}
    assert set(read(tmp_path, {"train": ["a"], "val": ["b"]}).train) == {"a"}
    mixed = read(tmp_path, {"train": {"c": [[[0, 10], [0, 20]]]}, "val": {"c": [[[10, 30], [0, 20]]]}})
    assert mixed.val == {"c": [((10, 30), (0, 20))]}
    several = [{"train": ["a"], "val": ["b", "c"]}, {"train": ["b"], "val": ["a"]}]
    assert set(read(tmp_path, several, (1, 2)).val) == {"a"}


@pytest.mark.parametrize(
    ("content", "fold", "said"),
    [
        ({"val": ["b", "b"]}, None, "names the volume 'b' twice"),
        ({"val": ["bb"]}, None, "found 'bb'; did you mean b"),
        ({"val": ["a", "b", "c"]}, None, "leaves no image for training"),
        ({"train": ["a", "b"], "val": ["b"]}, None, "which share voxels"),
        ({"val": {"a": [[[0, 21], [0, 20]]]}}, None, r"inside of shape \(20, 20\)"),
        ({"val": {"a": [[[0, 20]]]}}, None, r"inside of shape \(20, 20\)"),
        ({"val": {"a": "whole"}}, None, r"inside of shape \(20, 20\)"),
        ({"val": []}, None, "expected {\"train\""),
        ({"val": "a"}, None, "expected names of volumes"),
        ("{", None, "is not valid JSON"),
        ([{"val": ["a"]}], None, "lists 1 splits"),
        ([{"val": ["a"]}], (0, 2), "expected 2 splits, as --fold says, found 1"),
        ({"val": ["a"]}, (0, 2), "holds one split; leave out --fold"),
    ],
)  # fmt: skip
def test_a_split_file_that_is_wrong(tmp_path, content, fold, said):
    with pytest.raises(VolumenError, match=said):
        read(tmp_path, content, fold)


# ---------------------------------------------------------------------------------------------- settings


def config(root, **data):
    return ConfigManager(dataset_config=data, dataset_dir=str(root))


@pytest.fixture
def root(tmp_path):
    names = ("p1_a", "p1_b", "p2_a", "p3_a")
    return write_tiff_folder(tmp_path / "data", {name: {"ink": shells((16, 16, 16))} for name in names})


def test_the_settings_choose_what_validates(root, tmp_path):
    assert set(config(root, val_volumes=["p1_b", "p3_*"]).split.val) == {"p1_b", "p3_a"}
    assert set(config(root, val_volumes=["p1_b"]).split.train) == {"p1_a", "p2_a", "p3_a"}
    grouped = [config(root, fold=f"{i}/3", group_by="^p[0-9]").split for i in range(3)]
    assert sorted(len(split.val) for split in grouped) == [1, 1, 2]
    assert {"p1_a", "p1_b"} in [set(split.val) for split in grouped]
    (tmp_path / "mine.json").write_text('{"val": ["p2_a"]}')
    split = config(root, split_path=str(tmp_path / "mine.json")).split
    assert set(split.val) == {"p2_a"}
    assert split.rule == "split mine.json"
    one = config(root, group_by="^(p[0-9])", volumes=["p1_a", "p1_b", "p2_a"]).split
    assert set(one.val) in ({"p1_a", "p1_b"}, {"p2_a"})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"val_volumes": ["p1_c"]}, "found 'p1_c'; did you mean p1_"),
        ({"val_volumes": ["p1_a", "p1_*"]}, "names the image 'p1_a' twice"),
        ({"val_volumes": ["p*"]}, "no image is left for training"),
        ({"val_volumes": []}, "names no image"),
        ({"val_volumes": ["p1_a"], "fold": "0/2"}, "dataset_config.fold: contradicts val_volumes"),
        ({"val_volumes": ["p1_a"], "group_by": "p"}, "group_by: has no effect beside val_volumes"),
        ({"fold": "2/2"}, "expected 0/2 to 1/2, found 2/2"),
        ({"fold": "2"}, "expected a fold such as 0/5"),
        ({"fold": "0/5", "group_by": "^p."}, "at least 5 groups with labels.*found 3: p1, p2, p3"),
        ({"split_path": "nowhere.json"}, "nowhere.json: cannot be read"),
    ],
)
def test_settings_that_choose_nothing(root, data, said):
    with pytest.raises(VolumenError, match=said):
        _ = config(root, **data).split


def test_a_resumed_run_keeps_its_fold(root, tmp_path, caplog):
    run = tmp_path / "out" / "model"
    run.mkdir(parents=True)

    def resumed(**data):
        setup = {"resume": True}
        return ConfigManager(
            tr_setup=setup, dataset_config=data, dataset_dir=str(root), output_dir=str(tmp_path / "out")
        )

    first = config(root, fold="0/2")
    (run / "model_split.json").write_text(first.split_text())
    assert resumed(fold="0/2").split == first.split
    assert "stays" not in caplog.text
    assert resumed(fold="1/2").split == first.split
    assert "the split of the resumed run stays" in caplog.text


# ---------------------------------------------------------------------------------------------- several folders


def write(root, names, targets=("ink",)):
    return write_tiff_folder(root, {n: {t: shells((16, 16, 16)) for t in targets} for n in names})


def test_several_folders_are_one_and_names_stay_apart(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one, two = write(tmp_path / "x" / "data", "ab"), write(tmp_path / "y" / "data", "bc")
    both = ConfigManager(dataset_dir=[str(one), f"late={two}"])
    assert [case.name for case in both.cases] == ["a", "data_b", "late_b", "c"]
    assert "b: they are called data_b and late_b" in caplog.text
    paths = {case.name: case.image.path for case in both.cases}
    assert paths["late_b"].startswith(str(two))
    assert [case.name for case in ConfigManager(dataset_dir=[str(one), str(two)]).cases][1:3] == [
        "x_data_b",
        "y_data_b",
    ]
    snapshot = both.snapshot()["dataset_config"]
    assert snapshot["data_path"] == [str(one), f"late={two}"]
    again = ConfigManager(dataset_config=snapshot)
    assert again.split == both.split
    assert again.fingerprint == both.fingerprint
    assert ConfigManager(dataset_dir=f"mine={one}").layout.cases[0].name == "a"


def test_a_folder_for_validation(tmp_path):
    train, val = write(tmp_path / "train", "ab"), write(tmp_path / "val", "bcd")
    split = ConfigManager(dataset_config={"val_path": str(val)}, dataset_dir=str(train)).split
    assert set(split.train) == {"a", "train_b"}
    assert set(split.val) == {"val_b", "c", "d"}
    chosen = {"val_path": str(val), "volumes": ["a", "val_b"]}
    assert set(ConfigManager(dataset_config=chosen, dataset_dir=str(train)).split.val) == {"val_b"}


def test_targets_of_several_folders(tmp_path):
    one, two = write(tmp_path / "one", "a", ("ink",)), write(tmp_path / "two", "b", ("ink", "surface"))
    folders = [str(one), str(two)]
    with pytest.raises(VolumenError, match=r"a.tif: expected a label a_surface"):
        _ = ConfigManager(dataset_dir=folders).cases
    partial = ConfigManager(dataset_config={"allow_unlabeled_data": True}, dataset_dir=folders)
    assert [sorted(case.labels) for case in partial.cases] == [["ink"], ["ink", "surface"]]
    assert [
        sorted(c.labels)
        for c in ConfigManager(dataset_config={"targets": {"ink": {}}}, dataset_dir=folders).cases
    ] == [["ink"]] * 2
    with pytest.raises(VolumenError, match="a label of target 'x'"):
        _ = ConfigManager(dataset_config={"targets": {"x": {}}}, dataset_dir=folders).cases


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["one", "one"], "one is given twice"),
        (["one", "./one/"], "one/? is given twice"),
        (["n=one", "n=two"], "two folders are called 'n' by NAME=FOLDER"),
        (["one", "three"], "three: has no images/ folder"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, folders, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one", "a")
    write(tmp_path / "two", "b")
    with pytest.raises(VolumenError, match=said):
        _ = ConfigManager(dataset_dir=folders).cases


def test_commands(tmp_path, capsys):
    one, two = write(tmp_path / "one", "ab"), write(tmp_path / "two", "b")
    (tmp_path / "nnunet.json").write_text(json.dumps([{"train": ["a"], "val": ["one_b"]}]))
    small = ["--patch-size", "8,8,8", "--set", "model_config.features_per_stage=[4, 8]"]
    assert main(["inspect", str(one), str(two), "--val-volumes", "two_b", *small]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if "16x16x16" in line}
    assert "val" in rows["two_b"]
    assert "train" in rows["one_b"]
    train = ["train", "-i", str(one), "-i", str(two), "-o", str(tmp_path / "out"), "--device", "cpu", *small]
    short = [*SHORT, "--batch-size", "1"]
    assert main([*train, *short, "--split", str(tmp_path / "nnunet.json"), "--fold", "0/1"]) == 2
    assert "at least two folds" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text('{"train": ["a"], "val": ["one_b"]}')
    assert main([*train, *short, "--split", str(tmp_path / "mine.json")]) == 0
    split = json.loads((tmp_path / "out" / "model" / "model_split.json").read_text())
    assert (list(split["train"]), list(split["val"])) == (["a"], ["one_b"])
    tifffile.imwrite(two / "images" / "z.tif", np.zeros((8, 8, 8), np.uint8))
    assert main([*train, *short]) == 2
    assert "z.tif: expected a label z_ink" in capsys.readouterr().err
