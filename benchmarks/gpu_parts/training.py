"""Part c: the share of time in which the device works, in a real training that is read by 2, 4 and 16 workers."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

from gpu_parts.common import Run, milliseconds, phantom, training_settings


class Clock:
    """A handler that notes when steps begin, and what is needed to repeat the last one.

    Attributes:
        times: `time.perf_counter()` at the start of each step.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.engine: Any = None
        self.batch: Any = None

    def attach(self, engine: Any) -> None:
        """Follow the trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_STARTED, self._note)

    def _note(self, engine: Any) -> None:
        self.times.append(time.perf_counter())
        self.engine, self.batch = engine, engine.state.batch

    def period(self, warm_up: int) -> float:
        """Return the mean milliseconds between steps without the first ones."""
        times = self.times[warm_up:]
        return (times[-1] - times[0]) / max(1, len(times) - 1) * 1e3


def run_part(run: Run) -> None:
    """Train with each number of workers, on the device's input and on the workers'."""
    cores = os.cpu_count() or 1
    for workers in (0, 1) if run.tiny else (4, 2, 16):
        for on_device in (True, False):
            name = f"{workers} workers, {'device' if on_device else 'workers'} augment"
            if workers > cores:
                run.write(name, skipped=f"the machine has {cores} cores")
                continue
            run.attempt(name, lambda w=workers, d=on_device: train(run, w, d), 15)


def train(run: Run, workers: int, on_device: bool) -> dict[str, Any]:
    """Return milliseconds per step, those of the step alone, and the share of the latter.

    The step alone repeats the last batch, which lies on the device already: its input was read and copied. What it
    lacks is waiting for input, so the share is that of the time in which the device has work.
    """
    from volumen.run import train_on_folder

    patch, side, steps = (16, 48, 4) if run.tiny else (128, 192, 40)
    clock = Clock()
    settings = training_settings(
        run,
        patch,
        max_steps_per_epoch=steps,
        num_dataloader_workers=workers,
        augment_on_device=on_device,
        derive_on_device=on_device,
        amp="bfloat16" if run.device.type == "cuda" else "off",
    )
    name = f"c_{workers}_{on_device}"
    train_on_folder(phantom(run, side), run.folder / name, settings, device=str(run.device), handlers=[clock])
    period = clock.period(1 if run.tiny else 10)
    engine = clock.engine
    alone = milliseconds(
        lambda: engine._process_function(engine, clock.batch), run.device, 1 if run.tiny else 10, 1
    )
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:])]
    return {
        "ms_per_step": period,
        "ms_step_alone": alone,
        "busy_share": min(1.0, alone / period),
        "median_ms": statistics.median(gaps) * 1e3,
    }
