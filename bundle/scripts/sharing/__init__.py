"""Shares a trained model: bundles of one model, metadata, model cards, exports to other runtimes."""
