"""The numerics of derived targets for one patch, in NumPy and compiled kernels."""
