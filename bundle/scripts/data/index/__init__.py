"""Where patches may lie: labelled voxels counted chunk by chunk, and the index of valid patches."""
