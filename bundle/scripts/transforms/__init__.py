"""MONAI dictionary transforms: read, normalise, augment, prepare labels, derive targets."""
