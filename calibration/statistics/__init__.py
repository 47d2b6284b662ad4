"""What is kept of the values that were seen, and what is derived from it."""
