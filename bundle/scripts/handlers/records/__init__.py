"""Writes the records of a run other than its checkpoints: folder, settings, split, logs, tracking."""
