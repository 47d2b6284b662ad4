"""Where time and bytes go: counters, curves, what the machine can do."""
