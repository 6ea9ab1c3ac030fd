"""One lazy reader per file format behind one protocol: shape, type, spacing, axes, and reading a region."""
