"""`volumen train WORDS...` whose folds are trained by `fold_toy.py`; the folds themselves are made as always."""

from __future__ import annotations

import sys
from pathlib import Path

from volumen.cli import folds
from volumen.cli.main import main

if __name__ == "__main__":
    folds.MEMBER = (sys.executable, str(Path(__file__).with_name("fold_toy.py")))
    sys.exit(main(sys.argv[1:]))
