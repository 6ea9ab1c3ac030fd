"""Passing a trained model on: bundles of one model, metadata, model cards, exports to other runtimes."""
