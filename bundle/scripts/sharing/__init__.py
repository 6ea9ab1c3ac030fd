"""Passing a trained model on: metadata, bundles of one model, exports to other runtimes."""
