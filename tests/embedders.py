"""Tiny encoders with a tokenizer beside them, and the truth about them in numpy."""

from __future__ import annotations

import threading

import numpy as np
import onnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qexport.runtime.embedding.embedder import open_embedder
from qexport.runtime.embedding.options import EmbedOptions

WORDS = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2} | {letter: 3 + index for index, letter in enumerate("abcdefghij")}
WIDTH = 4
TABLE = np.random.default_rng(5).standard_normal((len(WORDS), WIDTH)).astype(np.float32)
INPUTS = "int64[b,s] input_ids, int64[b,s] attention_mask"
HIDDEN = "float[b,s,4] last_hidden_state"
BODY = """{ raw = Gather(table, input_ids)
    last = Constant<value = int64[1] {-1}>()
    middle = Constant<value = int64[1] {1}>()
    seen = Cast<to = 1>(attention_mask)
    weight = Unsqueeze(seen, last)
    kept = Mul(raw, weight)
    context = ReduceSum(kept, middle)
    last_hidden_state = Add(raw, context)
    count = ReduceSum<keepdims = 0>(weight, middle)
    total = ReduceSum<keepdims = 0>(kept, middle)
    sentence_embedding = Div(total, count)
    token_embeddings = Identity(last_hidden_state)
    logits = Identity(sentence_embedding) }"""
"""Hidden states are the rows of the tokens plus the sum of all rows that are no padding."""


def tokenizer(around=True, most=None):
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
    if most is not None:
        made.enable_truncation(most)
    return made


def folder(path, outputs=HIDDEN, inputs=INPUTS, table=TABLE, body=BODY, **asked):
    """Write an encoder with these outputs; returns its folder."""
    text = f'<ir_version: 10, opset_import: ["" : 20]>\ng ({inputs}) => ({outputs}) {body}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    path.mkdir(exist_ok=True)
    (path / "model.onnx").write_bytes(proto.SerializeToString())
    (path / "tokenizer.json").write_text(tokenizer(**asked).to_str())
    return path


def opened(path, **options):
    return open_embedder(path, EmbedOptions(**options))


def ids_of(text, most=None):
    words = [WORDS.get(word, 2) for word in text.split()]
    return [0, *(words if most is None else words[: most - 2]), 1]


def hidden_of(text, most=None, table=TABLE):
    """Hidden states of one text, alone."""
    rows = table[ids_of(text, most)].astype(np.float64)
    return rows + rows.sum(0)


def unit(vector):
    return vector / np.linalg.norm(vector)


class Spy:
    """A session that remembers what it was asked, and can be told to wait or to fail."""

    def __init__(self, session, fails=lambda feeds: False):
        self.session, self.fails = session, fails
        self.batches = []
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Semaphore(0)
        self.closed = 0

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, feeds, outputs=None):
        self.batches.append(feeds["input_ids"].shape)
        self.started.release()
        assert self.go.wait(20)
        if self.fails(feeds):
            raise RuntimeError("the device is gone")
        return self.session.run(feeds, outputs)

    def close(self):
        self.closed += 1


def spied(embedder, **asked):
    """The spy that stands between an embedder and its session from now on."""
    embedder._session = Spy(embedder._session, **asked)
    return embedder._session
