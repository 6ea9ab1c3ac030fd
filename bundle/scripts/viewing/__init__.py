"""Shows images, predictions, labels and errors: in napari, or to Neuroglancer by a server on this machine."""
