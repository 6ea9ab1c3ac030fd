"""Dictionary transforms: read, normalise, augment, derive targets."""
