"""Compiled inner loops of the derived targets."""
