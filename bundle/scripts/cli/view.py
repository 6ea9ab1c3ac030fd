"""`volumen view`: flags in, a viewer, a server or a picture out."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen view` to a parser."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="volume, output of a prediction, folder of a run, or report of an evaluation (its worst case)",
    )
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        metavar="PATH",
        help="volume shown as a label map (repeatable)",
    )
    parser.add_argument("--case", metavar="NAME", help="image, where PATH has several")
    parser.add_argument(
        "--level", type=int, default=0, metavar="N", help="finest level of images (default: 0)"
    )
    parser.add_argument(
        "--with",
        dest="viewer",
        choices=("napari", "neuroglancer"),
        default="neuroglancer",
        help="napari, or a server for Neuroglancer in a browser of this machine (default)",
    )
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="port of the server (default: a free one)"
    )
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="write a picture (.png, .jpg, .webp) of a plane of every layer instead of opening a viewer",
    )
    parser.add_argument(
        "--at",
        metavar="Z,Y,X",
        help="voxel through which the plane of --picture goes (default: the worst place of a report, else the middle)",
    )


def run_view(arguments: argparse.Namespace) -> int:
    """Run `volumen view`; return the exit status when the window is closed or the command is stopped.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.viewing.sources import find_view

    view = find_view(arguments.paths, labels=arguments.labels, case=arguments.case, level=arguments.level)
    logger.info("%s: %s", view.title, ", ".join(layer.name for layer in view.layers))
    if arguments.picture is not None:
        from volumen.utils.terminal.console import make_console
        from volumen.viewing.picture import write_picture

        path = write_picture(view, Path(arguments.picture), _voxel(arguments.at))
        make_console().print(f"picture: {path}", soft_wrap=True, markup=False, highlight=False)
        return 0
    if arguments.at is not None:
        raise VolumenError("--at", "belongs to --picture", remedy="leave it out")
    if arguments.viewer == "napari":
        from volumen.viewing.napari_window import show

        show(view)
        return 0
    from volumen.utils.terminal.console import make_console
    from volumen.viewing.server import ViewServer

    with ViewServer(view, arguments.port) as server:
        make_console().print(server.start_page, soft_wrap=True, markup=False, highlight=False)
        where = "" if server.page else "; the page of the viewer comes from the internet"
        logger.info("open this address in a browser of this machine%s; Ctrl-C stops", where)
        with _stopped_by_signals():
            server.serve_forever(poll_interval=0.1)
        logger.info("stopped")
    return 0


def _voxel(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise VolumenError("--at", expected="voxels such as 40,100,100", found=text) from None


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block without an error at Ctrl-C or SIGTERM, also where a shell lets commands ignore Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
