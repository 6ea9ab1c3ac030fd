"""Fits a training to this machine: to a given time, for which it measures the machine, and to its memory."""
