"""Trains or predicts for the viewer, in a separate process.

    python -m volumen.napari_plugin.worker JOB.json

The process reports events on standard output, one JSON object per line. It saves and ends when its standard input is
closed, either by the Stop button or because the viewer has ended.

| event | with |
| --- | --- |
| message | text |
| started | run: the run's folder |
| step | epoch, epochs, step, steps, loss |
| epoch | epoch, epochs, numbers: every loss and metric by name |
| heads | kinds: kind of every predicted target |
| progress | done, total |
| done | path: the run's folder or the prediction |
| stopped | |
| failed | message: one line |
"""

from __future__ import annotations

import _thread
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ReportEvent = Callable[..., None]

#: Least number of seconds between two events of the same kind.
PAUSE = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; return its exit code."""
    from volumen.cli.running.execution import explain, set_up_logging

    (path,) = sys.argv[1:] if arguments is None else arguments
    report_event = reserve_stdout()
    watch_stdin()
    try:
        set_up_logging()
        logging.getLogger("volumen").addHandler(_Messages(report_event))
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        result = {"train": train, "predict": predict}[job["task"]](job, report_event)
        report_event("done", path=str(result))
        return 0
    except (KeyboardInterrupt, SystemExit) as stop:
        report_event("stopped")
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except Exception as error:
        code, line = explain(error)
        report_event("failed", message=line)
        return code
    finally:
        # The copies of the layers; the viewer cannot remove them if it has ended.
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def reserve_stdout() -> ReportEvent:
    """Reserve standard output for events, and redirect all other output to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def report_event(event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}) + "\n"
        with lock:
            try:
                stream.write(line)
                stream.flush()
            except OSError:
                pass  # the viewer has ended; standard input is closed too, which ends this process

    return report_event


def watch_stdin() -> None:
    """Stop this process like Ctrl-C when standard input ends."""
    # A shell starts background processes with SIGINT ignored, and a viewer in the background passes this on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    # Not through sys.stdin: the data loader's forked workers would inherit its lock in the locked state for ever, and
    # the first thing they do is to close sys.stdin.
    while os.read(0, 1):
        pass
    if hasattr(signal, "pthread_kill"):
        # The signal goes to the main thread, so that it interrupts a wait there.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


class _Messages(logging.Handler):
    """Sends log lines as events."""

    def __init__(self, report_event: ReportEvent) -> None:
        super().__init__(logging.INFO)
        self.report_event = report_event

    def emit(self, record: logging.LogRecord) -> None:
        self.report_event("message", text=record.getMessage(), level=record.levelname.lower())


class Reporter:
    """An Ignite handler that reports steps and epochs.

    Args:
        report_event: callback that receives the events.
    """

    def __init__(self, report_event: ReportEvent) -> None:
        self.report_event = report_event
        self._last_report = -math.inf

    def attach(self, engine: Any) -> None:
        """Attach the handlers to the trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def _step(self, engine: Any) -> None:
        state = engine.state
        step = (state.iteration - 1) % state.epoch_length + 1
        now = time.monotonic()
        if now - self._last_report < PAUSE and step < state.epoch_length:
            return
        self._last_report = now
        self.report_event(
            "step",
            epoch=state.epoch,
            epochs=state.max_epochs,
            step=step,
            steps=state.epoch_length,
            loss=_number(state.output["losses"]["loss"]),
        )

    def _epoch(self, engine: Any) -> None:
        numbers = {name: _number(value) for name, value in engine.state.metrics.items()}
        self.report_event("epoch", epoch=engine.state.epoch, epochs=engine.state.max_epochs, numbers=numbers)


def _number(value: Any) -> float | None:
    """Return a number that JSON can represent; None for NaN and infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def train(job: Mapping[str, Any], report_event: ReportEvent) -> Path:
    """Train on stored layers; return the run's folder."""
    from volumen.napari_plugin.layers import viewer_substitute
    from volumen.napari_plugin.viewer import train_from_viewer

    report_event("message", text="loading the program")
    settings = job["settings"]
    report_event("started", run=str(Path(job["output"]) / settings["tr_setup"]["model_name"]))
    return train_from_viewer(
        viewer_substitute(job["layers"]),
        job["output"],
        settings,
        device=job["device"],
        handlers=[Reporter(report_event)],
    )


def predict(job: Mapping[str, Any], report_event: ReportEvent) -> str:
    """Predict a stored layer with the voxel size of the viewer; return the OME-Zarr group."""
    from volumen.data.formats.opening import open_volume
    from volumen.data.napari_layers import viewer_geometry
    from volumen.inference.ensemble import load_model
    from volumen.inference.jobs import make_job
    from volumen.inference.output.stored import instance_specs
    from volumen.inference.postprocess.instance_output import resolve_request
    from volumen.inference.predict import output_names, predict_volume
    from volumen.inference.progress import Progress
    from volumen.inference.request import PredictRequest
    from volumen.inference.rules import read_rules
    from volumen.utils.device import choose_device

    last = -math.inf

    def progress(_name: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PAUSE or done >= total:
            last = time.monotonic()
            report_event("progress", done=done, total=total)

    (layer,) = job["layers"]
    request = PredictRequest(
        input=layer["path"],
        checkpoint=job["checkpoint"],
        output=job["target"],
        axes=job["axes"],
        targets=tuple(job["targets"]) if job.get("targets") else None,
        overlap=job["overlap"],
        dtype=job["dtype"],
        device=job["device"],
        instances=read_rules(job.get("instances") or None),
    )
    report_event("message", text="loading the model")
    predictor = load_model(request.checkpoint, choose_device(request.device))
    request = resolve_request(request, predictor)
    heads = [*predictor.heads(request.targets), *(item.head for item in instance_specs(request.instances))]
    report_event("heads", kinds={head.name: head.kind for head in heads})
    image: Any = open_volume(layer["path"], axes=job["axes"])
    image.geometry = viewer_geometry(
        layer["scale"], layer.get("translate") or None, layer["unit"], len(image.shape)
    )
    where = make_job(image, None, request.output, output_names(predictor, request), None)
    return predict_volume(predictor, where, request, progress=Progress(layer["name"], progress)).output


if __name__ == "__main__":
    sys.exit(main())
