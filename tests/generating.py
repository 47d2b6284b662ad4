"""Folders of tiny decoders as ``export`` writes them, with a tokenizer of as many tokens, for tests of generation."""

from __future__ import annotations

import json
from pathlib import Path

import cached_models
import numpy as np
from cached_models import Tiny, forward, portable, serialized
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qexport.runtime.generation.generator import GenerateOptions, open_generator
from qexport.runtime.session import SessionOptions
from qexport.safe_io import digest_bytes

END = "<end>"
ONE = SessionOptions(threads=1)
# Bytes of é, ß and 😀 as byte-level tokenizers write them, which no merge puts together.
BYTES = [*"ÃĠ©Ł", "ð", "ĺ", "Ģ", "Ċ", "."]
WORDS = ["th", "he", "Ġa", "Ġt", "ab", "ba", "Ġth", "the", "Ġthe", "ing", "an", "and", "Ġand"]


def tokenizer(end=END):
    """Byte-level, 50 tokens of which the first ends a text."""
    names = [end, *"abcdefghijklmnopqrstuvwxyz", *BYTES, "z1", *WORDS]
    assert len(set(names)) == len(names) == cached_models.VOCABULARY
    made = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([end])
    return made


def near(tiny, amount, seed=7):
    """A model that mostly says the same: its weights, disturbed."""
    rng, weights = np.random.default_rng(seed), {}
    for name, array in tiny.weights.items():
        noise = rng.standard_normal(array.shape) * array.std() * amount
        weights[name] = (array + noise).astype(np.float32)
    return made_of(weights, tiny.positions)


def made_of(weights, positions=1024):
    made = Tiny(positions=positions)
    made.weights = weights
    return made


def broken(*tokens):
    """A model that has no numbers after some tokens."""
    weights = {name: array.copy() for name, array in Tiny().weights.items()}
    weights["table"][list(tokens)] = float("nan")
    return made_of(weights)


def write_folder(folder: Path, tiny=None, made=None, **settings):
    """An export: a graph, a tokenizer, settings, and a manifest that vouches for them."""
    folder.mkdir()
    files = {
        "model.onnx": serialized(portable(tiny or Tiny())),
        "tokenizer.json": (made or tokenizer()).to_str().encode(),
        "generation_config.json": json.dumps({"eos_token_id": 0, **settings}).encode(),
        "tokenizer_config.json": json.dumps({"bos_token": END}).encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    seal(folder)
    return folder


def seal(folder):
    """Write the manifest anew."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    data = {name: (folder / name).read_bytes() for name in names}
    files = {name: {"bytes": len(found), "digest": digest_bytes(found)} for name, found in data.items()}
    (folder / "manifest.json").write_text(json.dumps({"schema": "qexport.manifest/1", "files": files}))


def opened(target, draft=None, **asked):
    return open_generator(target, draft=draft, options=GenerateOptions(session=ONE, **asked))


def greedy(tiny, prompt, count):
    """What a model says, one token after the other, by the reference in numpy."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(forward(tiny, ids)[-1].argmax()))
    return ids[len(prompt) :]


def pools(generator):
    """What a generator keeps for the next request."""
    models = [model for model in (generator.target, generator.draft) if model is not None]
    chains = [model.__dict__.get("_chains") for model in models]
    return [owner._idle for owner in (*models, *chains) if owner is not None]


def kept(generator):
    """Caches that wait for the next request; all others belong to one that is under way."""
    return {thing._cache for pool in pools(generator) for thing in pool._things}
