"""Run models: sessions, decoders and what they generate, embeddings, and what all of that takes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexport.runtime.backends.choose import open_session as open_session
    from qexport.runtime.decoder import Decoder as Decoder
    from qexport.runtime.embedding.batcher import Batcher as Batcher
    from qexport.runtime.embedding.embedder import Embedder as Embedder
    from qexport.runtime.embedding.embedder import embed as embed
    from qexport.runtime.embedding.embedder import open_embedder as open_embedder
    from qexport.runtime.embedding.options import EmbedOptions as EmbedOptions
    from qexport.runtime.session import Session as Session
    from qexport.runtime.session import SessionOptions as SessionOptions

_HOMES = {
    "Batcher": "qexport.runtime.embedding.batcher",
    "Decoder": "qexport.runtime.decoder",
    "EmbedOptions": "qexport.runtime.embedding.options",
    "Embedder": "qexport.runtime.embedding.embedder",
    "embed": "qexport.runtime.embedding.embedder",
    "open_embedder": "qexport.runtime.embedding.embedder",
    "open_session": "qexport.runtime.backends.choose",
    "Session": "qexport.runtime.session",
    "SessionOptions": "qexport.runtime.session",
}

__all__ = [
    "Batcher",
    "Decoder",
    "EmbedOptions",
    "Embedder",
    "Session",
    "SessionOptions",
    "embed",
    "open_embedder",
    "open_session",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562), so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qexport.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return __all__
