"""The objects that inference.yaml declares: volumes as MONAI samples, streamed or in memory."""
