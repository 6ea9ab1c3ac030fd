"""Volumes as a user brings them: the folder's layout, names that belong together, damage, fingerprints, caches."""
