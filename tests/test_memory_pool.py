"""One pool of memory for the threads of a process that reads URLs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
COUNT = """
import ctypes, re, sys, threading
from volumen.utils.memory_pool import share_memory_between_threads
if sys.argv[1] == "share":
    share_memory_between_threads()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=lambda: library.malloc(5000)) for _ in range(3)]
for thread in threads:
    thread.start()
    thread.join()
library.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fopen(sys.argv[2].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
print(len(re.findall("<heap nr=", open(sys.argv[2]).read())))
"""


def pools(folder, word, **environment) -> int:
    """Return the number of glibc's arenas of a process after three of its threads have taken memory."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, word, str(folder / "malloc.xml")],
        env={**os.environ, "PYTHONPATH": str(BUNDLE), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "confstr"), reason="needs glibc")
def test_threads_share_one_pool_and_a_user_s_setting_takes_precedence(tmp_path):
    assert pools(tmp_path, "share") == 1
    assert pools(tmp_path, "leave") > 1
    assert pools(tmp_path, "share", MALLOC_ARENA_MAX="4") > 1
