"""Checks before a volume is predicted: the image against the training, and the free disk space."""
