"""Files that are whole or absent, reads at a place of a file, locks."""
