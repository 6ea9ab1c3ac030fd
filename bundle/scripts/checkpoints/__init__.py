"""Checkpoint files: their format, loading of matching weights, weights of nnU-Net, and starting from another model."""
