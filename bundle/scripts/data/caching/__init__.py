"""What is stored between reads and between runs: decoded blocks, fingerprints, records on disk."""
