"""Gradients of a model's outputs: its graph, extended by the nodes of reverse-mode differentiation."""
