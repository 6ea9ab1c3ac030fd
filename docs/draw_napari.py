"""Draw docs/images/napari.png: a real viewer with the widget after a short training and a prediction.

Needs the extra `napari` and a display; without one, `xvfb-run -s "-screen 0 1600x1000x24" python docs/draw_napari.py`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGE = Path(__file__).resolve().parent / "images" / "napari.png"

SMALL = """
model_config: {features_per_stage: [8, 16, 24], n_blocks_per_stage: [1, 1, 1], separate_decoders: false}
tr_config: {initial_lr: 0.004, max_val_steps_per_epoch: 1, num_dataloader_workers: 0}
"""


def main() -> int:
    """Train, predict, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of 8 steps (default: 8)")
    options = parser.parse_args()
    import napari
    from PIL import Image

    from volumen.napari_plugin.samples import phantom
    from volumen.napari_plugin.widget import TrainAndPredict

    logging.basicConfig(level=logging.INFO)
    viewer = napari.Viewer(show=True)
    viewer.window._qt_window.resize(1400, 900)
    for data, layer, kind in phantom(72):
        getattr(viewer, f"add_{kind}")(data, **layer)
    widget = TrainAndPredict(viewer)
    viewer.window.add_dock_widget(widget, name="Train and predict", area="right")
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "small.yaml"
        experiment.write_text(SMALL)
        widget.output.setText(folder)
        widget.experiment.setText(str(experiment))
        widget.epochs.setValue(options.epochs)
        widget.steps.setValue(8)
        widget.patch_size.setText("32,32,32")
        widget.overlap.setValue(0)
        widget.train()
        wait(widget)
        widget.predict()
        wait(widget)
        widget.output.setText("~/volumen")
        widget.experiment.setText("small.yaml")
        widget.checkpoint.setText("~/volumen/model/model_best.pth")
        widget.status.setText("Predicted: ~/volumen/predictions/scroll.zarr")
        viewer.layers["scroll_surface"].visible = False
        viewer.layers["scroll surface"].opacity = 0.55
        viewer.dims.set_point(0, 42)
        viewer.reset_view()
        wait_for(lambda: False, seconds=3)
        picture = viewer.screenshot(canvas_only=False, flash=False)
        viewer.close()
    Image.fromarray(picture[..., :3]).quantize(128, dither=Image.Dither.NONE).save(IMAGE, optimize=True)
    logging.info("wrote %s", IMAGE)
    return 0


def wait(widget: Any) -> None:
    """Wait until no job runs."""
    wait_for(lambda: widget.train_button.isEnabled(), seconds=3600)
    logging.info("%s", widget.status.text())


def wait_for(done: Any, seconds: float) -> None:
    """Process Qt events until a condition is true, up to a time limit."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.02)


if __name__ == "__main__":
    raise SystemExit(main())
