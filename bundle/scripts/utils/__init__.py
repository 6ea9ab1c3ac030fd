"""Helpers for every part: errors, text, threads, atomic files, devices, processes, boxes."""
