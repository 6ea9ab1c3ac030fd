"""Writes meshes as PLY, OBJ, or a folder of meshes of a precomputed segmentation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from volumen.data.formats.volumes import Volume
from volumen.data.space.units import factor
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically
from volumen.viewing.meshes import Meshes

FORMATS = ("ply", "obj", "precomputed")
MESH_FOLDER = "mesh"


def write_meshes(meshes: Meshes, volume: Volume, output: Path, form: str) -> list[Path]:
    """Write a file per object; return the files.

    PLY and OBJ have the coordinates (X, Y, Z) of the volume's space in its unit (of a scan: right, anterior, superior);
    without a stated voxel size, voxels. Precomputed meshes count nanometers from the low corner of the first voxel's
    place, as Neuroglancer does.

    Args:
        meshes: the meshes.
        volume: their volume, for its place.
        output: folder for PLY and OBJ; the folder of a precomputed segmentation, or one beside it.
        form: one of `FORMATS`.

    Raises:
        VolumenError: nothing to mesh, or a precomputed segmentation with meshes of another name.
    """
    if not meshes.ids:
        raise VolumenError(
            volume.source, expected="an object to mesh", found="none", remedy="choose other --ids"
        )
    output.mkdir(parents=True, exist_ok=True)
    if form == "precomputed":
        return _write_precomputed(meshes, volume, output)
    files = []
    for number in meshes.ids:
        vertices, triangles = meshes.mesh(number)
        places, triangles = _placed(volume, vertices, triangles)
        path = output / f"{number}.{form}"
        write_atomically(path, (ply_bytes if form == "ply" else obj_bytes)(places, triangles, volume.unit))
        files.append(path)
    return files


def _placed(volume: Volume, vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (X, Y, Z) in the volume's space, and triangles with normals to the outside there."""
    geometry = volume.geometry
    if geometry.spacing is None:
        return vertices[:, ::-1], triangles
    if not geometry.is_placed:
        return (vertices * np.array(geometry.spacing))[:, ::-1], triangles
    matrix = geometry.matrix()
    places = vertices @ matrix[:3, :3].T + matrix[:3, 3]
    mirrored = np.linalg.det(matrix[:3, :3]) < 0
    return places[:, ::-1], triangles[:, ::-1] if mirrored else triangles


def ply_bytes(vertices: np.ndarray, triangles: np.ndarray, unit: str | None) -> bytes:
    """Return a binary PLY file of vertices (N, 3), float32, and triangles (M, 3)."""
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment unit {unit or 'unknown'}",
        f"element vertex {len(vertices)}",
        *(f"property float {axis}" for axis in "xyz"),
        f"element face {len(triangles)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    faces = np.empty(len(triangles), np.dtype([("count", "u1"), ("corners", "<i4", 3)]))
    faces["count"], faces["corners"] = 3, triangles
    return ("\n".join(lines) + "\n").encode() + vertices.astype("<f4").tobytes() + faces.tobytes()


def obj_bytes(vertices: np.ndarray, triangles: np.ndarray, unit: str | None) -> bytes:
    """Return an OBJ file of vertices (N, 3) and triangles (M, 3)."""
    lines = [f"# unit {unit or 'unknown'}"]
    lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in vertices]
    lines += [f"f {a} {b} {c}" for a, b, c in triangles + 1]
    return ("\n".join(lines) + "\n").encode()


def _write_precomputed(meshes: Meshes, volume: Volume, output: Path) -> list[Path]:
    """Write meshes in Neuroglancer's format of single resolution, and enter them in the segmentation's `info`."""
    folder = output / MESH_FOLDER
    info_file = output / "info"
    info = json.loads(info_file.read_text()) if info_file.is_file() else None
    if info is not None and info.get("mesh", MESH_FOLDER) != MESH_FOLDER:
        raise VolumenError(
            output, expected="a segmentation without meshes", found=f"meshes in {info['mesh']}"
        )
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "info", json.dumps({"@type": "neuroglancer_legacy_mesh"}).encode())
    files = []
    for number in meshes.ids:
        vertices, triangles = meshes.mesh(number)
        data = np.uint32(len(vertices)).tobytes()
        data += _nanometers(volume, vertices).astype("<f4").tobytes() + triangles.astype("<u4").tobytes()
        write_atomically(folder / f"{number}.bin", data)
        write_atomically(folder / f"{number}:0", json.dumps({"fragments": [f"{number}.bin"]}).encode())
        files.append(folder / f"{number}:0")
    if info is not None and "mesh" not in info:
        write_atomically(info_file, json.dumps({**info, "mesh": MESH_FOLDER}, indent=1).encode())
    return files


def _nanometers(volume: Volume, vertices: np.ndarray) -> np.ndarray:
    """Return vertices (X, Y, Z) in nanometers; the middle of a voxel lies half a voxel behind its number's place."""
    geometry = volume.geometry
    sizes = np.array(geometry.spacing or (1.0,) * 3)
    by = factor(geometry.unit, "nanometer") if geometry.unit else None
    first = np.zeros(3)
    if geometry.is_placed and geometry.frame == "grid":
        first = np.rint(np.array(geometry.origin) / sizes)
    return ((vertices + first + 0.5) * sizes * (by or 1.0))[:, ::-1]
