"""Which layers lose what by fewer bits, and what to do about those that lose too much or win nothing."""
