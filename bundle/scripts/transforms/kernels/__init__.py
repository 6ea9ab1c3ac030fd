"""Compiled resampling and filters behind the spatial and intensity augmentation."""
