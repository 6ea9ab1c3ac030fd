"""The process of one fold or round: trains it, or predicts for it, and saves and ends when its parent is gone.

python -m volumen.cli.member train WORDS...              as `volumen train WORDS...`
python -m volumen.cli.member predict MEMBER OUT DEVICE   predicts what the fold was validated on
python -m volumen.cli.member pseudo MEMBER OUT DEVICE    writes pseudo-labels of the round
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str]) -> int:
    """Run one of the commands; return an exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if words[0] == "train":
        from volumen.cli.main import main as run

        return run(words)
    from volumen.cli.running.execution import run_guarded

    quiet = "--quiet" in words
    options = argparse.Namespace(words=words[1:], verbose="--verbose" in words, quiet=quiet)
    return run_guarded(_predict if words[0] == "predict" else _label, options)


def _predict(options: argparse.Namespace) -> int:
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.tuning.out_of_fold import predict_out_of_fold

    member, output, device = options.words[:3]
    with ProgressBar() as bar:
        predict_out_of_fold(Path(member), Path(output), device, bar)
    return 0


def _label(options: argparse.Namespace) -> int:
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.suggestion.pseudo_labels import write_pseudo_labels

    member, output, device = options.words[:3]
    with ProgressBar() as bar:
        write_pseudo_labels(Path(member), Path(output), device, progress=bar)
    return 0


def _end_with_parent() -> None:
    """Wait until the parent closes the pipe at standard input, as it does when it dies, and end like on SIGTERM."""
    # Not through sys.stdin, whose lock this thread would hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    from volumen.cli.running.execution import leave

    leave(main(sys.argv[1:]))
