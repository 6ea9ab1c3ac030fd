"""Volumes in a bucket, served by moto on this machine; skipped where s3fs or moto is not installed."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from test_more_formats import check
from test_volume_formats import values, write_n5, write_precomputed

from volumen.data.formats.opening import open_volume
from volumen.utils.errors import VolumenError

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch):
    """Yield a function that copies a folder into a bucket, and returns its URL."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("scans")

    def put(folder):
        files.put(f"{folder}/", f"scans/{folder.name}/", recursive=True)
        return f"s3://scans/{folder.name}"

    yield put
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_volumes_in_a_bucket_are_read_by_region(tmp_path, bucket):
    array = values()
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1", "preshift_bits": 1, "hash": "identity", "minishard_bits": 1,
        "shard_bits": 1,
    }  # fmt: skip
    write_precomputed(tmp_path / "a", array[None], encoding="raw")
    write_precomputed(tmp_path / "b", array[None], sharding=sharding, encoding="raw")
    write_n5(tmp_path / "c.n5", array)
    zarr.create_array(tmp_path / "d.zarr", data=array, chunks=(8, 8, 8), shards=(16, 16, 16))
    for name in ("a", "b", "c.n5", "d.zarr"):
        check(open_volume(bucket(tmp_path / name)), array[None])
    assert np.array_equal(
        open_volume("precomputed://s3://scans/a").read((slice(0, 2),) * 3)[0], array[:2, :2, :2]
    )
    with pytest.raises(VolumenError, match="s3://scans/none"):
        open_volume("s3://scans/none")
