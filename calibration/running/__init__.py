"""Models in memory to sessions, as they are or with their numbers taken literally."""
