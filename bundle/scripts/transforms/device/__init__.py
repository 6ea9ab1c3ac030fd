"""The transforms of a training batch on the training device, in torch; results equal those of the workers."""
