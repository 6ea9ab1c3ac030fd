"""Scores of predictions: pure functions on arrays, and their accumulation over cases, targets and classes."""
