"""Actions of command-line flags."""

from __future__ import annotations

import argparse
from typing import Any


class Once(argparse.Action):
    """Stores a value and refuses a second one, because argparse would silently use the last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest, None)
        if earlier is not None:
            parser.error(f"{option_string} is given twice ({earlier}, then {values}); give one path")
        setattr(namespace, self.dest, values)
