"""`volumen new`: writes a commented experiment file from what a data folder holds."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def add_new_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `volumen new` to a parser."""
    parser.add_argument("output", metavar="YAML", help="the experiment file to write")
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        required=True,
        metavar="DATA",
        help="folder with images/, labels/ and, optionally, masks/ (repeatable; NAME=DATA names one)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="a key for the file, without which the data cannot be read, say (repeatable)",
    )


def run_new(options: argparse.Namespace) -> int:
    """Write the experiment file; return 0.

    Raises:
        VolumenError: the file exists, or the data are wrong.
    """
    from volumen.cli.experiment_text import experiment_text, input_flags
    from volumen.cli.train import experiment_sections
    from volumen.config.experiment_file import parse_assignment
    from volumen.config.manager import ConfigManager
    from volumen.utils.files.atomic import write_atomically

    path = Path(options.output)
    if path.suffix not in (".yaml", ".yml"):
        raise VolumenError(str(path), expected="a name that ends in .yaml", found=path.suffix or "no ending")
    if path.exists():
        raise VolumenError(str(path), "exists already", remedy="give another name, or remove the file")
    if not path.parent.is_dir():
        raise VolumenError(str(path.parent), "there is no such folder", remedy="make it first")
    given = [parse_assignment(text) for text in options.set]
    for keys, _ in given:
        if len(keys) != 2 or keys == ["tr_setup", "model_name"]:
            raise VolumenError("--set", expected="SECTION.KEY=VALUE", found=".".join(keys))
    options.config_path = None
    found, origin = experiment_sections(options)
    sections: dict[str, Any] = dict(found)
    config = ConfigManager(**sections, dataset_dir=options.input, origin=origin)
    write_atomically(path, experiment_text(config, path, options.input, given).encode())
    logger.info("%s: volumen train %s -o OUT --config-path %s", path, input_flags(options.input), path)
    return 0
