"""Stands in for the process of a fold: a few files with pauses between them, and a log of what was started.

python fold_toy.py train ... --model-name NAME ... -o FOLDER ...
python fold_toy.py predict MEMBER OUT DEVICE
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

PAUSE = float(os.environ.get("TOY_PAUSE", "0.05"))


def note(folder: Path, what: str) -> None:
    with (folder / "toy.log").open("a") as log:
        log.write(f"{time.monotonic():.3f} {os.getpid()} {what}\n")


def main(words: list[str]) -> int:
    if os.environ.get("TOY_FAIL") in words:
        return 7
    if words[0] == "train":
        folder, name = Path(words[words.index("-o") + 1]), words[words.index("--model-name") + 1]
        budget = words[words.index("--time-budget") + 1] if "--time-budget" in words else ""
        note(folder, f"train {name} {words[words.index('--device') + 1]} {budget}".rstrip())
        run = folder / name
        run.mkdir(exist_ok=True)
        for epoch in range(1, 4):
            if not (run / f"{name}_{epoch}.pth").exists():
                time.sleep(PAUSE)
                (run / f"{name}_{epoch}.pth").write_text("x")
        (run / f"{name}_final.pth").write_text("x")
        note(folder, f"trained {name}")
        return 0
    member, out = Path(words[1]), Path(words[2])
    out.mkdir(exist_ok=True)
    time.sleep(PAUSE)
    (out / member.name).write_text("x")
    note(member.parent, f"predicted {member.name}")
    return 0


def end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(143))
    sys.exit(main(sys.argv[1:]))
