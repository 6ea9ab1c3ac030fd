"""One training step and one validation step over MONAI's engines, with precision, optimizer and schedule."""
