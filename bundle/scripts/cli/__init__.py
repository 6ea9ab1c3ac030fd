"""The command `volumen`: one module per command converts flags to settings; errors are reported in one line."""
