"""Names of the files that tie the networks of a run together; nothing here imports torch."""

ENSEMBLE = "ensemble.json"
"""In the folder of a run with folds: names its members."""
SELECTION = "selection.json"
"""Written by `volumen select`: the members and the settings that it chose."""
OUT_OF_FOLD = "out_of_fold"
"""Folder with what each fold's network predicts of what it has not seen."""
