"""Work in threads: every item once, a bounded number ahead of the caller, and an end after any interruption."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from volumen.utils.threads import cores, in_threads

each_number = pytest.mark.parametrize("num_threads", [1, 2, 5])


@each_number
def test_every_item_is_done_once(num_threads):
    assert sorted(in_threads(lambda item: item * item, range(100), num_threads)) == [
        n * n for n in range(100)
    ]
    assert list(in_threads(str, [], num_threads)) == []
    assert list(in_threads(str, [7], num_threads)) == ["7"]


def test_one_thread_is_the_caller_s_and_keeps_the_order():
    here = threading.get_ident()
    assert list(in_threads(lambda item: (item, threading.get_ident()), range(5), 1)) == [
        (item, here) for item in range(5)
    ]


def test_as_many_work_at_once_as_were_asked_for():
    together = threading.Barrier(3, timeout=20)
    assert len(list(in_threads(lambda _: together.wait(), range(9), 3))) == 9


@each_number
def test_a_caller_that_waits_finds_few_items_done_ahead(num_threads):
    begun = []
    results = in_threads(begun.append, range(1000), num_threads)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= (4 * num_threads if num_threads > 1 else 1)
    results.close()


@each_number
def test_the_first_error_is_raised_and_ends_the_work(num_threads):
    begun = []

    def job(item):
        begun.append(item)
        if item == 3:
            raise ValueError("item 3")
        return item

    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(job, range(1000), num_threads))
    assert len(begun) < 100


def test_what_has_not_begun_when_the_caller_leaves_never_does(monkeypatch):
    leaving, begun, before = threading.Event(), [], set(threading.enumerate())
    shutdown = ThreadPoolExecutor.shutdown

    def shut_down(pool, wait=True, **options):
        shutdown(pool, wait=False, **options)
        leaving.set()
        shutdown(pool, wait=wait)

    def job(item):
        begun.append(item)
        if item:
            leaving.wait(20)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down)
    results = in_threads(job, range(1000), 2)
    next(results)
    results.close()
    assert set(begun) <= {0, 1, 2}
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs a system that binds processes to cores"
)
def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert cores() == len(allowed)
