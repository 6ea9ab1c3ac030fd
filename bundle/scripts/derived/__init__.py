"""Derived targets: their registry, their halos, and the fields of a label from which they are computed."""
