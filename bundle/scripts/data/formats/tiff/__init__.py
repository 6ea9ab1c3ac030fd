"""TIFF: images, stacks and tiles read by region, and the voxel sizes in their metadata."""
