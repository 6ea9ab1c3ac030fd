"""Training within a given time: network, patch and number of steps chosen by measuring this machine."""
