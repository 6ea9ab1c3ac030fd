"""Rules that all sections share."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Refuses unknown keys and infinite numbers."""
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of names of files and folders."""
