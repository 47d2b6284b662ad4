"""How a torch module, wherever it came from, becomes a graph."""
