"""What the voxels of a label mean: how they were saved, classes or instances, and where they are valid."""
