"""Formats whose libraries are the extra `formats`."""
