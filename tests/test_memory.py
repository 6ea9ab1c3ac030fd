"""Freed memory that is kept: a training step clears no page again, and all of it goes back at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
BLOCK = 36 * 2**20  # more than glibc ever serves from its heap by itself

PROBE = f"""
import ctypes, resource, sys
import torch
from scripts.memory import (
    freed_memory_kept, keep_freed_memory, keep_in_worker, limit_kept_memory, return_freed_memory
)

device = torch.device(sys.argv[1])
network = torch.nn.Sequential(torch.nn.GroupNorm(8, 8), torch.nn.LeakyReLU(), torch.nn.GroupNorm(8, 8))
image = torch.ones({BLOCK} // 32 // 32**3 + 1, 8, 32, 32, 32)


def step():
    network(image).sum().backward()
    limit_kept_memory()


def faults():
    found = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[2:])  # of a few blocks the places do not always fit together


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
"""

LIFE = """
found = [faults()]
start = resident()
with freed_memory_kept(device):
    found.append(faults())
    with freed_memory_kept(device):
        pass
    found.append(faults())
found.append(resident() - start)
keep_freed_memory(device)
return_freed_memory(device)
return_freed_memory(device)
keep_freed_memory(device)
found.append(faults())
print(*found)
"""

STANDING = """
before = faults()
keep_freed_memory(device)
print(before, faults())
"""

# An aligned block, and a small one above it that stays: glibc before 2.38 cannot use the room again.
LEAK = f"""
limit = sys.argv[2] == "limited"
allocate = ctypes.CDLL(None).posix_memalign
free, malloc = ctypes.CDLL(None).free, ctypes.CDLL(None).malloc
free.argtypes, malloc.restype = [ctypes.c_void_p], ctypes.c_void_p
keep_freed_memory(device)
most = 0
for _ in range(40):
    block = ctypes.c_void_p()
    assert allocate(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t({BLOCK})) == 0
    malloc(4096)
    ctypes.memset(block, 1, {BLOCK})
    free(block)
    if limit:
        limit_kept_memory()
    most = max(most, resident())
print(most)
"""

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"),
    reason="malloc is set up for glibc alone",
)


def run(probe: str | None, *arguments: str, script: Path | None = None, **environment: str) -> list[int]:
    clean = {key: value for key, value in os.environ.items() if "MALLOC" not in key and "TUNABLES" not in key}
    told = subprocess.run(
        [sys.executable, *(["-c", PROBE + probe] if probe else [str(script)]), *arguments],
        env={**clean, "PYTHONPATH": str(BUNDLE), "OMP_NUM_THREADS": "1", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(word) for word in told.stdout.split()]


@needs_glibc
def test_steps_take_no_new_pages_and_all_goes_back_at_the_end():
    before, inside, nested, left, again = run(LIFE, "cpu")
    assert max(inside, nested, again) < before / 2
    assert left < BLOCK


@needs_glibc
@pytest.mark.parametrize(
    ("device", "environment"), [("cuda", {}), ("cpu", {"MALLOC_MMAP_MAX_": "65536"})], ids=["cuda", "user"]
)
def test_other_devices_and_settings_of_the_user_stand(device, environment):
    before, after = run(STANDING, device, **environment)
    assert after > before / 2 > 0


@needs_glibc
def test_memory_stays_bounded_where_blocks_cannot_be_used_again():
    (limited,) = run(LEAK, "cpu", "limited")
    assert limited < 20 * BLOCK


WORKER = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        keep_in_worker()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(image).sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if __name__ == "__main__":
    if sys.argv[3] == "kept":
        keep_freed_memory(device)
    loader = torch.utils.data.DataLoader(Data(), None, num_workers=1, multiprocessing_context=sys.argv[2])
    print(*list(loader))
"""


@needs_glibc
@pytest.mark.parametrize(("start", "parent"), [("fork", "kept"), ("fork", "plain"), ("spawn", "plain")])
def test_workers_keep_memory_however_they_were_started(tmp_path, start, parent):
    script = tmp_path / "script.py"
    script.write_text(PROBE + WORKER)
    first, *others = run(None, "cpu", start, parent, script=script)
    assert min(others) < first / 4
