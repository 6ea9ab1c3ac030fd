"""Instances by one graph over the whole volume: fragments per block, a table of edges on disk, agglomeration."""
