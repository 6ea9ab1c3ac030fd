"""HDF5, MRC and NRRD: files of other libraries, read by region, with the stated voxel size, place and axes."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest

from volumen.data.formats.detection import detect_format
from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover, open_cases
from volumen.utils.errors import VolumenError

h5py = pytest.importorskip("h5py")
mrcfile = pytest.importorskip("mrcfile")
nrrd = pytest.importorskip("nrrd")

SHAPE = (9, 11, 13)


def values(shape=SHAPE, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def check(volume, expected):
    """Compare a volume with an array (channels, *space): whole, by regions, after pickling."""
    whole = tuple(slice(0, n) for n in volume.shape)
    assert volume.shape == expected.shape[1:]
    assert volume.channels == len(expected)
    np.testing.assert_array_equal(volume.read(whole), expected)
    assert volume.read(whole).dtype == volume.dtype
    rng = np.random.default_rng(1)
    again = pickle.loads(pickle.dumps(volume))
    assert again.fingerprint() == volume.fingerprint()
    for _ in range(10):
        starts = [int(rng.integers(0, n)) for n in volume.shape]
        region = tuple(slice(a, int(rng.integers(a, n + 1))) for a, n in zip(starts, volume.shape))
        np.testing.assert_array_equal(again.read(region), expected[(slice(None), *region)])


def write_h5(path, datasets, **settings):
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array, **settings)
    return path


# HDF5


@pytest.mark.parametrize("settings", [{}, {"chunks": (4, 5, 6)}, {"chunks": True, "compression": "gzip"}])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float16", "bool", ">u2"])
def test_a_dataset_of_hdf5_is_read_by_region(tmp_path, settings, dtype):
    array = values(dtype=dtype)
    path = write_h5(tmp_path / "a.h5", {"some/where": array}, **settings)
    expected = array.astype(np.uint8) if dtype == "bool" else array.astype(np.dtype(dtype).newbyteorder("="))
    check(open_volume(path), expected[None])
    assert detect_format(path) == "hdf5"


def test_a_filter_of_hdf5plugin_is_known(tmp_path):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    array = values()
    check(open_volume(write_h5(tmp_path / "a.h5", {"raw": array}, **hdf5plugin.Blosc())), array[None])


def test_a_dataset_may_be_named(tmp_path):
    first, second = values(seed=1), values((5, 6, 7), seed=2)
    path = write_h5(tmp_path / "a.h5", {"one": first, "group/two": second})
    check(open_volume(f"{path}:/group/two"), second[None])
    with pytest.raises(VolumenError, match=r"/group/two \(5, 6, 7\)"):
        open_volume(f"{path}:/three")


def test_several_candidates_are_listed_and_not_guessed(tmp_path):
    path = write_h5(tmp_path / "a.h5", {"one": values(), "two": values()})
    with pytest.raises(VolumenError, match=r"expected one volume, found /one \(9, 11, 13\), /two") as caught:
        open_volume(path)
    assert "a.h5:/one" in str(caught.value)


def test_cremi_s_file_holds_an_image_and_a_label(tmp_path):
    raw, ids = values(), values(dtype="uint64", seed=3)
    path = write_h5(tmp_path / "a.h5", {"volumes/raw": raw, "volumes/labels/neuron_ids": ids})
    with h5py.File(path, "a") as file:
        file["volumes/raw"].attrs["resolution"] = (40.0, 4.0, 4.0)
        file["volumes/labels/neuron_ids"].attrs["resolution"] = (40.0, 4.0, 4.0)
        file["volumes/labels/neuron_ids"].attrs["offset"] = (80.0, 8.0, 8.0)
    image, label = open_volume(path), open_volume(path, labels=True)
    check(image, raw[None])
    check(label, ids[None])
    assert (image.spacing, image.unit) == ((40.0, 4.0, 4.0), "nanometer")
    assert label.geometry.origin == (80.0, 8.0, 8.0)


def test_a_resolution_without_units_is_a_number_without_a_unit(tmp_path):
    path = write_h5(tmp_path / "a.h5", {"raw": values(), "other": values((5, 6, 7))})
    with h5py.File(path, "a") as file:
        file["raw"].attrs["resolution"] = (40.0, 4.0, 4.0)
        file["other"].attrs["voxel_size"], file["other"].attrs["units"] = (2.0, 1.0, 1.0), "um"
    volume = open_volume(path)
    assert (volume.spacing, volume.unit) == ((40.0, 4.0, 4.0), None)
    other = open_volume(f"{path}:/other")
    assert (other.spacing, other.unit) == ((2.0, 1.0, 1.0), "micrometer")


def test_ilastik_s_axis_tags_and_fiji_s_voxel_size_are_understood(tmp_path):
    array = values((1, 9, 11, 13, 2))
    path = write_h5(tmp_path / "a.h5", {"exported_data": array})
    with h5py.File(path, "a") as file:
        axes = [{"key": key, "typeFlags": 2} for key in "tzyxc"]
        file["exported_data"].attrs["axistags"] = json.dumps({"axes": axes})
        file["exported_data"].attrs["element_size_um"] = (0.5, 0.1, 0.2)
    volume = open_volume(path)
    check(volume, np.moveaxis(array[0], -1, 0))
    assert (volume.spacing, volume.unit) == ((0.5, 0.1, 0.2), "micrometer")


def test_levels_of_big_data_viewer_are_levels(tmp_path):
    fine, coarse = values((16, 16, 16), "int16"), values((8, 8, 8), "int16")
    names = {"t00000/s00/0/cells": fine, "t00000/s00/1/cells": coarse, "s00/resolutions": np.ones((2, 3))}
    path = write_h5(tmp_path / "a.h5", names)
    check(open_volume(path), fine[None])
    check(open_volume(path, level=1), coarse[None])
    with pytest.raises(VolumenError, match="a level from 0 to 1"):
        open_volume(path, level=2)
    two = write_h5(tmp_path / "b.h5", {"t00000/s00/0/cells": fine, "t00001/s00/0/cells": fine})
    with pytest.raises(VolumenError, match="expected one volume"):
        open_volume(two)


@pytest.mark.parametrize("kind", ["truncated", "text", "table"])
def test_what_is_no_volume_in_hdf5_is_one_line(tmp_path, kind):
    path = write_h5(tmp_path / "a.h5", {"raw": values((64, 64, 64))})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path = write_h5(tmp_path / "b.h5", {"names": np.array([b"a", b"b"])})
    else:
        path = write_h5(tmp_path / "b.h5", {"row": np.arange(5)})
    with pytest.raises(VolumenError):
        open_volume(path)


def test_a_file_that_another_program_writes_is_one_line(tmp_path):
    import subprocess
    import sys

    path = write_h5(tmp_path / "a.h5", {"raw": values()})
    script = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline()
        with pytest.raises(VolumenError, match=r"a\.h5: is being written by another program"):
            open_volume(path)
        writer.stdin.close()


# MRC


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32", "float16"])
def test_mrc_is_read_by_region(tmp_path, dtype):
    array = (values() % 100).astype(dtype)
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(array)
        file.set_volume()
        file.voxel_size = (2.0, 3.0, 5.0)  # x, y, z
        file.header.origin.x, file.header.origin.y, file.header.origin.z = 10.0, 20.0, 30.0
    volume = open_volume(tmp_path / "a.mrc")
    check(volume, array[None])
    assert (volume.spacing, volume.unit) == ((5.0, 3.0, 2.0), "angstrom")
    assert volume.geometry.origin == (30.0, 20.0, 10.0)
    assert detect_format(tmp_path / "a.mrc") == "mrc"


def test_mrc_with_an_extended_header_big_endian_axes_and_a_single_section(tmp_path):
    array = values(dtype="int16")
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(array)
        file.set_extended_header(np.zeros(300, "V1"))
        file.header.mapc, file.header.mapr, file.header.maps = 3, 2, 1  # columns run along z
    check(open_volume(tmp_path / "a.mrc"), array.transpose(2, 1, 0)[None])
    big = array.astype(">i2")
    with mrcfile.new(tmp_path / "b.mrc") as file:
        file.set_data(big)
    check(open_volume(tmp_path / "b.mrc"), array[None])
    with mrcfile.new(tmp_path / "c.mrc") as file:
        file.set_data(array[0])
    check(open_volume(tmp_path / "c.mrc"), array[:1])


def test_unsigned_bytes_of_imod_are_unsigned(tmp_path):
    array = np.arange(9 * 11 * 13, dtype=np.uint8).reshape(SHAPE)
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(array.view(np.int8))
    content = bytearray((tmp_path / "a.mrc").read_bytes())
    content[152:156] = np.int32(1146047817).tobytes()
    content[156:160] = np.int32(0).tobytes()
    (tmp_path / "a.mrc").write_bytes(content)
    check(open_volume(tmp_path / "a.mrc"), array[None])
    content[156:160] = np.int32(1).tobytes()
    (tmp_path / "b.mrc").write_bytes(content)
    check(open_volume(tmp_path / "b.mrc"), array.view(np.int8)[None])


@pytest.mark.parametrize("kind", ["truncated", "complex", "empty", "stack"])
def test_what_is_no_volume_in_mrc_is_one_line(tmp_path, kind):
    with mrcfile.new(tmp_path / "a.mrc") as file:
        array = values(dtype="float32")
        file.set_data(array.astype(np.complex64) if kind == "complex" else array)
        if kind == "stack":
            file.set_data(values((2, *SHAPE), "float32"))
            file.header.ispg = 401
    if kind in ("truncated", "empty"):
        content = (tmp_path / "a.mrc").read_bytes()
        (tmp_path / "a.mrc").write_bytes(content[: -100 if kind == "truncated" else 500])
    with pytest.raises(VolumenError):
        open_volume(tmp_path / "a.mrc")


# NRRD


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("detached", [False, True])
def test_nrrd_is_read_by_region(tmp_path, encoding, detached):
    array = values(dtype="int16")
    name = tmp_path / ("a.nhdr" if detached else "a.nrrd")
    nrrd.write(str(name), array.T, {"encoding": encoding}, index_order="F", detached_header=detached)
    check(open_volume(name), array[None])
    assert detect_format(name) == "nrrd"


@pytest.mark.parametrize(("space", "signs"), [("left-posterior-superior", (-1, -1, 1)), ("RAS", (1, 1, 1))])
def test_nrrd_states_size_place_and_direction(tmp_path, space, signs):
    array = values()
    steps = np.diag([0.5, 2.0, 3.0])
    header = {
        "space": space, "space directions": steps, "space origin": [10.0, 20.0, 30.0],
        "space units": ["mm", "mm", "mm"],
    }  # fmt: skip
    nrrd.write(str(tmp_path / "a.nrrd"), array.T, header, index_order="F")
    volume = open_volume(tmp_path / "a.nrrd")
    assert (volume.spacing, volume.unit) == ((3.0, 2.0, 0.5), "millimeter")
    flip = np.diag([*signs, 1.0])
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = steps, [10, 20, 30]
    np.testing.assert_allclose(volume.affine, flip @ expected)
    orientation = "SAR" if signs[0] == 1 else "SPL"
    assert volume.geometry.orientation == orientation


def test_a_space_of_several_units_and_an_unnamed_fourth_axis_are_not_guessed(tmp_path):
    header = {"space": "RAS", "space directions": np.eye(3), "space units": ["mm", "um", "mm"]}
    nrrd.write(str(tmp_path / "a.nrrd"), values().T, header, index_order="F")
    volume = open_volume(tmp_path / "a.nrrd")
    assert volume.spacing is None
    assert "different units" in volume.geometry.problem
    for name, shape in (("b", (3, 9, 11, 4)), ("c", (30, 9, 11, 40))):
        nrrd.write(str(tmp_path / f"{name}.nrrd"), values(shape), {}, index_order="F")
        with pytest.raises(VolumenError, match="which axis holds channels"):
            open_volume(tmp_path / f"{name}.nrrd")


def test_a_skewed_space_and_an_unknown_unit_of_nrrd_are_not_guessed(tmp_path):
    header = {"space": "RAS", "space directions": [[1, 0, 0], [0.1, 1, 0], [0, 0, 1]]}
    nrrd.write(str(tmp_path / "a.nrrd"), values().T, header, index_order="F")
    with pytest.raises(VolumenError, match=r"expected space directions at right angles, found .*0\.1, 1, 0"):
        open_volume(tmp_path / "a.nrrd")
    header = {"space": "RAS", "space directions": np.eye(3), "space units": ["parsec"] * 3}
    nrrd.write(str(tmp_path / "b.nrrd"), values().T, header, index_order="F")
    volume = open_volume(tmp_path / "b.nrrd")
    assert volume.spacing is None
    assert volume.geometry.problem == "a space whose unit is 'parsec'"


def test_a_nrrd_lies_where_the_nifti_of_the_same_image_lies(tmp_path):
    import nibabel

    array = values(dtype="int16")
    affine = np.array([[0, 0.7, 0, -5], [-1.1, 0, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(array.T, affine), tmp_path / "a.nii")
    header = {"space": "RAS", "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    nrrd.write(str(tmp_path / "a.nrrd"), array.T, header, index_order="F")
    first, second = open_volume(tmp_path / "a.nii"), open_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-6)
    assert first.geometry.orientation == second.geometry.orientation
    np.testing.assert_allclose(first.geometry.matrix(), second.geometry.matrix(), atol=1e-6)


def test_channels_of_nrrd_have_no_direction(tmp_path):
    array = values((3, *SHAPE))
    header = {
        "space": "RAS",
        "space directions": [[np.nan] * 3, *np.eye(3)],
        "kinds": ["vector"] + ["domain"] * 3,
    }
    nrrd.write(str(tmp_path / "a.nrrd"), array.transpose(0, 3, 2, 1), header, index_order="F")
    check(open_volume(tmp_path / "a.nrrd"), array)


@pytest.mark.parametrize("kind", ["truncated", "missing", "cut"])
def test_what_is_no_volume_in_nrrd_is_one_line(tmp_path, kind):
    if kind == "missing":
        nrrd.write(str(tmp_path / "a.nhdr"), values().T, {"encoding": "raw"}, index_order="F")
        next(path for path in tmp_path.iterdir() if path.suffix != ".nhdr").unlink()
        with pytest.raises(VolumenError, match="is missing"):
            open_volume(tmp_path / "a.nhdr")
        return
    nrrd.write(str(tmp_path / "a.nrrd"), values().T, {"encoding": "raw"}, index_order="F")
    content = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(content[:-50] if kind == "truncated" else content[:30])
    with pytest.raises(VolumenError):
        open_volume(tmp_path / "a.nrrd")


# All of them


def save(path, array):
    if path.suffix == ".h5":
        write_h5(path, {"main": array})
    elif path.suffix == ".mrc":
        with mrcfile.new(path) as file:
            file.set_data(array.astype(np.int16))
    else:
        nrrd.write(str(path), array.T, {}, index_order="F")


@pytest.mark.parametrize("suffix", ["h5", "mrc", "nrrd"])
def test_a_data_folder_may_hold_them(tmp_path, suffix):
    for folder, name in (("images", "a"), ("labels", "a_cell"), ("masks", "a_cell")):
        (tmp_path / folder).mkdir(exist_ok=True)
        save(tmp_path / folder / f"{name}.{suffix}", (values() > 100).astype(np.uint8))
    (case,) = open_cases(discover(tmp_path))
    whole = tuple(slice(0, n) for n in SHAPE)
    np.testing.assert_array_equal(case.labels["cell"].read(whole)[0] > 0, values() > 100)
    assert case.image.shape == SHAPE


@pytest.mark.parametrize("suffix", ["h5", "mrc", "nrrd"])
def test_a_missing_library_is_named_with_the_extra(tmp_path, suffix, monkeypatch):
    import sys

    path = tmp_path / f"a.{suffix}"
    save(path, values())
    monkeypatch.setitem(sys.modules, {"h5": "h5py", "mrc": "mrcfile", "nrrd": "nrrd"}[suffix], None)
    with pytest.raises(VolumenError, match=r"volumen\[formats\]"):
        open_volume(path)


@pytest.mark.parametrize("suffix", ["h5", "mrc", "nrrd"])
def test_the_name_of_a_prediction_has_no_suffix(tmp_path, suffix):
    from volumen.inference.jobs import volume_name

    assert volume_name(f"x/brain.{suffix}") == "brain"
    assert volume_name("x/brain.h5:/volumes/raw") == "brain"


def test_a_moved_volume_is_read_at_its_new_place(tmp_path):
    """As for workers in another folder, which get absolute paths."""
    path = write_h5(tmp_path / "a.h5", {"raw": values()})
    volume = open_volume(path)
    (tmp_path / "b").mkdir()
    shutil.move(path, tmp_path / "b" / "a.h5")
    volume.path = f"{tmp_path / 'b' / 'a.h5'}:/raw"
    check(volume, values()[None])
