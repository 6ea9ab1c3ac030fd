"""Computes the blocks of a volume, and what its prediction consists of."""
