"""Trainer and evaluator pieces over MONAI's engines."""
