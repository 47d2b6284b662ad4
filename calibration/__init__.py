"""Calibration: data readers, streaming statistics and the methods that turn them into ranges."""
