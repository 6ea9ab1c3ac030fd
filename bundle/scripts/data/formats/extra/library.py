"""Imports the libraries of formats that are extras."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from volumen.utils.errors import VolumenError


def library(name: str, where: object) -> Any:
    """Import the library that reads a format.

    Args:
        name: the module.
        where: the file, named in the error.

    Raises:
        VolumenError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise VolumenError(
            where, f"needs the package {name} to be read", remedy="pip install 'volumen[formats]'"
        ) from None
