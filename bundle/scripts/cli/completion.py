"""`volumen completion`: prints the shell code that completes commands, options and values with argcomplete."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_HOW = """
bash:  volumen completion bash > ~/.local/share/bash-completion/completions/volumen
zsh:   volumen completion zsh > "${fpath[1]}/_volumen"
fish:  volumen completion fish > ~/.config/fish/completions/volumen.fish

For this shell alone: source <(volumen completion bash)
"""


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `volumen completion` to a parser."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run_completion(options: argparse.Namespace) -> int:
    """Write the shell's code to standard output; return the exit status."""
    from argcomplete import shellcode

    sys.stdout.write(shellcode(["volumen"], shell=options.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Write the completions that a shell requests and end the process; return at once without such a request.

    Args:
        parser: the program's parser, with a sub-parser for every command.
    """
    from argcomplete import autocomplete

    autocomplete(parser)


def offer_devices(**_: Any) -> Iterable[str]:
    """Return the usual values of `--device`."""
    return ("auto", "cpu", "cuda")


def offer_losses(**_: Any) -> Iterable[str]:
    """Return the names of all losses."""
    from volumen.losses.registry import loss_names

    return loss_names()


def offer_settings(**_: Any) -> list[str]:
    """Return `section.key=` for every key of every section."""
    from volumen.config.sections import SECTIONS

    return [f"{name}.{field.name}=" for name, section in SECTIONS.items() for field in fields(section)]
