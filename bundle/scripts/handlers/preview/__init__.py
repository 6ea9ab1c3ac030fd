"""Draws a picture of a validation batch: drawing, colours, and the handler that writes it."""
