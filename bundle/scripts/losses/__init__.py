"""Masked losses and their multi-task sum."""
