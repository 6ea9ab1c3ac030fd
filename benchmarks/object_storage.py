"""Read patches from a simulated object storage: how many requests in flight does it take to feed a training?

A server on this machine stores a zarr volume and answers each request only after a delay, and all of them together at
no more than a bandwidth. Readers (threads here, processes in a training) read random patches through the same code as
`volumen train` with a URL. A reader requests all chunks of a patch at once, so that a patch of 64^3 in chunks of 64^3
has up to eight requests in flight. The table shows patches and bytes per second by readers, and how many requests the
server had in flight; by Little's law these are rate times delay, until bandwidth or CPU is the limit. One process has
at most 100 connections, the default of aiohttp.

    python benchmarks/object_storage.py [--delay 0.05] [--bandwidth 200] [--readers 1 2 4 8 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))


@dataclass
class Traffic:
    """What the server counts: requests that it answers now and answered at most at once, and totals."""

    now: int = 0
    most: int = 0
    requests: int = 0
    sent: int = 0
    busy: float = 0.0


class Storage:
    """An HTTP server for a folder, with a delay per request and a bandwidth for all of them.

    Args:
        folder: what it serves.
        delay: seconds before each answer.
        bandwidth: bytes per second of all answers together.
    """

    def __init__(self, folder: Path, delay: float, bandwidth: float) -> None:
        self.folder, self.delay, self.bandwidth = folder, delay, bandwidth
        self.traffic = Traffic()
        self._free = 0.0

    async def serve(self, ready: Any) -> None:
        """Serve until the process ends; the port is put into the queue `ready`."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                method, path, _ = line.decode().split(" ", 2)
                await self._answer(writer, method, path, headers)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict) -> None:
        if path == "/traffic":
            body = json.dumps(vars(self.traffic)).encode()
            self.traffic = Traffic(now=self.traffic.now)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            return
        traffic, began = self.traffic, time.monotonic()
        traffic.now += 1
        traffic.most = max(traffic.most, traffic.now)
        traffic.requests += 1
        try:
            await asyncio.sleep(self.delay)
            file = self.folder / path.split("?")[0].lstrip("/")
            if not file.is_file():
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return
            body, status = file.read_bytes(), b"200 OK"
            if "range" in headers:
                first, last = headers["range"].removeprefix("bytes=").split("-")
                start = int(first) if first else len(body) - int(last)
                stop = int(last) + 1 if first and last else len(body)
                body, status = body[start:stop], b"206 Partial Content"
            if method == "HEAD":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            else:
                await self._share_line(len(body))
                traffic.sent += len(body)
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
            await writer.drain()
        finally:
            traffic.now -= 1
            traffic.busy += time.monotonic() - began

    async def _share_line(self, count: int) -> None:
        """Wait until the line has carried all earlier bytes and these."""
        self._free = max(self._free, time.monotonic()) + count / self.bandwidth
        await asyncio.sleep(max(0.0, self._free - time.monotonic()))


def _run(folder: str, delay: float, bandwidth: float, ready: Any) -> None:
    asyncio.run(Storage(Path(folder), delay, bandwidth).serve(ready))


@contextmanager
def storage(folder: Path, delay: float, bandwidth: float) -> Iterator[str]:
    """Run a server in a process of its own; yield its URL."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=_run, args=(str(folder), delay, bandwidth, ready), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ready.get(timeout=60)}"
    finally:
        process.terminate()
        process.join()


def traffic_of(url: str) -> dict[str, float]:
    """Return what the server counted since the last call."""
    from urllib.request import urlopen

    with urlopen(f"{url}/traffic") as answer:
        return json.load(answer)


def write_volume(folder: Path, side: int, chunk: int) -> np.ndarray:
    """Write a smooth volume of bytes as zarr v3 with zstd, and return it."""
    import zarr
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).normal(size=(side,) * 3)
    smooth = gaussian_filter(noise, 1.0)
    values = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    zarr.create_array(folder / "image.zarr", data=values, chunks=(chunk,) * 3)
    return values


def read_patches(url: str, side: int, patch: int, readers: int, patches: int) -> dict[str, Any]:
    """Read random patches with some readers; return rates, and what the server counted.

    The cache of chunks is off: a training on terabytes hardly ever meets a chunk again.
    """
    from volumen.data.caching.block_cache import BLOCKS
    from volumen.data.formats.opening import open_volume

    BLOCKS.resize(0)
    volume = open_volume(f"{url}/image.zarr")
    starts = np.random.default_rng(readers).integers(0, side - patch + 1, (patches, 3)).tolist()
    lock, checked = threading.Lock(), []

    def read(start: list[int]) -> None:
        values = np.asarray(volume.read(tuple(slice(s, s + patch) for s in start)))
        with lock:
            checked.append((start, int(values.sum(dtype=np.int64))))

    volume.read(tuple(slice(0, patch) for _ in range(3)))
    traffic_of(url)
    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, starts))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = traffic_of(url)
    return {
        "patches_per_s": patches / seconds,
        "MB_per_s": found["sent"] / seconds / 1e6,
        "requests_per_patch": found["requests"] / patches,
        "mean_in_flight": found["busy"] / seconds,
        "most_in_flight": found["most"],
        "cpu_ms_per_patch": cpu / patches * 1e3,
        "sums": {tuple(start): total for start, total in checked},
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delay", type=float, default=0.05, help="seconds per request (default: 0.05)")
    parser.add_argument("--bandwidth", type=float, default=200, help="MB per second (default: 200)")
    parser.add_argument("--side", type=int, default=320, help="side of the volume (default: 320)")
    parser.add_argument("--patch", type=int, default=64, help="side of a patch (default: 64)")
    parser.add_argument("--chunk", type=int, default=64, help="side of a chunk (default: 64)")
    parser.add_argument("--patches", type=int, default=48, help="patches per reader (default: 48)")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_volume(Path(folder), arguments.side, arguments.chunk)
        print(f"delay {arguments.delay * 1e3:.0f} ms, {arguments.bandwidth:.0f} MB/s for all")
        print(
            "| readers | patches/s | MB/s | requests per patch | in flight, mean | most | CPU ms per patch |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        with storage(Path(folder), arguments.delay, arguments.bandwidth * 1e6) as url:
            for readers in arguments.readers:
                row = read_patches(url, arguments.side, arguments.patch, readers, arguments.patches * readers)
                print(
                    f"| {readers} | {row['patches_per_s']:.0f} | {row['MB_per_s']:.1f} |"
                    f" {row['requests_per_patch']:.1f} | {row['mean_in_flight']:.1f} |"
                    f" {row['most_in_flight']:.0f} | {row['cpu_ms_per_patch']:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
