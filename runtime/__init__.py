"""Run models: sessions, decoders and what they generate, embeddings, and what all of that takes.

To read it, begin with ``generation/generator.py`` (text in, text out), go on with ``speculation/rounds.py`` (the loop)
and ``speculation/rules.py`` (which proposed tokens are taken), and then down to ``decoder.py`` (caches) and
``session.py`` (what backends share).
"""

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
    from qexport.runtime.generation.generator import GenerateOptions as GenerateOptions
    from qexport.runtime.generation.generator import Generator as Generator
    from qexport.runtime.generation.generator import open_generator as open_generator
    from qexport.runtime.generation.prompts import Prompt as Prompt
    from qexport.runtime.generation.replies import Completion as Completion
    from qexport.runtime.generation.replies import Token as Token
    from qexport.runtime.generation.stops import Stop as Stop
    from qexport.runtime.sampling.settings import Sampling as Sampling
    from qexport.runtime.session import Session as Session
    from qexport.runtime.session import SessionOptions as SessionOptions
    from qexport.runtime.speculation.proposal import Reference as Reference

_HOMES = {
    "Batcher": "qexport.runtime.embedding.batcher",
    "Completion": "qexport.runtime.generation.replies",
    "Decoder": "qexport.runtime.decoder",
    "embed": "qexport.runtime.embedding.embedder",
    "Embedder": "qexport.runtime.embedding.embedder",
    "EmbedOptions": "qexport.runtime.embedding.options",
    "GenerateOptions": "qexport.runtime.generation.generator",
    "Generator": "qexport.runtime.generation.generator",
    "open_embedder": "qexport.runtime.embedding.embedder",
    "open_generator": "qexport.runtime.generation.generator",
    "open_session": "qexport.runtime.backends.choose",
    "Prompt": "qexport.runtime.generation.prompts",
    "Reference": "qexport.runtime.speculation.proposal",
    "Sampling": "qexport.runtime.sampling.settings",
    "Session": "qexport.runtime.session",
    "SessionOptions": "qexport.runtime.session",
    "Stop": "qexport.runtime.generation.stops",
    "Token": "qexport.runtime.generation.replies",
}

__all__ = [
    "Batcher",
    "Completion",
    "Decoder",
    "EmbedOptions",
    "Embedder",
    "GenerateOptions",
    "Generator",
    "Prompt",
    "Reference",
    "Sampling",
    "Session",
    "SessionOptions",
    "Stop",
    "Token",
    "embed",
    "open_embedder",
    "open_generator",
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
