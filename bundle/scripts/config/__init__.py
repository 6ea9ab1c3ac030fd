"""The experiment: sections, checks, targets, what the data decide, and the configuration that holds them."""
