"""What a prediction writes: arrays, chunks, OME-Zarr, exported files, and the log of finished blocks."""
