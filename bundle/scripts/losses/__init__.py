"""Masked losses and their multi-task sum; inputs and outputs are tensors."""
