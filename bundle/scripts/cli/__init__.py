"""The command `volumen`: one module per command, flags in, settings out; running it so that a mistake is one line."""
