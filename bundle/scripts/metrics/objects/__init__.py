"""Scores of objects: overlaps, splits and merges, matched objects, run length."""
