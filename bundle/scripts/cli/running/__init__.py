"""Processes, progress and exit codes of the commands."""
