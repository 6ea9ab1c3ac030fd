"""Says which boxes to label next, writes them for annotators, and takes the painted boxes back as labels and masks."""
