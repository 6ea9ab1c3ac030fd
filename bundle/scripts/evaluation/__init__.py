"""Scores of predictions against labels, and the report of them."""
