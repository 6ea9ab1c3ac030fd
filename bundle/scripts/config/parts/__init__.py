"""Sections of the experiment with a file of their own; `volumen.config.sections` collects all of them."""
