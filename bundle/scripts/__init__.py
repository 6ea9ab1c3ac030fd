"""Training, prediction and evaluation of multi-target networks on large volumes."""
