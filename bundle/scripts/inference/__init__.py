"""Streaming prediction, writers and evaluation."""
