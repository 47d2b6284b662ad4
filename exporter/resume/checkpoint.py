"""What a recipe made of a model, written down: an equal build goes on from there.

Models, records and notes lie on a shelf (``shelf.py``). Before it is kept a checkpoint is read back and written again,
which must give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from qexport.calibration.statistics.store import Store
from qexport.exporter.load import Source
from qexport.exporter.options import BuildOptions
from qexport.exporter.product import Product, Snapshot, run_recipe, steps_of
from qexport.exporter.recipe import Recipe
from qexport.exporter.resume import journal as journals
from qexport.exporter.resume.journal import Journal
from qexport.exporter.resume.shelf import Buffer, Reader, Unknown, Writer
from qexport.exporter.samples import Samples
from qexport.passes.base import Pass

RECIPE = "recipe"
_LENGTH = 8


def recipe_once(journal: Journal, source: Source, recipe: Recipe, samples: Samples, asked: BuildOptions) -> Product:
    """Run the recipe, or take what an equal build has made with it.

    Raises:
        QexportError: What ``run_recipe`` raises, or the cache is not to be trusted.
    """
    place = journal.place(RECIPE, list)
    content = None if place is None else place.read()
    if place is not None and content is not None:
        try:
            known = decode(content)
        except (Unknown, ValueError, KeyError, IndexError, TypeError) as error:
            place.reject(f"it says something else: {type(error).__name__}")
        else:
            journal.note(RECIPE)
            return _with_steps(known, steps_of(recipe, samples, Store(journal.cache)))
    start = time.perf_counter()
    product = run_recipe(source, recipe, samples, asked, journal.cache)
    if place is not None and time.perf_counter() - start >= journals.WORTH:
        doubts = journal.cache.doubts
        written = checkpoint(replace(product, warnings=tuple(w for w in product.warnings if w not in doubts)))
        if written is not None:
            place.write(*written)
    return product


def checkpoint(product: Product) -> list[Buffer] | None:
    """Write a product down; ``None`` where something of it would not come back as it is."""
    try:
        written = encode(product)
        again = encode(_read(*written[1:], shared=True))
        return written if _digest(again) == _digest(written) else None
    except (Unknown, ValueError, KeyError, IndexError, TypeError):
        return None


def encode(product: Product) -> list[Buffer]:
    """Write a product down, but for the passes that are to be run over its snapshot.

    Returns:
        It in pieces, of which those of weights are the weights themselves, so that they take no memory.

    Raises:
        Unknown: Something of it cannot be written.
    """
    shelf, snapshot = Writer(), product.snapshot
    told = {
        "model": shelf.model(product.model),
        "plain": shelf.model(product.plain),
        "snapshot": None if snapshot is None else [shelf.model(snapshot.model), snapshot.before],
        "steps": shelf.value(product.steps),
        "proofs": shelf.value(product.proofs),
        "warnings": shelf.value(product.warnings),
        "blobs": shelf.sizes,
    }
    head = json.dumps(told).encode()
    return [len(head).to_bytes(_LENGTH, "little"), head, *shelf.blobs]


def _digest(pieces: Iterable[Buffer]) -> bytes:
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def decode(content: bytes) -> Product:
    """Read what ``encode`` wrote; the snapshot has no passes yet."""
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    head = content[_LENGTH:start]
    ends = list(itertools.accumulate(json.loads(head)["blobs"], initial=start))
    if ends[-1] != len(content):
        raise ValueError("a checkpoint of another size than it says")
    return _read(head, *(memoryview(content)[a:b] for a, b in itertools.pairwise(ends)), shared=False)


def _read(head: Buffer, *blobs: Buffer, shared: bool) -> Product:
    """Read pieces; ``shared`` leaves numbers where they are, for a look alone: runtimes want them aligned."""
    told = json.loads(bytes(head))
    shelf = Reader(blobs, shared=shared)
    held = told["snapshot"]
    return Product(
        shelf.model(told["model"]),
        shelf.value(told["steps"]),
        shelf.value(told["proofs"]),
        shelf.model(told["plain"]),
        shelf.value(told["warnings"]),
        None if held is None else Snapshot(shelf.model(held[0]), (), held[1]),
    )


def _with_steps(product: Product, steps: Sequence[tuple[str, Pass]]) -> Product:
    """The product with the passes that are to be run over its snapshot, out of all."""
    snapshot = product.snapshot
    if snapshot is None:
        return product
    return replace(product, snapshot=replace(snapshot, steps=tuple(steps[snapshot.before :])))
