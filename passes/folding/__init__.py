"""Moving scales and offsets through a graph: what takes part, where channels lie, and which constants change."""
