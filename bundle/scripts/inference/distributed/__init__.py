"""Prediction by several processes: divides a volume among workers, and runs a worker."""
