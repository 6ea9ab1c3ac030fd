"""The log of finished blocks: whole lines only, read on from where one stopped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from volumen.inference.output.block_log import BlockLog, read_log

BOX = ((0, 4), (8, 12))


def test_what_is_logged_is_read_and_reading_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "log"
    assert [list(part) for part in read_log(path)[:2]] == [[], []]
    log = BlockLog(path)
    log.block(3)
    log.corrupt(BOX)
    blocks, corrupt, end = read_log(path)
    assert (list(blocks), corrupt, end) == ([3], [BOX], path.stat().st_size)
    log.block(12)
    log.close()
    assert [list(part) for part in read_log(path, end)[:2]] == [[12], []]
    assert list(read_log(path)[0]) == [3, 12]
    assert read_log(path, path.stat().st_size)[2] == path.stat().st_size


def test_a_line_that_a_kill_cut_short_neither_counts_nor_spoils_the_next(tmp_path):
    path = tmp_path / "log"
    for whole, cut in ((b"", b"1"), (b"7\n", b"1"), (b"7\n8\n", b"corrupt [[0, 4], [8, 1")):
        path.write_bytes(whole + cut)
        blocks, corrupt, end = read_log(path)
        assert (list(blocks), corrupt, end) == ([int(line) for line in whole.split()], [], len(whole))
        log = BlockLog(path)
        log.block(25)
        log.close()
        assert path.read_bytes() == whole + b"25\n"


def test_a_whole_log_is_continued_and_threads_do_not_mix_lines(tmp_path):
    path = tmp_path / "log"
    for first in (0, 500):
        log = BlockLog(path)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(log.block, range(first, first + 500)))
        log.close()
    assert sorted(read_log(path)[0]) == list(range(1000))
