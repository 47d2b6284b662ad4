"""Judging a decoder by itself: running text in windows, and whoever scores them."""
