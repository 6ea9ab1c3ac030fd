"""Training within a given time: measures this machine, then chooses network, patch and number of steps."""
