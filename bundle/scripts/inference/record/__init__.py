"""What a prediction records of itself, and repeating one from that record."""
