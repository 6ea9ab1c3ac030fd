"""The version of the program and of its bundle."""

__version__ = "0.1.0"
