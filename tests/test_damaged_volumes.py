"""Files with a few bytes changed or cut off: each either reads or is refused in one line that names the file."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from volumen.data.formats.opening import open_volume
from volumen.utils.errors import VolumenError

ARRAY = np.random.default_rng(0).integers(0, 255, (6, 40, 40)).astype("u1")
SCALE = {"type": "scale", "scale": [4, 1, 1]}
MULTISCALE = {
    "axes": [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"],
    "datasets": [{"path": "0", "coordinateTransformations": [SCALE]}],
}


def write_ome(path: Path) -> None:
    group = zarr.open_group(
        path, mode="w", attributes={"ome": {"version": "0.5", "multiscales": [MULTISCALE]}}
    )
    group.create_array("0", data=ARRAY, chunks=(6, 20, 20))


WRITERS = {
    "a.tif": lambda path: tifffile.imwrite(path, ARRAY, photometric="minisblack"),
    "b.tif": lambda path: tifffile.imwrite(path, ARRAY, photometric="minisblack", compression="zlib"),
    "c.tif": lambda path: tifffile.imwrite(
        path, ARRAY, imagej=True, metadata={"axes": "ZYX", "spacing": 2.0}
    ),
    "d.ome.tif": lambda path: tifffile.imwrite(path, ARRAY, tile=(16, 16), metadata={"axes": "ZYX"}),
    "e.nii": lambda path: nibabel.Nifti1Image(ARRAY, np.eye(4)).to_filename(path),
    "f.nii.gz": lambda path: nibabel.Nifti1Image(ARRAY, np.eye(4)).to_filename(path),
    "g.zarr": lambda path: zarr.create_array(path, data=ARRAY, chunks=(6, 20, 20)),
    "h.zarr": lambda path: zarr.create_array(path, data=ARRAY, chunks=(6, 20, 20), zarr_format=2),
    "i.zarr": lambda path: zarr.create_array(path, data=ARRAY, chunks=(6, 10, 10), shards=(6, 20, 20)),
    "j.zarr": write_ome,
}


def damage(content: bytes, rng: random.Random, text: bool) -> bytes:
    """Cut the end off, or change one to five bytes, more often near the start, where headers are."""
    if rng.random() < 0.3:
        return content[: rng.randrange(1, len(content))]
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        end = min(len(changed), 700) if rng.random() < 0.6 else len(changed)
        changed[rng.randrange(end)] = rng.choice(b'0123456789"{}[]:,nulabc') if text else rng.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_damage_is_read_or_refused(tmp_path, caplog, name):
    caplog.set_level(logging.CRITICAL)
    sound = tmp_path / "sound" / name
    sound.parent.mkdir()
    WRITERS[name](sound)
    rng = random.Random(name)
    refusals = []
    for number in range(40):
        target = tmp_path / str(number) / name
        target.parent.mkdir()
        if sound.is_dir():
            shutil.copytree(sound, target)
            files = sorted(path for path in target.rglob("*") if path.is_file())
            described = [path for path in files if path.name in ("zarr.json", ".zarray")]
            file = rng.choice(described if rng.random() < 0.5 else files)
        else:
            shutil.copy(sound, target)
            file = target
        file.write_bytes(damage(file.read_bytes(), rng, file.name in ("zarr.json", ".zarray")))
        try:
            volume = open_volume(target)
            block = volume.read(tuple(slice(0, min(size, 64)) for size in volume.shape))
            assert block.shape[0] == volume.channels
            volume.fingerprint()
        except VolumenError as error:
            refusals.append(str(error))
    assert refusals
    assert all(name in line and "\n" not in line for line in refusals)
