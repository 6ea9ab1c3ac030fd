"""Derived targets: which there are, how far each looks, and the fields of a label that they share."""
