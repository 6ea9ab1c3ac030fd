"""The numerics of derived targets for a batch on the training device, in torch."""
