"""Compiled resampling and filters for the spatial and intensity augmentation."""
