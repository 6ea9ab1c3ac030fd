"""Freed memory that the process retains: the next step uses it again, and all of it is returned at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
BLOCK = 36 * 2**20  # more than glibc itself ever serves from its heap

# One block at a time, each smaller than the one before, so that the next one fits wherever they are placed.
PROBE = f"""
import ctypes, re, resource, sys
import torch
from volumen.utils.memory import (
    freed_memory_kept, keep_freed_memory, keep_in_worker, limit_kept_memory, return_freed_memory
)

device = torch.device(sys.argv[1])
sizes = iter(range(2 * {BLOCK}, {BLOCK}, -(2**20)))


def resident():
    # Without files: a forked process has the parent's memory from its start, and their pages when it comes to them.
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])


start = resident()


def step():
    '''Fill a block and free it; return what the process holds more than at its start, before and after.'''
    block = torch.ones(next(sizes) // 4)
    full = resident() - start
    del block
    limit_kept_memory()
    return full, resident() - start
"""

LIFE = """
found = [*step()]
with freed_memory_kept(device):
    found += step()
    with freed_memory_kept(device):
        found += step()
    found += step()
found.append(resident() - start)
keep_freed_memory(device)
return_freed_memory(device)
return_freed_memory(device)
keep_freed_memory(device)
found += step()
print(*found)
"""

STANDING = """
keep_freed_memory(device)
print(*step())
"""

# Each block is a page larger than the gaps that earlier ones left; blocks that are never written separate the gaps.
LEAK = f"""
library = ctypes.CDLL(None)
malloc, free = library.malloc, library.free
malloc.argtypes, malloc.restype, free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
keep_freed_memory(device)
most = 0
for turn in range(20):
    size = {BLOCK} + turn * resource.getpagesize()
    block = malloc(size)
    malloc(2 * {BLOCK})
    ctypes.memset(block, 1, size)
    free(block)
    if sys.argv[2] == "limited":
        limit_kept_memory()
    most = max(most, resident() - start)
print(most)
"""

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"),
    reason="malloc is set up for glibc alone",
)


def run(probe: str | None, *arguments: str, script: Path | None = None, **environment: str) -> list[int]:
    clean = {key: value for key, value in os.environ.items() if "MALLOC" not in key and "TUNABLES" not in key}
    finished = subprocess.run(
        [sys.executable, *(["-c", PROBE + probe] if probe else [str(script)]), *arguments],
        env={**clean, "PYTHONPATH": str(BUNDLE), "OMP_NUM_THREADS": "1", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(word) for word in finished.stdout.split()]


@needs_glibc
def test_freed_memory_is_reused_and_returned_at_the_end():
    _, plain, first, kept, *steps, left, again, still = run(LIFE, "cpu")
    assert plain < BLOCK / 2
    assert kept > BLOCK
    assert max(steps) < first + BLOCK / 2
    assert min(steps) > BLOCK
    assert left < BLOCK / 2
    assert still > BLOCK
    assert again < first + BLOCK / 2


@needs_glibc
@pytest.mark.parametrize(
    ("device", "environment"), [("cuda", {}), ("cpu", {"MALLOC_MMAP_MAX_": "65536"})], ids=["cuda", "user"]
)
def test_other_devices_and_settings_of_the_user_stand(device, environment):
    full, freed = run(STANDING, device, **environment)
    assert full > BLOCK
    assert freed < BLOCK / 2


@needs_glibc
def test_memory_stays_bounded_where_blocks_cannot_be_used_again():
    (limited,) = run(LEAK, "cpu", "limited")
    (free,) = run(LEAK, "cpu", "free")
    assert limited < 8 * BLOCK < 16 * BLOCK < free


WORKER = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if sys.argv[4] == "keeping":
            keep_in_worker()
        return step()


if __name__ == "__main__":
    if sys.argv[3] == "kept":
        keep_freed_memory(device)
    loader = torch.utils.data.DataLoader(Data(), None, num_workers=1, multiprocessing_context=sys.argv[2])
    for full, freed in loader:
        print(full, freed)
"""


def of_a_worker(folder: Path, start: str, parent: str, worker: str) -> tuple[list[int], list[int]]:
    script = folder / "script.py"
    script.write_text(PROBE + WORKER)
    found = run(None, "cpu", start, parent, worker, script=script)
    return found[::2], found[1::2]


@needs_glibc
@pytest.mark.parametrize(("start", "parent"), [("fork", "kept"), ("fork", "plain"), ("spawn", "plain")])
def test_workers_keep_memory_however_they_were_started(tmp_path, start, parent):
    full, freed = of_a_worker(tmp_path, start, parent, "keeping")
    assert min(freed) > BLOCK
    assert max(full) < full[0] + BLOCK / 2


@needs_glibc
def test_a_worker_that_requests_nothing_retains_nothing(tmp_path):
    _, freed = of_a_worker(tmp_path, "spawn", "kept", "plain")
    assert max(freed) < BLOCK / 2
