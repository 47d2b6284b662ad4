"""Vectors of texts: batches by length, pooling, and requests of many callers in one batch."""
