"""Checkpoint files: the format, weights that fit in part, weights of nnU-Net, and starting from another model."""
