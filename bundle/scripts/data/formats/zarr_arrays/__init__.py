"""Reads Zarr and OME-Zarr: arrays, chunks on disk or at a URL, and multiscale metadata."""
