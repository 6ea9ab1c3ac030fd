"""Shows images, predictions, labels and errors, in napari or to Neuroglancer, and writes meshes of objects."""
