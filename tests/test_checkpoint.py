"""What a recipe made is written down and read back: the same bytes, the same notes, the same when it goes on."""

from __future__ import annotations

import dataclasses

import decoder_models
import encoder_models
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.errors import IntegrityError
from qexport.exporter.admit import Limits
from qexport.exporter.load import load_source
from qexport.exporter.options import BuildOptions
from qexport.exporter.product import requantize, run_recipe
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.resume import checkpoint, journal, shelf
from qexport.exporter.resume.journal import open_journal
from qexport.exporter.samples import open_samples
from qexport.safe_io import Cache

RNG = np.random.default_rng(5)
IMAGES = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 3, 8, 8] x) => (float[n, 10] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Relu(a)  c = Conv <pads = [1, 1, 1, 1]> (r, v)  s = Add(c, r)
    t = Relu(s)  p = GlobalAveragePool(t)  f = Flatten(p)  y = Gemm(f, u, b) }"""


def encoder(folder):
    """Two layers of a sentence encoder; its inputs as calibration wants them."""
    source = encoder_models.write(folder / "encoder", "bert")
    lengths = RNG.integers(3, 12, 12)
    ids = np.zeros((12, 12), np.int64)
    mask = np.arange(12)[None] < lengths[:, None]
    ids[mask] = RNG.integers(1, encoder_models.WORDS, mask.sum())
    return source, {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": np.zeros_like(ids)}


def images(folder):
    """Convolutions with a residual, and a classifier."""
    proto = onnx.parser.parse_model(IMAGES)
    shapes = {"w": (16, 3, 3, 3), "v": (16, 16, 3, 3), "u": (16, 10), "b": (10,)}
    for name, shape in shapes.items():
        array = RNG.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (folder / "images.onnx").write_bytes(proto.SerializeToString())
    return folder / "images.onnx", {"x": RNG.standard_normal((12, 3, 8, 8)).astype(np.float32)}


def decoder(folder):
    """Three layers, the head tied to the table."""
    source = decoder_models.write(folder / "decoder", decoder_models.settle("qwen3"))
    ids = RNG.integers(1, 50, (12, 10))
    return source, {"input_ids": ids, "attention_mask": np.ones_like(ids)}


CASES = [
    (encoder, "int8"),
    (encoder, "smoothquant-o1"),
    (encoder, "float16"),
    (images, "int8"),
    (images, "int8-qlinear"),
    (decoder, "int8"),
    (decoder, "int4-gptq"),
    (decoder, "int4-awq"),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def once(request, tmp_path, monkeypatch):
    """Run a recipe, or recall what it made; returns the product, the samples and the journal."""
    make, name = request.param
    path, data = make(tmp_path)
    np.savez(tmp_path / "calib.npz", **data)
    monkeypatch.setattr(journal, "WORTH", 0.0)
    recipe = override(load_recipe(name), ["export.target=ort-cpu"])
    asked = BuildOptions(cache=tmp_path / "cache")

    def run(**options):
        source = load_source(path)
        samples = open_samples(source, recipe, tmp_path / "calib.npz", None)
        with open_journal(Cache(asked.cache, **options), source, recipe, samples, asked) as known:
            return checkpoint.recipe_once(known, source, recipe, samples, asked), samples, known

    return run


def content(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def kept(product):
    """All that a product is, as bytes and plain values; the passes by what they are told."""
    models = [product.model, product.plain, *([product.snapshot.model] if product.snapshot else [])]
    options = [
        (name, {key: getattr(step, key) for key in step.options()})
        for name, step in (product.snapshot.steps if product.snapshot else ())
    ]
    return [content(model) for model in models], product.steps, product.proofs, product.warnings, options


def test_what_is_recalled_is_what_was_made_and_goes_on_alike(once, monkeypatch):
    made, samples, first = once()
    assert first.resumed == []
    monkeypatch.setattr(checkpoint, "run_recipe", None)
    found, again, second = once()
    assert second.resumed == ["recipe"]
    assert kept(found) == kept(made)
    assert list(notes(found)) == list(notes(made))
    if made.quantized:
        keep = made.quantized[::2]
        one, other = requantize(made, samples, keep), requantize(found, again, keep)
        assert content(one.model) == content(other.model) != content(made.model)
        assert [step.decisions for step in one.steps] == [step.decisions for step in other.steps]


def notes(product):
    """Every note with its type, where it is."""
    for model in (product.model, product.plain, *([product.snapshot.model] if product.snapshot else ())):
        for number, holder in enumerate(shelf.holders(model)):
            for key, note in shelf.notes_of(holder).items():
                yield number, key, plain(note)


def plain(note):
    if isinstance(note, np.ndarray | ir.TensorProtocol):
        array = np.asarray(note.numpy() if isinstance(note, ir.TensorProtocol) else note)
        return str(array.dtype), array.shape, array.tobytes()
    if dataclasses.is_dataclass(note):
        return type(note), [plain(getattr(note, entry.name)) for entry in dataclasses.fields(note)]
    return type(note), note


@pytest.fixture
def product(tmp_path):
    """What int8 makes of convolutions."""
    path, data = images(tmp_path)
    np.savez(tmp_path / "calib.npz", **data)
    source, recipe = load_source(path), override(load_recipe("int8"), ["export.target=ort-cpu"])
    return run_recipe(source, recipe, open_samples(source, recipe, tmp_path / "calib.npz", None), BuildOptions())


def test_a_weight_that_several_models_hold_is_written_once_and_shared_again(product):
    held = [model.graph.initializers for model in (product.plain, product.snapshot.model)]
    shared = [name for name in held[0] if name in held[1] and held[0][name].const_value is held[1][name].const_value]
    assert shared
    found = checkpoint.decode(b"".join(checkpoint.encode(product)))
    ours = [model.graph.initializers for model in (found.plain, found.snapshot.model)]
    assert all(ours[0][name].const_value is ours[1][name].const_value for name in shared)


@pytest.mark.parametrize("note", [object(), {1, 2}, np.array(["text"]), np.float32(1), [1], Limits()], ids=repr)
def test_with_a_note_that_nobody_knows_there_is_no_checkpoint(product, note):
    assert checkpoint.checkpoint(product) is not None
    product.snapshot.model.graph.inputs[0].meta["somebody.else"] = note
    assert checkpoint.checkpoint(product) is None


def test_what_would_not_come_back_as_it_is_has_no_checkpoint(product, monkeypatch):
    """As if reading lost a note."""
    real = shelf.Reader.model

    def forgets(self, told):
        model = real(self, told)
        model.graph.inputs[0].meta.clear()
        return model

    product.model.graph.inputs[0].meta["qexport.flag"] = True
    assert checkpoint.checkpoint(product) is not None
    monkeypatch.setattr(shelf.Reader, "model", forgets)
    assert checkpoint.checkpoint(product) is None


def test_a_checkpoint_that_says_something_else_is_told_and_the_recipe_run_again(tmp_path, monkeypatch):
    path, data = images(tmp_path)
    np.savez(tmp_path / "calib.npz", **data)
    monkeypatch.setattr(journal, "WORTH", 0.0)
    source, recipe = load_source(path), override(load_recipe("int8"), ["export.target=ort-cpu"])
    samples, asked = open_samples(source, recipe, tmp_path / "calib.npz", None), BuildOptions()

    def run(content, **options):
        cache = Cache(tmp_path / "cache", **options)
        with open_journal(cache, source, recipe, samples, asked) as known:
            known.place("recipe", list).write(content)
            checkpoint.recipe_once(known, source, recipe, samples, asked)
        return known

    for content in (b"", b"no checkpoint at all", (2).to_bytes(8, "little") + b"{}"):
        with pytest.raises(IntegrityError, match="says something else"):
            run(content, strict=True)
        known = run(content)
        assert known.resumed == []
        assert "says something else" in known.cache.doubts[0]


def test_what_is_too_large_has_no_checkpoint(product, monkeypatch):
    monkeypatch.setattr(shelf, "MOST", 1000)
    assert checkpoint.checkpoint(product) is None
