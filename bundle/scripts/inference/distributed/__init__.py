"""Prediction by several processes: how a volume is shared out, and what a worker does."""
