"""The multi-head residual U-Net, its plan from patch and spacing, and its placement on devices."""
