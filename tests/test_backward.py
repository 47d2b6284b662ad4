"""Whole models differentiated: values asked for, what is refused and why, and the sample models."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model_from, session

from qexport.calibration.gradients.backward import cotangent, differentiate, gradient
from qexport.calibration.reading.data import DataSpec, input_specs, open_dataset
from qexport.errors import UsageError
from qexport.exporter.load import load_model, load_source
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override


def test_casts_between_floats_pass_and_integers_stop():
    text = """g (float[3] x) => (float[3] y) { d = Cast <to = 11> (x)  s = Mul(d, d)  i = Cast <to = 7> (x)
        j = Cast <to = 11> (i)  t = Mul(s, j)  y = Cast <to = 1> (t) }"""
    x = np.array([1.5, -2.5, 3.25], "f")
    told = {"x": x, cotangent("y"): np.ones(3, "f")}
    (found,) = session(differentiate(model_from(text), ["x"])).run([gradient("x")], told)
    np.testing.assert_allclose(found, 2 * x * np.trunc(x))


def test_dropout_of_inference_passes_and_of_training_is_refused():
    text = """g (float[3] x) => (float[3] y) {{ r = Constant <value = float {{0.5}}> ()
        t = Constant <value = bool {{{}}}> ()  y = Dropout(x, r, t) }}"""
    differentiate(model_from(text.format(0)), ["x"])
    with pytest.raises(UsageError, match="may drop values at random"):
        differentiate(model_from(text.format(1)), ["x"])


def test_inner_values_weights_and_inputs_at_once():
    text = "g (float[n, 4] x) => (float[n, 3] y) { h = MatMul(x, w)  r = Tanh(h)  y = MatMul(r, v) }"
    rng = np.random.default_rng(0)
    x, w, v, u = (rng.standard_normal(shape).astype("f") for shape in [(5, 4), (4, 6), (6, 3), (5, 3)])
    model = model_from(text, w=w, v=v)
    found = differentiate(model, ["w", "r", "x", "v", "y"])
    assert [value.name for value in found.graph.outputs] == ["y", *map(gradient, ["w", "r", "x", "v", "y"])]
    assert [value.name for value in found.graph.inputs] == ["x", cotangent("y")]
    y, dw, dr, dx, dv, dy = session(found).run(None, {"x": x, cotangent("y"): u})
    r = np.tanh(x @ w)
    dh = (u @ v.T) * (1 - r * r)
    for one, other in [(y, r @ v), (dr, u @ v.T), (dw, x.T @ dh), (dx, dh @ w.T), (dv, r.T @ u), (dy, u)]:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_no_output_reads_has_a_gradient_of_zero_and_integers_outputs_none():
    text = """g (float[n, 4] x) => (float[n, 4] y, int64[n, 1] best) { y = Mul(x, w)  lost = Mul(x, v)
        best = ArgMax(lost) }"""
    model = model_from(text, w=np.ones(4, "f"), v=np.ones(4, "f"))
    found = differentiate(model, ["w", "v", "lost"])
    assert len(found.graph.inputs) == 2
    x = np.ones((2, 4), "f")
    dw, dv, dlost = session(found).run([gradient(n) for n in ("w", "v", "lost")], {"x": x, cotangent("y"): x})
    assert (dw == 2).all()
    assert not dv.any()
    assert not dlost.any()
    assert dlost.shape == (2, 4)


def test_only_outputs_that_are_asked_for_count():
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Mul(x, x)  z = Exp(x) }"
    found = differentiate(model_from(text), ["x"], ["z"])
    assert [value.name for value in found.graph.inputs] == ["x", cotangent("z")]
    x = np.array([0.5, 1], "f")
    np.testing.assert_allclose(session(found).run(None, {"x": x, cotangent("z"): x})[2], x * np.exp(x), rtol=1e-6)


def test_the_model_that_is_given_stays_as_it_is():
    text = "g (float[n, 4] x) => (float[n, 3] y) { h = Identity(x)  y = MatMul(h, w) }"
    model = model_from(text, w=np.ones((4, 3), "f"))
    model.graph[0].outputs[0].shape = None
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    differentiate(model, ["w"])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


REFUSED = [
    ("y = Det(x)", "no gradient through Det"),
    ("y = com.microsoft.FastGelu(x)", "no gradient through com.microsoft.FastGelu"),
    ("v, i = TopK(x, k)  y = Mul(v, v)", "no gradient through TopK"),
    ('y = Einsum <equation = "ijk->ij"> (x)', "sums over an axis of one factor"),
    ('y = DepthToSpace <blocksize = 2, mode = "CRD"> (q)', "pixel shuffling"),
    ("y, m = MaxPool <kernel_shape = [2]> (x)  z = Cast <to = 1> (m)", None),
    ("y, m = LayerNormalization(x, s)  z = Mul(m, m)", "further outputs are read"),
    ("f = QuantizeLinear(x, one)  y = DequantizeLinear(f, one)", "no gradient through QuantizeLinear"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_what_has_no_rule_is_refused_by_name(body, reason):
    ends = "float[] y, float[] z" if "z =" in body else "float[] y"
    head = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
    weights = {"k": np.array([2]), "s": np.ones(6, "f"), "one": np.array(1, "f")}
    text = f"g (float[2, 4, 6] x, float[1, 4, 2, 2] q) => ({ends}) {{ {body} }}"
    proto = onnx.parser.parse_model(f"{head}\n{text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = f"the {node.op_type}"
    if reason is None:
        differentiate(model, ["x"])
        return
    with pytest.raises(UsageError, match=reason) as error:
        differentiate(model, ["x", "q"])
    assert error.value.where.startswith("node 'the ")
    assert error.value.hint


def test_what_lies_aside_of_the_path_needs_no_rule():
    text = "g (float[2, 2] x, float[2, 2] z) => (float[2, 2] y) { d = Det(z)  h = Mul(x, x)  y = Mul(h, d) }"
    differentiate(model_from(text), ["x"])
    with pytest.raises(UsageError, match="Det"):
        differentiate(model_from(text), ["x", "z"])


def test_a_subgraph_that_reads_a_value_on_the_path_is_refused():
    text = """g (float[2] x, bool c) => (float[2] y) { h = Mul(x, x)
        y = If (c) <then_branch = t () => (float[2] a) { a = Neg(h) },
            else_branch = e () => (float[2] b) { b = Exp(h) }> }"""
    with pytest.raises(UsageError, match="no gradient through If"):
        differentiate(model_from(text), ["x"])


@pytest.mark.parametrize(
    ("wrt", "outputs", "what"),
    [
        (["nothing"], None, "no value is called 'nothing'"),
        (["i"], None, "value 'i' has no gradient"),
        (["x"], ["j"], "no float output called 'j'"),
        (["x"], ["nothing"], "no float output called 'nothing'"),
        (["x"], [], "no float output"),
    ],
)
def test_names_that_do_not_fit_are_told(wrt, outputs, what):
    text = "g (float[2] x, int64[2] i) => (float[2] y, int64[2] j) { y = Neg(x)  j = Neg(i) }"
    with pytest.raises(UsageError, match=what):
        differentiate(model_from(text), wrt, outputs)


def test_old_opsets_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match="raise-opset"):
        differentiate(model_from("g (float[2] x) => (float[2] y) { y = Neg(x) }", opset=16), ["x"])


def weight(model, name):
    return model.graph.initializers[name].const_value.numpy()


def movable(model, names):
    """The model with some weights as inputs."""
    work = model.clone()
    for name in names:
        value = work.graph.initializers.pop(name)
        value.const_value = None
        work.graph.inputs.append(value)
    return session(work)


def directional(model, feeds, names, step):
    """Slopes along random directions of weights: by the gradients, and by differences of fourth order.

    The model runs in float, so steps are large; sums are in double.
    """
    rng = np.random.default_rng(3)
    floats = [value.name for value in model.graph.outputs if value.dtype == ir.DataType.FLOAT]
    held = {name: np.asarray(weight(model, name)) for name in names}
    run = movable(model, names).run
    u = {name: rng.standard_normal(y.shape) for name, y in zip(floats, run(floats, feeds | held), strict=True)}
    told = {cotangent(name): array.astype("f") for name, array in u.items()}
    grads = session(differentiate(model, names)).run(list(map(gradient, names)), feeds | told)
    pairs = []
    for _ in range(3):
        along = {name: (rng.standard_normal(array.shape) * array.std()).astype("f") for name, array in held.items()}
        ends = []
        for size in (step, -step, 2 * step, -2 * step):
            outputs = run(floats, feeds | {name: held[name] + np.float32(size) * along[name] for name in names})
            ends.append(sum(np.vdot(a, y) for a, y in zip(u.values(), outputs, strict=True)))
        slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * step)
        pairs.append((sum(np.vdot(g.astype("d"), a) for g, a in zip(grads, along.values(), strict=True)), slope))
    return np.array(pairs).T


def first(path, model, **kinds):
    return {name: array[None] for name, array in next(iter(open_dataset(path, input_specs(model), **kinds))).items()}


def test_slopes_of_minilm_agree_with_differences(minilm, samples):
    source = load_source(minilm)
    spec = DataSpec(max_length=24)
    text = samples / "data/stsb-calibration.csv"
    feeds = first(text, source.model, spec=spec, tokenizer=source.tokenizer)
    layer = [n for n, v in source.model.graph.initializers.items() if ".layer.3." in n and v.dtype == ir.DataType.FLOAT]
    assert len(layer) == 16
    found, wanted = directional(source.model, feeds, layer, 2e-3)
    np.testing.assert_allclose(found, wanted, rtol=5e-3)


@pytest.mark.parametrize("target", [None, "ort-cpu"])
def test_slopes_of_a_decoder_agree_with_differences(samples, target):
    source = load_source(samples / "decoder/stories260k")
    model = source.model if target is None else fused(source.model, target)
    feeds = first(samples / "decoder/calibration.txt", model, spec=DataSpec(max_length=16), tokenizer=source.tokenizer)
    held = model.graph.initializers.items()
    names = [name for name, value in held if value.dtype == ir.DataType.FLOAT and len(value.shape) == 2]
    assert any(node.op_type == "Attention" for node in model.graph) == (target is not None)
    found, wanted = directional(model, feeds, names, 1e-3)
    np.testing.assert_allclose(found, wanted, rtol=5e-3)


@pytest.mark.parametrize(("bend", "step", "near"), [("Softplus", 5e-4, 2e-3), ("Relu", 1e-4, 2e-2)])
def test_slopes_of_a_convolutional_network_agree_with_differences(samples, bend, step, near):
    """Differences run into the kinks of Relu, which a smooth function in its place has not."""
    model = load_model(samples / "resnet20/resnet20.onnx")
    for node in model.graph:
        node.op_type = bend if node.op_type == "Relu" else node.op_type
    with np.load(samples / "resnet20/calibration.npz") as told:
        pixels = told["images"][:2]
    feeds = {"input": ((pixels / 255 - 0.45) / 0.25).astype("f").transpose(0, 3, 1, 2)}
    names = [node.inputs[1].name for node in model.graph if node.op_type in ("Conv", "Gemm")]
    found, wanted = directional(model, feeds, names, step)
    np.testing.assert_allclose(found, wanted, rtol=near)


def fused(model, target):
    recipe = override(load_recipe("float32"), [f"export.target={target}"])
    for _, step in instantiate(recipe, {"target": target}):
        model = step(model).model
    return model
