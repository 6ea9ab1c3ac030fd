"""Prediction by several processes: the same bytes as by one, whoever dies; who computes what on which device."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from prediction import save_checkpoint

from volumen.inference.distributed.partition import partition_blocks
from volumen.inference.distributed.worker import worker_device
from volumen.inference.output.block_log import STATE_FOLDER, WORKER_LOGS, OutputState, WorkerState, read_log
from volumen.inference.predict import predict
from volumen.inference.record.machine import Machine
from volumen.inference.request import PredictRequest
from volumen.inference.windows.plan import PredictPlan
from volumen.utils.errors import VolumenError

distributed = pytest.importorskip("distributed")


def content(folder) -> dict[str, str]:
    """Return a hash per file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def scheduler():
    """Return the address of a scheduler with two workers, which are threads here: nothing is imported again."""
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
    ) as cluster:
        yield cluster.scheduler_address


def make_request(folder: Path, ndim: int, **settings) -> PredictRequest:
    shape = (13, 24, 37) if ndim == 3 else (40, 53)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    zarr.create_array(folder / "scroll.zarr", data=image, chunks=(8,) * ndim)
    checkpoint = save_checkpoint(folder / "model_3.pth", ndim, (8,) * ndim)
    return PredictRequest(
        str(folder / "scroll.zarr"), str(checkpoint), str(folder / "one.zarr"),
        amp="off", device="cpu", targets=("ink", "normals"), **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("ndim", "batch_size"), [(2, 1), (3, 3)])
def test_workers_write_the_bytes_of_a_single_process(scheduler, tmp_path, ndim, batch_size):
    request = make_request(tmp_path, ndim, batch_size=batch_size)
    alone = predict(request).volumes[0]
    told = []
    shared = replace(request, output=str(tmp_path / "two.zarr"), scheduler=scheduler, nworkers=2)
    report = predict(shared, progress=lambda *state: told.append(state)).volumes[0]
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")
    assert report.blocks == alone.blocks
    assert report.windows > alone.windows  # those where pieces meet
    _, done, windows = [state for state in told if state[0] == "scroll"][-1]
    assert done == windows <= report.windows  # more where a batch holds windows that nobody needs
    assert predict(shared).volumes[0].already_done


def test_several_volumes_are_predicted_at_once_and_reported_in_order(scheduler, tmp_path):
    request = replace(make_request(tmp_path, 2), input=str(tmp_path / "images"))
    (tmp_path / "images").mkdir()
    for name in "abc":
        image = np.random.default_rng(ord(name)).integers(0, 256, (17, 30), dtype=np.uint8)
        zarr.create_array(tmp_path / "images" / f"{name}.zarr", data=image, chunks=(8, 8))
    predict(replace(request, output=str(tmp_path / "alone")))
    report = predict(replace(request, output=str(tmp_path / "shared"), scheduler=scheduler))
    assert [Path(volume.output).name for volume in report.volumes] == ["a.zarr", "b.zarr", "c.zarr"]
    assert content(tmp_path / "alone") == content(tmp_path / "shared")


def test_the_bundle_shares_too(scheduler, tmp_path):
    from test_inference_bundle import run

    request = make_request(tmp_path, 2)
    for name, address in (("alone", None), ("shared", scheduler)):
        run(
            "inference.yaml",
            dataset_dir=request.input,
            output_dir=str(tmp_path / name),
            checkpoint=request.checkpoint,
            **{"device#name": "cpu", "inference_config#scheduler": address},
        )
    assert content(tmp_path / "alone") == content(tmp_path / "shared")
    assert (tmp_path / "alone" / "scroll.zarr" / "zarr.json").exists()


class Stop(Exception):
    """Stands for whatever ends a run in the middle."""


@pytest.mark.parametrize("first_shared", [True, False])
def test_what_workers_began_one_process_ends_and_the_reverse(scheduler, tmp_path, monkeypatch, first_shared):
    request = make_request(tmp_path, 2)
    predict(request)
    alone = replace(request, output=str(tmp_path / "two.zarr"))
    shared = replace(alone, scheduler=scheduler)
    with monkeypatch.context() as patch:
        if first_shared:
            record_box = OutputState.record_box

            def stop_after(self, blocks):
                record_box(self, blocks)
                raise Stop

            patch.setattr(OutputState, "record_box", stop_after)
        else:
            count = itertools.count()
            record = OutputState.record

            def stop_later(self, block):
                record(self, block)
                if next(count) == 9:
                    raise Stop

            patch.setattr(OutputState, "record", stop_later)
        with pytest.raises(Stop):
            predict(shared if first_shared else alone)
    assert any(read_log(tmp_path / "two.zarr" / STATE_FOLDER / "blocks")[0])
    report = predict(alone if first_shared else shared).volumes[0]
    assert not report.already_done
    assert report.blocks < 35
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")


def test_a_mistake_found_by_a_worker_is_one_line(scheduler, tmp_path):
    request = make_request(tmp_path, 2)
    (tmp_path / "scroll.zarr" / "c" / "2" / "3").write_bytes(b"not a chunk")
    shared = replace(request, scheduler=scheduler)
    with pytest.raises(VolumenError, match=r"scroll\.zarr.*--on-corrupt skip"):
        predict(shared)
    predict(replace(shared, on_corrupt="skip"))
    predict(replace(request, on_corrupt="skip", output=str(tmp_path / "two.zarr")))
    attributes = zarr.open_group(request.output, mode="r").attrs["volumen"]
    assert attributes["corrupt"] == [[[16, 24], [24, 32]]]
    assert content(request.output) == content(tmp_path / "two.zarr")


def test_a_scheduler_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("volumen.inference.distributed.cluster.CONNECT_SECONDS", 0.5)
    with pytest.raises(VolumenError, match=r"127\.0\.0\.1:9: no Dask scheduler answers"):
        predict(make_request(tmp_path, 2, scheduler="tcp://127.0.0.1:9"))
    assert not (tmp_path / "one.zarr").exists()


@pytest.mark.slow
def test_blocks_of_a_killed_worker_are_made_by_others(tmp_path):
    request = make_request(tmp_path, 3)
    predict(request)
    shared = replace(request, output=str(tmp_path / "two.zarr"), nworkers=2)
    killed = []

    def kill() -> None:
        """Kill the process that wrote the first line of a journal."""
        logs = tmp_path / "two.zarr" / STATE_FOLDER / WORKER_LOGS
        while not killed:
            for path in logs.glob("*"):
                if path.stat().st_size:
                    killed.append(int(path.name.rsplit("-", 2)[1]))
                    os.kill(killed[0], signal.SIGKILL)
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    predict(shared)
    killer.join(1)
    assert killed
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")


@pytest.mark.parametrize("shape", [(40, 53), (13, 24, 37), (8, 8), (200, 300)])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_pieces_hold_every_unfinished_block_once_and_know_their_windows(shape, workers):
    plan = PredictPlan(
        shape, (8,) * len(shape), 0.5, block_shape=(8,) * len(shape), tile=(1, 3, 3)[: len(shape)]
    )
    done = np.random.default_rng(0).random(plan.blocks) < 0.4
    owners = np.zeros(plan.blocks, dtype=int)
    pieces = partition_blocks(plan, workers, done)
    for piece in pieces:
        owners[piece.slices] += 1
        inside = set(itertools.product(*(range(first, stop) for first, stop in piece.blocks)))
        if plan.shape != (200, 300):
            touching = [p for p in range(len(plan)) if inside & {block for block, _, _ in plan.parts(p)}]
            assert piece.windows == len(touching)
    assert owners.max(initial=0) <= 1
    assert (owners[~done] == 1).all()
    assert len(partition_blocks(plan, workers, np.ones(plan.blocks, bool))) == 0


def test_cutting_costs_little_where_volumes_are_large():
    plan = PredictPlan((4096,) * 3, (128,) * 3, 0.5, block_shape=(128,) * 3)
    pieces = partition_blocks(plan, 8)
    assert len(pieces) >= 16
    assert sum(piece.windows for piece in pieces) < 1.15 * len(plan)


def test_a_worker_knows_what_those_before_it_finished_and_when_it_is_not_wanted(tmp_path):
    state = OutputState(tmp_path / "o", {"a": 1}, (4, 5))
    state.begin()
    with state.token() as token:
        first = WorkerState(state.output, token, np.zeros((4, 5), bool), ((0, 2), (0, 5)))
        first.record((1, 2))
        first.record((3, 3))
        first.close()
        log = next((state.folder / WORKER_LOGS).iterdir())
        log.open("ab").write(b"1")  # a line cut short
        second = WorkerState(state.output, token, np.zeros((4, 5), bool), ((0, 2), (0, 5)))
        assert np.argwhere(second.done).tolist() == [[1, 2]]  # (3, 3) is not of its piece
        assert second.is_active
    assert not second.is_active
    second.close()
    state.absorb()
    state.absorb()
    state.close()
    again = OutputState(tmp_path / "o", {"a": 1}, (4, 5))
    assert np.argwhere(again.done).tolist() == [[1, 2], [3, 3]]
    assert sorted(read_log(state.folder / "blocks")[0]) == [7, 18]


@pytest.mark.parametrize(
    ("asked", "name", "address", "gpus", "device"),
    [
        ("auto", 0, "tcp://10.0.0.1:4000", 4, "cuda:0"),  # a local cluster numbers its workers
        ("auto", 6, "tcp://10.0.0.1:4000", 4, "cuda:2"),
        ("cuda", "node7-3", "tcp://10.0.0.7:4000", 4, "cuda:3"),  # dask worker --name node7 --nworkers 4
        ("auto", "tcp://10.0.0.1:40001", "tcp://10.0.0.1:40001", 4, "cuda:1"),
        ("auto", "SLURMCluster-17", "tcp://10.0.0.1:4000", 1, "cuda:0"),  # CUDA_VISIBLE_DEVICES shows one
        ("cuda:1", 0, "tcp://10.0.0.1:4000", 4, "cuda:1"),  # as asked, all of them
        ("cpu", 3, "tcp://10.0.0.1:4000", 4, "cpu"),
        ("auto", 3, "tcp://10.0.0.1:4000", 0, "auto"),
        ("cuda", 3, "tcp://10.0.0.1:4000", 0, "cuda"),  # refused where the device is opened
    ],
)
def test_every_worker_has_a_gpu_of_its_own(asked, name, address, gpus, device):
    assert worker_device(asked, name, address, gpus) == device


def test_workers_of_different_kinds_are_refused_and_other_versions_told(caplog):
    from volumen.inference.distributed.cluster import common_machine

    cpu = Machine("cpu", "x86", "float32", 1, {"torch": "2.13"})
    assert common_machine({"a": cpu, "b": cpu}) == cpu
    with pytest.raises(VolumenError, match="a computes on cpu in float32, b on cuda in bfloat16"):
        common_machine({"a": cpu, "b": Machine("cuda", "H100", "bfloat16", 1, {})})
    common_machine({"a": cpu, "b": replace(cpu, versions={"torch": "2.12"})})
    assert "workers differ in versions" in caplog.text


def segmented(folder: Path, request: PredictRequest) -> PredictRequest:
    """Return a request whose label maps are cleaned and whose instances are made in several blocks."""
    from volumen.inference.rules import read_rules

    pytest.importorskip("bioimage_cpp", exc_type=ImportError)
    return replace(
        request, targets=("ink", "tissue"), dtype="labels", min_size=6, output=str(folder / "one.zarr"),
        instances=read_rules("foreground=ink,block=8x16x16,halo=4,merge_threshold=0.2"),
    )  # fmt: skip


@pytest.fixture
def cleaned(tmp_path, monkeypatch):
    """Return what is cleaned by blocks of one chunk, a single process's result, and a request for the same."""
    monkeypatch.setattr("volumen.inference.postprocess.cleaning.BLOCK_VOXELS", 1)
    monkeypatch.setattr("volumen.inference.distributed.cluster.FEW_BLOCKS", 0)
    request = segmented(tmp_path, make_request(tmp_path, 3))
    predict(request)
    labels = zarr.open_group(tmp_path / "one.zarr", mode="r")
    assert set(np.unique(labels["labels/tissue/0"][...])) != {0}
    assert labels["labels/ink_instances/0"][...].max() > 1
    return replace(request, output=str(tmp_path / "two.zarr"))


def test_workers_clean_and_segment_to_the_same_bytes(scheduler, tmp_path, cleaned, monkeypatch):
    from volumen.inference.distributed.cluster import Cluster

    made = set()
    send = Cluster._run

    def record(self, function, jobs, *rest):
        made.update(type(job[0]).__name__ for job in jobs)
        return send(self, function, jobs, *rest)

    monkeypatch.setattr(Cluster, "_run", record)
    predict(replace(cleaned, scheduler=scheduler, nworkers=2))
    passes = {"SurveyPass", "ChoosePass", "FragmentPass", "EdgePass", "NumberPass", "LevelPass"}
    assert made == {"VolumeWork", *passes}
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")


@pytest.mark.parametrize("shared", [False, True], ids=["here", "workers"])
def test_passes_tell_how_far_they_are(scheduler, tmp_path, cleaned, shared):
    told: dict[str, list[tuple[int, int]]] = {}

    def take(name, done, total):
        told.setdefault(name, []).append((done, total))

    settings = {"scheduler": scheduler, "nworkers": 2} if shared else {}
    predict(replace(cleaned, **settings), progress=take)
    windows, *passes = told
    assert windows == "scroll"
    expected = [
        "finding components",
        "cleaning",
        "finding fragments",
        "measuring edges",
        "numbering instances",
    ]
    assert passes[:5] == [f"scroll, {title}" for title in expected]
    assert passes[5:] == [f"scroll, level {level} of the pyramid" for level in range(1, len(passes) - 4)]
    for states in told.values():
        totals = {total for _, total in states}
        assert len(totals) == 1
        assert [done for done, _ in states] == sorted(done for done, _ in states)
        assert {states[-1][0]} == totals


def test_a_local_cluster_without_workers_ends(monkeypatch):
    from volumen.inference.distributed import cluster

    class Never:
        def add_done_callback(self, done):
            pass

    class Lonely:
        status = "running"

        def submit(self, *job, **settings):
            return Never()

        def scheduler_info(self, n_workers):
            return {"workers": {}}

        def cancel(self, futures, force):
            self.cancelled = len(futures)

    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "WARNING_SECONDS", 0.05)
    client = Lonely()
    alone = cluster.Cluster(client, Machine("cuda", "H100", "bfloat16", 1, {}), "cuda", None, local=True)
    with pytest.raises(VolumenError, match=r"all workers are gone.*goes on from here"):
        list(alone._run(print, [(1,), (2,)]))
    assert client.cancelled == 2


@pytest.mark.parametrize(
    "where",
    [
        "postprocess.cleaning.SurveyPass",
        "postprocess.cleaning.ChoosePass",
        "postprocess.instance_output.FragmentPass",
        "postprocess.instance_output.EdgePass",
        "postprocess.instance_output.NumberPass",
        "postprocess.passes.LevelPass",
    ],
)
def test_a_pass_that_was_stopped_goes_on_here_and_on_workers(
    scheduler, tmp_path, cleaned, monkeypatch, where
):
    import importlib

    module, _, name = where.rpartition(".")
    chosen = getattr(importlib.import_module(f"volumen.inference.{module}"), name)
    make, count = chosen.make, itertools.count()

    def stop_later(self, number, raise_if_cancelled):
        if next(count) == 3:
            raise Stop
        make(self, number, raise_if_cancelled)

    shared = replace(cleaned, scheduler=scheduler)
    for request in (shared, replace(cleaned, output=str(tmp_path / "three.zarr"))):
        count = itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(chosen, "make", stop_later)
            with pytest.raises(Stop):
                predict(request)
        other = replace(request, scheduler=None if request is shared else scheduler)
        assert predict(other).volumes[0].windows == 0
        assert content(tmp_path / "one.zarr") == content(request.output)


def test_a_worker_that_was_given_up_writes_nothing_of_what_is_gone(tmp_path, cleaned):
    """A worker reads labels that a finished prediction has removed: it must not take them for empty."""
    from volumen.inference.distributed.worker import StoppedError, compute_part
    from volumen.inference.postprocess import cleaning

    late: list[tuple] = []
    make = cleaning.ChoosePass.make

    def remember(self, number, raise_if_cancelled):
        late.append((self, number))
        make(self, number, raise_if_cancelled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning.ChoosePass, "make", remember)
        predict(cleaned)
    with pytest.raises(StoppedError):
        compute_part(late[0][0], "run-gone", 0, 1)
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "main"])
def test_killed_in_the_middle_of_segmenting_it_ends_with_the_same_bytes(tmp_path, victim):
    import subprocess
    import sys

    request = segmented(tmp_path, make_request(tmp_path, 3))
    predict(request)
    command = [
        sys.executable, "-m", "volumen.cli.main", "predict", "-i", request.input, "-m", request.checkpoint,
        "-o", str(tmp_path / "two.zarr"), "--targets", "ink,tissue", "--dtype", "labels", "--min-size", "6",
        "--instances", "foreground=ink,block=8x16x16,halo=4,merge_threshold=0.2", "--amp", "off", "--device", "cpu",
        "--nworkers", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = tmp_path / "two.zarr" / STATE_FOLDER / "instances" / "blocks"
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while not list(begun.glob("block_*.npz")):
        assert process.poll() is None
        time.sleep(0.001)
    if victim == "main":
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert begun.exists()
        process = subprocess.Popen(command, env=environment)
    else:
        log = next((tmp_path / "two.zarr" / STATE_FOLDER / WORKER_LOGS).iterdir())
        os.kill(int(log.name.rsplit("-", 2)[1]), signal.SIGKILL)
    assert process.wait(180) == 0
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")


def test_blocks_of_a_lost_gpu_are_made_by_others(tmp_path, monkeypatch, caplog):
    """One of two workers meets the error that CUDA gives when a device is gone, and leaves."""
    import torch

    from volumen.inference.distributed import worker

    request = make_request(tmp_path, 2)
    predict(request)
    make_blocks, lost = worker.make_blocks, []

    def fail_before_any_block(work, predictor, state, *rest, **options):
        from distributed import get_worker

        if not lost or get_worker().address == lost[0]:
            lost[:] = [get_worker().address]
            raise torch.AcceleratorError("CUDA error: the device is gone")
        return make_blocks(work, predictor, state, *rest, **options)

    monkeypatch.setattr(worker, "make_blocks", fail_before_any_block)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address="127.0.0.1:0",
        memory_limit=0,
    ) as cluster:  # fmt: skip
        shared = replace(
            request, output=str(tmp_path / "two.zarr"), scheduler=cluster.scheduler_address, nworkers=2
        )
        predict(shared)
    assert len(lost) == 1
    assert "CUDA error: the device is gone" in caplog.text
    assert content(tmp_path / "one.zarr") == content(tmp_path / "two.zarr")


def test_a_gpu_by_each_worker_and_none_by_the_process_that_asks(tmp_path, monkeypatch):
    """Fakes of four GPUs: each worker makes its own the current one, before anything else uses CUDA."""
    import torch

    from volumen.inference.distributed import worker
    from volumen.inference.request import PredictRequest as Request
    from volumen.utils.device import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    workers = [type("Worker", (), {"name": name, "address": "tcp://a:1"}) for name in range(4)]
    assert [str(worker._take_device("auto", one)) for one in workers] == [f"cuda:{n}" for n in range(4)]
    assert current == [f"cuda:{n}" for n in range(4)]
    assert {str(worker._take_device("cuda:1", one)) for one in workers} == {"cuda:1"}
    current.clear()
    assert {str(worker._take_device("cpu", one)) for one in workers} == {"cpu"}
    assert current == []
    with pytest.raises(VolumenError, match="expected cuda:0 to cuda:3, found 'cuda:4'"):
        choose_device("cuda:4")
    asked = []

    def load(_, device, **settings):
        asked.append(str(device))
        raise Stop

    monkeypatch.setattr("volumen.inference.predict.load_model", load)
    for settings in (
        {"nworkers": 4},
        {"nworkers": 4, "device": "cuda:1"},
        {"device": "cuda:1"},
        {"device": "cpu"},
    ):
        with pytest.raises(Stop):
            predict(Request("i", "m", "o", **settings))
    assert asked == ["cpu", "cpu", "cuda:1", "cpu"]
