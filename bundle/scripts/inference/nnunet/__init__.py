"""Prediction with networks of nnU-Net v2: their folders, preparation of images, and resampling."""
