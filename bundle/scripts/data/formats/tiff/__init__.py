"""Reads TIFF images, stacks and tiles by region, and the voxel sizes in their metadata."""
