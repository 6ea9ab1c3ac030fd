"""What trains or predicts for the viewer, in a process of its own.

    python -m volumen.napari_plugin.worker JOB.json

It tells what happens on standard output, one JSON object a line, and ends, saved, when its standard input is closed:
by a press of Stop, or because the viewer is gone.

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

Tell = Callable[..., None]

#: Seconds between two events of the same kind, at least.
PAUSE = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; return its exit code."""
    from volumen.cli.execution import explain, set_up_logging

    (path,) = sys.argv[1:] if arguments is None else arguments
    tell = take_stdout()
    watch_stdin()
    try:
        set_up_logging()
        logging.getLogger("volumen").addHandler(_Messages(tell))
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        result = {"train": train, "predict": predict}[job["task"]](job, tell)
        tell("done", path=str(result))
        return 0
    except (KeyboardInterrupt, SystemExit) as stop:
        tell("stopped")
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except Exception as error:
        code, line = explain(error)
        tell("failed", message=line)
        return code
    finally:
        # The layers' copies; not left to the viewer, which may be gone.
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def take_stdout() -> Tell:
    """Keep standard output for events, and send what else is printed to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}) + "\n"
        with lock:
            try:
                stream.write(line)
                stream.flush()
            except OSError:
                pass  # nobody listens any more; standard input is closed too and ends us

    return tell


def watch_stdin() -> None:
    """Stop as by Ctrl-C when standard input ends."""
    # A shell starts what it runs in the background with SIGINT ignored, and a viewer there hands that on to us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    # Not through sys.stdin: its lock, held here, would be held for ever in the data loader's forked workers, which
    # close sys.stdin first of all.
    while os.read(0, 1):
        pass
    if hasattr(signal, "pthread_kill"):
        # To the main thread itself, so that it is woken where it waits.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


class _Messages(logging.Handler):
    """Log lines as events."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.INFO)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell("message", text=record.getMessage(), level=record.levelname.lower())


class Reporter:
    """An Ignite handler that tells of steps and epochs.

    Args:
        tell: gets the events.
    """

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._told = -math.inf

    def attach(self, engine: Any) -> None:
        """Follow the trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def _step(self, engine: Any) -> None:
        state = engine.state
        step = (state.iteration - 1) % state.epoch_length + 1
        now = time.monotonic()
        if now - self._told < PAUSE and step < state.epoch_length:
            return
        self._told = now
        self.tell(
            "step",
            epoch=state.epoch,
            epochs=state.max_epochs,
            step=step,
            steps=state.epoch_length,
            loss=_number(state.output["losses"]["loss"]),
        )

    def _epoch(self, engine: Any) -> None:
        numbers = {name: _number(value) for name, value in engine.state.metrics.items()}
        self.tell("epoch", epoch=engine.state.epoch, epochs=engine.state.max_epochs, numbers=numbers)


def _number(value: Any) -> float | None:
    """Return a number that JSON knows; None for NaN and infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def train(job: Mapping[str, Any], tell: Tell) -> Path:
    """Train on stored layers; return the run's folder."""
    from volumen.napari_plugin.layers import stand_in
    from volumen.napari_plugin.viewer import train_from_viewer

    tell("message", text="loading the program")
    settings = job["settings"]
    tell("started", run=str(Path(job["output"]) / settings["tr_setup"]["model_name"]))
    return train_from_viewer(
        stand_in(job["layers"]),
        job["output"],
        settings,
        device=job["device"],
        handlers=[Reporter(tell)],
    )


def predict(job: Mapping[str, Any], tell: Tell) -> str:
    """Predict a stored layer, with the voxel size that the viewer shows; return the OME-Zarr group."""
    from volumen.data.formats.volumes import open_volume
    from volumen.data.napari_layers import viewer_geometry
    from volumen.inference.jobs import make_job
    from volumen.inference.predict import output_names, predict_volume
    from volumen.inference.predictor import load_predictor
    from volumen.inference.progress import Progress
    from volumen.inference.request import PredictRequest
    from volumen.utils.device import choose_device

    last = -math.inf

    def progress(_name: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PAUSE or done >= total:
            last = time.monotonic()
            tell("progress", done=done, total=total)

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
    )
    tell("message", text="loading the model")
    predictor = load_predictor(request.checkpoint, choose_device(request.device))
    tell("heads", kinds={head.name: head.kind for head in predictor.heads(request.targets)})
    image: Any = open_volume(layer["path"], axes=job["axes"])
    image.geometry = viewer_geometry(
        layer["scale"], layer.get("translate") or None, layer["unit"], len(image.shape)
    )
    where = make_job(image, None, request.output, output_names(predictor, request), None)
    return predict_volume(predictor, where, request, progress=Progress(layer["name"], progress)).output


if __name__ == "__main__":
    sys.exit(main())
