"""The record of a prediction's provenance, and its reproduction from that record."""
