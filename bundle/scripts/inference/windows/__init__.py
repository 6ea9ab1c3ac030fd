"""Sliding windows: their plan, reading, network, blending, test-time augmentation."""
