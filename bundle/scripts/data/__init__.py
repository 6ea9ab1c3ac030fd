"""The user's volumes: folder layout, pairing by name, damaged data, fingerprints, caches."""
