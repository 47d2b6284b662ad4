"""Engines for TensorRT, standard and RTX, built in a child process."""
