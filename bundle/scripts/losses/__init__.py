"""Masked losses and their multi-task sum: tensors in, tensors out."""
