"""What a run writes beside its checkpoints: folder, settings, split, logs, tracking."""
