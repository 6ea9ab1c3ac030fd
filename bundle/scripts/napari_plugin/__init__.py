"""A dock widget for napari that trains on the open layers, shows the loss, and predicts into new layers."""
