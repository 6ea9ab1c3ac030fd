"""Neuroglancer's precomputed format: its description, its packed chunks, its codecs, and a lazy reader."""
