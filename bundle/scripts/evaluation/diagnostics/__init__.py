"""Errors by the geometry around them, and labels that may be wrong."""
