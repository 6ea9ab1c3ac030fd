"""Volumes on disk, where patches lie in them, and how they are split."""
