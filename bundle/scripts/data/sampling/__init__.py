"""Which patches train and which validate: the split, the sampler, the datasets over them."""
