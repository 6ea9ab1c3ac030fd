"""A dock widget for napari: train on the open layers, watch the loss, predict into new layers."""
