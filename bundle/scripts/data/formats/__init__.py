"""Lazy readers: one per file format, all with the same protocol for shape, type, spacing, axes and regions."""
