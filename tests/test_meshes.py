"""Meshes of objects: closed, without seams between blocks, in place; read back by other readers."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from test_placement import write_nifti, write_ome

from volumen.cli.main import main
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.utils.errors import VolumenError
from volumen.viewing.mesh_files import write_meshes
from volumen.viewing.meshes import Meshes

pytest.importorskip("zmesh")


def balls(shape=(30, 34, 38)):
    """Return two touching balls, one of which touches the border, and a large number."""
    z, y, x = np.indices(shape)
    labels = np.zeros(shape, np.uint64)
    labels[(z - 12) ** 2 + (y - 16) ** 2 + (x - 12) ** 2 <= 81] = 2**40 + 1
    labels[(z - 4) ** 2 + (y - 16) ** 2 + (x - 26) ** 2 <= 49] = 3
    return labels


def triangles_of(vertices, triangles):
    """Return the triangles as a set of their corners, whatever corner is first."""
    corners = vertices[triangles].tolist()
    return Counter(min(tuple(map(tuple, face[i:] + face[:i])) for i in range(3)) for face in corners)


@pytest.mark.parametrize("block", [7, 10, 13, 16])
def test_meshes_of_blocks_are_the_mesh_of_the_whole(block):
    volume = ArrayVolume(balls())
    with Meshes(volume, block=1000) as whole, Meshes(volume, block=block) as parts:
        assert parts.ids == whole.ids == [3, 2**40 + 1]
        for number in parts.ids:
            assert triangles_of(*parts.mesh(number)) == triangles_of(*whole.mesh(number))


@pytest.mark.parametrize("block", [9, 128])
def test_a_mesh_is_closed_and_encloses_its_object(block):
    labels = balls()
    with Meshes(ArrayVolume(labels), block=block) as meshes:
        for number in meshes.ids:
            vertices, triangles = meshes.mesh(number)
            edges = Counter(
                (int(a), int(b)) for face in triangles for a, b in zip(face, np.roll(face, -1), strict=True)
            )
            # Every edge has two triangles, which run along it in opposite directions.
            assert all(edges[b, a] == count for (a, b), count in edges.items())
            corners = vertices[:, ::-1][triangles]
            signed = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
            voxels = (labels == number).sum()
            assert 0.9 * voxels < signed < voxels
            inside = np.argwhere(labels == number)
            np.testing.assert_allclose(vertices.min(0), inside.min(0) - 0.5)
            np.testing.assert_allclose(vertices.max(0), inside.max(0) + 0.5)


def test_chosen_objects_and_surfaces_of_probabilities():
    labels = balls()
    with Meshes(ArrayVolume(labels), {3, 99}) as meshes:
        assert meshes.ids == [3]
    image = (labels > 0).astype(np.float32) * 0.7
    with Meshes(ArrayVolume(image), threshold=0.5) as surface, Meshes(ArrayVolume((labels > 0) * 1)) as same:
        assert triangles_of(*surface.mesh(1)) == triangles_of(*same.mesh(1))


def read_ply(path):
    data = path.read_bytes()
    head, _, body = data.partition(b"end_header\n")
    count = int(head.split(b"element vertex ")[1].split()[0])
    vertices = np.frombuffer(body, "<f4", 3 * count).reshape(-1, 3)
    faces = np.frombuffer(body[12 * count :], np.dtype([("n", "u1"), ("c", "<i4", 3)]))
    return vertices, faces["c"]


def signed_volume(vertices, triangles):
    corners = vertices.astype(float)[triangles]
    return np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6


def test_files_lie_where_the_volume_lies(tmp_path):
    labels = (balls() == 3).astype(np.uint8)
    inside = np.argwhere(labels)
    write_ome(tmp_path / "a.zarr", labels, (8.0, 4.0, 2.0), translation=(40.0, 80.0, 20.0))
    volume = open_volume(tmp_path / "a.zarr")
    with Meshes(volume) as meshes:
        write_meshes(meshes, volume, tmp_path / "m", "ply")
        write_meshes(meshes, volume, tmp_path / "m", "obj")
    vertices, triangles = read_ply(tmp_path / "m" / "1.ply")
    low = (inside.min(0) - 0.5) * [8, 4, 2] + [40, 80, 20]
    np.testing.assert_allclose(vertices.min(0), low[::-1])
    assert signed_volume(vertices, triangles) == pytest.approx(labels.sum() * 64, rel=0.1)
    lines = (tmp_path / "m" / "1.obj").read_text().splitlines()
    found = np.array([[float(v) for v in line.split()[1:]] for line in lines if line.startswith("v ")])
    np.testing.assert_allclose(found, vertices, rtol=1e-6)
    faces = np.array([[int(v) for v in line.split()[1:]] for line in lines if line.startswith("f ")])
    np.testing.assert_array_equal(faces - 1, triangles)


def test_a_scan_s_mesh_lies_in_its_space_with_normals_to_the_outside(tmp_path):
    labels = (balls() == 3).astype(np.uint8)
    affine = np.array([[0, 0.7, 0, -5], [1.1, 0, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
    assert np.linalg.det(affine[:3, :3]) < 0
    write_nifti(tmp_path / "a.nii", labels, affine)
    volume = open_volume(tmp_path / "a.nii")
    with Meshes(volume) as meshes:
        write_meshes(meshes, volume, tmp_path / "m", "ply")
    vertices, triangles = read_ply(tmp_path / "m" / "1.ply")
    middle = np.argwhere(labels).mean(0)[::-1]
    np.testing.assert_allclose(vertices.mean(0), (affine @ [*middle, 1])[:3], atol=0.5)
    assert signed_volume(vertices, triangles) > 0


def test_precomputed_meshes_belong_to_their_segmentation(tmp_path):
    labels = balls().astype(np.uint32) % 1000
    write_ome(tmp_path / "a.zarr", labels, (8.0, 4.0, 2.0), translation=(40.0, 80.0, 20.0))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "info").write_text(json.dumps({"type": "segmentation", "scales": []}))
    command = [
        "mesh",
        str(tmp_path / "a.zarr"),
        "-o",
        str(tmp_path / "p"),
        "--format",
        "precomputed",
        "--ids",
        "3",
    ]
    assert main(command) == 0
    assert json.loads((tmp_path / "p" / "info").read_text())["mesh"] == "mesh"
    assert json.loads((tmp_path / "p" / "mesh" / "info").read_text()) == {"@type": "neuroglancer_legacy_mesh"}
    (fragment,) = json.loads((tmp_path / "p" / "mesh" / "3:0").read_text())["fragments"]
    data = (tmp_path / "p" / "mesh" / fragment).read_bytes()
    count = int(np.frombuffer(data, "<u4", 1)[0])
    vertices = np.frombuffer(data, "<f4", 3 * count, 4).reshape(-1, 3)
    first = np.array([5, 20, 10])
    low = (np.argwhere(labels == 3).min(0) + first) * [8, 4, 2]  # the low corner of the voxel
    np.testing.assert_allclose(vertices.min(0), low[::-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ids", "a,3"], "--ids: expected numbers, by commas, found 'a,3'"),
        (["--ids", "77"], "expected an object to mesh, found none; choose other --ids"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, words, message):
    write_ome(tmp_path / "a.zarr", balls().astype(np.uint16), (1.0, 1.0, 1.0))
    assert main(["mesh", str(tmp_path / "a.zarr"), "-o", str(tmp_path / "m"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "m").exists()


def test_images_in_2d_and_floats_are_refused():
    with pytest.raises(VolumenError, match=r"expected a volume \(Z, Y, X\) of one channel"):
        Meshes(ArrayVolume(balls()[0]))
    with pytest.raises(VolumenError, match="give --threshold"):
        Meshes(ArrayVolume(balls().astype(np.float32)))
