"""Finds the places of patches: counts labelled voxels chunk by chunk and builds the index of valid patches."""
