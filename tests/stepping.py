"""Read rows with a decoder in the portable layout as an engine does: in pieces, back and again, several at once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.runtime.backends.artefact import load_module
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

ONE = SessionOptions(threads=1)


def opened(model, capacity=16):
    """A decoder whose buffers have to grow."""
    return Decoder(checked(model), ONE, capacity=capacity)


def checked(model):
    """The bytes of a model that the checker has nothing against."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def stepped(decoder, row, context=None):
    """A prompt, single steps, a wrong wide step taken back, the right one, the rest: logits [tokens, vocabulary]."""
    decoder.reset(1, context)
    ids = np.asarray(row)[None]
    pieces = [decoder.extend(ids[:, start:end])[0] for start, end in ((0, 9), (9, 10), (10, 11))]
    wrong = decoder.extend((ids[:, 11:16] + 1) % decoder.signature.vocabulary)
    decoder.rollback(11)
    right = decoder.extend(ids[:, 11:16])
    assert np.abs(right - wrong).max() > 1e-3 * np.abs(right).max()
    return np.concatenate([*pieces, right[0], decoder.extend(ids[:, 16:])[0]])


def ragged(decoder, ids, context=None):
    """Rows of different lengths: a prompt, a step, and pieces of all widths. Pairs of (row, logits of its tokens)."""
    decoder.reset(len(ids), context)
    found, done = [[] for _ in ids], np.zeros(len(ids), int)
    for counts in ((9, 4), (1, 1), (5, 2), (0, 3), (1, 1)):
        tokens = np.full((len(ids), max(counts)), 3)
        for row, count in enumerate(counts):
            tokens[row, :count] = ids[row, done[row] : done[row] + count]
        logits = decoder.extend(tokens, counts)
        for row, count in enumerate(counts):
            found[row].append(logits[row, :count])
        done += counts
    return [np.concatenate(pieces) for pieces in found]


def demand_same(found, truth, most=1e-4):
    """The same numbers, up to ``most``, and the same best tokens."""
    assert found.dtype == np.float32
    assert found.shape == truth.shape
    np.testing.assert_allclose(found, truth, rtol=0, atol=most)
    np.testing.assert_array_equal(found.argmax(-1), truth.argmax(-1))


def same_graph(one, other):
    """Whether two models have the same nodes and weights, wherever their numbers are read from."""
    return ir.to_proto(one).SerializeToString(deterministic=True) == ir.to_proto(other).SerializeToString(
        deterministic=True
    )


def engine_of(model, sizes, columns=64):
    """Build with TensorRT for RTX, which asks for a fixed number of columns: ``sizes`` by name of the axis."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([columns if str(size) == "max_seq" else size for size in value.shape])
    profile = {
        value.name: tuple(
            [size if isinstance(size, int) else sizes[str(size)][end] for size in value.shape] for end in range(3)
        )
        for value in model.graph.inputs
    }
    options = EngineOptions(profiles=(profile,), compute_capabilities=("8.6",))
    return build_engine(checked(model), load_module("tensorrt_rtx"), options)
