"""Planning and the multi-head residual U-Net."""
