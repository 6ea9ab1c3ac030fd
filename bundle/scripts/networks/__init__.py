"""The multi-head residual U-Net, its planning from patch and spacing, and its placement on devices."""
