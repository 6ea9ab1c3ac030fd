"""A test data set of rolled sheets whose geometry is known exactly."""
