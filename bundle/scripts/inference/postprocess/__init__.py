"""What happens to predicted blocks afterwards: cleaning of labels, instances, passes over blocks."""
