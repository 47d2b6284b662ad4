"""Data files to samples, batches and tasks."""
