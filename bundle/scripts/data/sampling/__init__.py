"""Chooses the patches for training and validation: the split, the samplers and the datasets."""
