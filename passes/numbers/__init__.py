"""Ranges, formats and grids: which number stands for which value."""
