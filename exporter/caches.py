"""The cache of a build: where it lies, and what was doubtful about it."""

from __future__ import annotations

from qexport.exporter.options import BuildOptions
from qexport.safe_io import Cache, Kept

__all__ = ["Cache", "Kept", "cache_of"]


def cache_of(asked: BuildOptions) -> Cache:
    """The cache that a caller asked for; one of its own for each build, since doubts are those of one build."""
    return Cache(asked.cache, strict=asked.strict_cache)
