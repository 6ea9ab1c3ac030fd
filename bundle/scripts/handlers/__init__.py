"""Ignite handlers: checkpoints, validation, scores, signals, averages."""
