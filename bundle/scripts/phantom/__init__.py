"""A phantom to try everything on: rolled sheets whose geometry is known exactly."""
