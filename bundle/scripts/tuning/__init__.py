"""Choice of prediction settings, and of the epoch, by a score on the validation part of a run."""
