"""Test data sets that are computed: rolled sheets of known geometry, nerve tissue, nuclei, and scans of organs."""
