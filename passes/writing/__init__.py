"""What quantizing passes write into a graph."""
