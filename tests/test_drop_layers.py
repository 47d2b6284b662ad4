"""Layers that do least are removed: which ones, how many, what makes up for them, and what is refused."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build
from helpers import Samples, session, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qexport.calibration.cutting.affine import NO_GAIN, NO_NORM, SHARED, SHARES, Affine, Trial, fold, solve
from qexport.calibration.cutting.influence import change, influences
from qexport.calibration.drop_layers import FEW, REPAIRED, SPARED, Layers
from qexport.calibration.few_bits import UNSEEN
from qexport.errors import DataInvalid, UsageError
from qexport.exporter.load import load_model
from qexport.exporter.recipe import Recipe, instantiate
from qexport.exporter.recipe_files import override
from qexport.passes.cleanup import Cleanup
from qexport.passes.match import array, dims
from qexport.passes.pruning.blocks import find_blocks, find_layers, remove

LN = "LayerNormalization<axis=-1>"
FEED = "u{0} = MatMul({1}, w{0}) t{0} = Relu(u{0}) f{0} = MatMul(t{0}, v{0}) h{0} = Add({1}, f{0}) "
WIDTH = 16


def normal(*shape, seed=0, size=1.0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def stack(sizes, *, post=False, tail="out = Relu({0})", outputs="float[b, s, 16] out"):
    """Feed-forward layers whose branches are of these sizes, each normalized behind if asked."""
    text, at, constants = (
        "",
        "a",
        {"gamma": 1 + normal(WIDTH, seed=7, size=0.02), "beta": normal(WIDTH, seed=8, size=0.02)},
    )
    if post:
        text, at = f"y = {LN}(a, gamma, beta) ", "y"
    for i, size in enumerate(sizes):
        constants |= {f"w{i}": normal(WIDTH, 24, seed=i, size=0.3), f"v{i}": normal(24, WIDTH, seed=50 + i, size=size)}
        text += FEED.format(i, at) + (f"y{i} = {LN}(h{i}, gamma, beta) " if post else "")
        at = f"y{i}" if post else f"h{i}"
    return build(text + tail.format(at), f"float[b, s, {WIDTH}] a", outputs, **constants)


def rows(count=24, seed=0):
    return Samples({"a": sample} for sample in normal(count, 5, WIDTH, seed=seed))


def run(model, seed=3):
    return session(model).run(None, {model.graph.inputs[0].name: normal(2, 5, WIDTH, seed=seed)})


def told(outcome):
    return [(d.node, d.action, d.reason) for d in outcome.decisions]


def gone(outcome):
    return [d.node for d in outcome.decisions if d.action == "pruned"]


def left(model):
    return [block.name for block in find_layers(model)]


def bytes_of(model):
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("criterion", ["influence", "change"])
@pytest.mark.parametrize("post", [False, True])
def test_the_layers_that_do_least_are_removed_with_their_weights(criterion, post):
    model = stack([0.3, 0.01, 0.3, 0.02], post=post)
    outcome = Layers(data=rows(), keep=0.5, criterion=criterion)(model)
    assert outcome.modified
    assert sorted(gone(outcome)) == ["Add/h1", "Add/h3"]
    assert left(model) == ["Add/h0", "Add/h2"]
    assert not {"w1", "v1", "w3", "v3"} & set(model.graph.initializers)
    assert [d.action for d in outcome.decisions if d.node in ("Add/h0", "Add/h2")] == ["kept", "kept"]
    assert all(
        d.detail.endswith(f"{2 * WIDTH * 24} parameters fewer") for d in outcome.decisions if d.action == "pruned"
    )
    assert np.sum([d.units for d in outcome.decisions if d.units], axis=0).tolist() == [2, 4]
    assert run(model)[0].shape == (2, 5, WIDTH)


def test_influence_is_one_minus_the_mean_cosine_of_what_goes_in_and_comes_out():
    model, data = stack([0.3, 0.1]), Samples([*rows(3), {"a": normal(9, WIDTH, seed=1)}])
    x = np.concatenate([sample["a"] for sample in data]).astype(np.float64)
    expected = {}
    for i in range(2):
        w, v = (array(model.graph.initializers[f"{name}{i}"]).astype(np.float64) for name in "wv")
        y = x + np.maximum(x @ w, 0) @ v
        cosine = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in zip(x, y, strict=True)]
        expected[f"Add/h{i}"], x = 1 - np.mean(cosine), y
    assert influences(model, find_blocks(model), data) == pytest.approx(expected, rel=1e-4)


def test_channels_of_images_are_vectors_across_pixels():
    body = "c = Conv<kernel_shape=[1,1]>(a, k) h = Add(a, c) out = Relu(h)"
    kernel = normal(3, 3, 1, 1)
    model = build(body, "float[b, 3, 4, 4] a", "float[b, 3, 4, 4] out", k=kernel)
    image = normal(3, 4, 4, seed=1)
    x = image.reshape(3, -1)
    y = x + kernel[:, :, 0, 0] @ x
    cosine = (x * y).sum(0) / np.linalg.norm(x, axis=0) / np.linalg.norm(y, axis=0)
    found = influences(model, find_blocks(model), Samples([{"a": image}]))
    assert found == pytest.approx({"Add/h": 1 - cosine.mean()}, rel=1e-4)


def test_change_is_relative_to_the_output():
    model, other = stack([0.3]), stack([0.3])
    remove(find_blocks(other)[0])
    batch = np.stack([sample["a"] for sample in rows(6)])
    one, two = (session(m).run(None, {"a": batch})[0] for m in (model, other))
    assert change(model, other, rows(6)) == pytest.approx(np.linalg.norm(one - two) / np.linalg.norm(one), rel=1e-4)
    assert change(model, model, rows(6)) == 0


def test_of_two_layers_that_do_the_same_one_stays():
    """Each brings channel 0 up to 5, so that either is of no use as long as the other is there."""
    text = "".join(f"p{i} = MatMul({at}, e) q{i} = Sub(five, p{i}) r{i} = Relu(q{i}) f{i} = MatMul(r{i}, et) "
                   f"h{i} = Add({at}, f{i}) " for i, at in ((0, "a"), (1, "h0")))  # fmt: skip
    unit = np.eye(WIDTH, dtype=np.float32)[:1]
    constants = {"e": unit.T, "et": unit, "five": np.float32(5), "w": normal(WIDTH, WIDTH, size=0.02)}
    text += "f2 = MatMul(h1, w) h2 = Add(h1, f2) out = Relu(h2)"
    model = build(text, f"float[b, s, {WIDTH}] a", f"float[b, s, {WIDTH}] out", **constants)
    outcome = Layers(data=rows(), keep=0.34, criterion="change")(model)
    assert gone(outcome) == ["Add/h0", "Add/h2"]
    assert outcome.decisions[0].detail.startswith("change 0.0000")


@settings(max_examples=6, deadline=None)
@given(keep=st.floats(0.01, 0.99), post=st.booleans(), count=st.integers(1, 4), repair=st.booleans())
def test_as_many_stay_as_the_share_rounds_to_and_outputs_keep_their_shapes(keep, post, count, repair):
    model = stack(np.linspace(0.05, 0.4, count), post=post)
    before = [(value.name, dims(value)) for value in model.graph.outputs]
    asked = Layers(data=rows(4), keep=keep, repair=repair)
    if round(keep * count) < 1:
        stored = bytes_of(model)
        with pytest.raises(UsageError, match="would leave nothing of the model"):
            asked(model)
        assert bytes_of(model) == stored
        return
    outcome = asked(model)
    assert len(left(model)) == round(keep * count)
    assert outcome.modified == (len(left(model)) < count)
    assert [(value.name, dims(value)) for value in model.graph.outputs] == before
    assert run(model)[0].shape == (2, 5, WIDTH)
    stored = bytes_of(model)
    again = asked(model)
    assert (again.modified, told(again)) == (False, [("", "skipped", FEW)])
    assert bytes_of(model) == stored


def test_a_clone_remembers_how_many_layers_there_were():
    model = stack([0.3, 0.1, 0.2, 0.4])
    assert Layers(data=rows(), keep=0.75)(model).modified
    copy = model.clone()
    assert not Layers(data=rows(), keep=0.75)(copy).modified
    assert Layers(data=rows(), keep=0.5)(copy).modified
    assert len(left(copy)) == 2


def test_spared_layers_stay():
    model = stack([0.3, 0.01, 0.2])
    outcome = Layers(data=rows(), keep=0.6, spare=("Add/h1",))(model)
    assert gone(outcome) == ["Add/h2"]
    assert ("Add/h1", "kept", SPARED) in told(outcome)


def test_samples_come_from_all_over_those_that_are_not_held_out():
    zeros = Samples([{"a": np.zeros((5, WIDTH), np.float32)}] * 12)
    model = stack([0.3, 0.1])
    used, held_out = rows(130), [{"a": np.full((5, WIDTH), np.nan, np.float32)}] * 300
    whole = influences(model, find_blocks(model), used[:128:2])
    outcome = Layers(data=Samples([*used, *held_out]), keep=0.5, samples=130, repair=False)(model)
    assert outcome.decisions[0].detail.startswith(f"influence {whole['Add/h1']:.4f}")
    assert Layers(data=zeros, keep=0.5)(stack([0.3, 0.1])).modified  # zeros are like zeros


def affine_layer(*, bias=True, shared=False):
    """Two layers; all that the second does is to scale and move channels."""
    scale = np.linspace(0.2, 1.5, WIDTH)
    eye = np.concatenate([np.diag(scale), -np.diag(scale)], 0)
    body = f"y = {LN}(a, gamma{', beta' if bias else ''}) u = MatMul(y, w) t = Relu(u) f = MatMul(t, v) h = Add(y, f) "
    body += f"z = {LN}(h, gamma, beta) q = MatMul(z, m) " + ("out = Mul(q, y)" if shared else "out = Relu(q)")
    return build(
        body, f"float[b, s, {WIDTH}] a", f"float[b, s, {WIDTH}] out",
        gamma=1 + normal(WIDTH, seed=7, size=0.3), beta=normal(WIDTH, seed=8, size=0.5), m=normal(WIDTH, WIDTH),
        w=np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)], 1).astype(np.float32), v=eye.astype(np.float32),
    )  # fmt: skip


def behind_another(model):
    """The model with a layer in front that changes much and is spared."""
    graph = model.graph
    first, source = graph[0], graph.inputs[0]
    product = ir.node("MatMul", [source, graph.initializers["m"]], name="front/MatMul")
    total = ir.node("Add", [source, product.outputs[0]], name="front/Add")
    for node in (product, total):
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{node.name}:0", source.type, source.shape
    graph.insert_before(first, [product, total])
    first.replace_input_with(0, total.outputs[0])
    return model


def drop_last(model, data=None, **options):
    return Layers(data=rows(64) if data is None else data, keep=0.5, spare=("front/Add",), **options)(model)


@pytest.mark.parametrize("bias", [True, False])
def test_the_norm_in_front_makes_up_for_a_layer_without_a_node_more(bias):
    whole = behind_another(affine_layer(bias=bias))
    plain, fitted = whole.clone(), whole.clone()
    told_plain, told_fitted = (drop_last(m, repair=r) for m, r in ((plain, False), (fitted, True)))
    assert gone(told_plain) == gone(told_fitted) == ["Add/h"]
    assert ("LayerNormalization/y", "folded", REPAIRED) in told(told_fitted)
    assert len(plain.graph) == len(fitted.graph)
    fresh = rows(32, seed=9)
    assert change(whole, fitted, fresh) < 0.6 * change(whole, plain, fresh)
    shared = fitted.graph.initializers.get("beta")
    assert shared is None or np.array_equal(array(shared), array(whole.graph.initializers["beta"])) == (not bias)


def test_a_layer_that_others_read_beside_or_that_no_norm_feeds_is_not_repaired():
    told_shared = told(drop_last(behind_another(affine_layer(shared=True))))
    assert ("Add/h", "skipped", SHARED) in told_shared
    assert ("Add/h1", "skipped", NO_NORM) in told(Layers(data=rows(), keep=0.5)(stack([0.3, 0.01])))


def test_what_does_not_help_on_the_other_half_is_left_out():
    """Every other sample is the negative of the one before, and so is all that is to be made up for."""
    model = behind_another(affine_layer(bias=False))
    mixed = np.concatenate([normal(WIDTH, WIDTH), -normal(WIDTH, WIDTH)])
    model.graph.initializers["v"].const_value = ir.tensor(mixed, name="v")
    base = normal(1, WIDTH, seed=4)
    data = Samples({"a": (-1) ** i * (base + normal(5, WIDTH, seed=5, size=0.01 + 0.001 * i))} for i in range(8))
    assert ("Add/h", "skipped", NO_GAIN) in told(drop_last(model, data))
    alone = Layers(data=rows(1), keep=0.5)(stack([0.3, 0.2], post=True))
    assert NO_GAIN in {d.reason for d in alone.decisions}


def test_the_line_is_that_of_least_squares():
    x, y = normal(50, 3), normal(50, 3, seed=1) + np.array([1, 2, 3])
    x[:, 2] = 4
    sums = np.stack([np.full(3, 50.0), x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)]).astype(np.float64)
    found = solve(sums, Trial(1.0, scale=True, offset=True))
    for i in range(2):
        assert np.polyfit(x[:, i], y[:, i], 1) == pytest.approx([found.scale[i], found.offset[i]], abs=1e-4)
    assert [found.scale[2], found.offset[2]] == pytest.approx([1, y[:, 2].mean() - 4], abs=1e-4)
    through = solve(sums, Trial(1.0, scale=True, offset=False))
    assert through.scale == pytest.approx((x * y).sum(0) / (x * x).sum(0), rel=1e-4)
    half = solve(sums, Trial(0.5, scale=True, offset=True))
    assert half.scale == pytest.approx((1 + found.scale) / 2)
    assert max(SHARES) == 1


def test_norms_without_an_offset_are_scaled_alone():
    model = build("y = RMSNormalization<axis=-1>(a, gamma) out = Relu(y)", "float[b, s, 16] a", gamma=normal(WIDTH))
    before = array(model.graph.initializers["gamma"])
    fold(model.graph[0], Affine(np.full(WIDTH, 2.0), np.zeros(WIDTH)))
    assert np.allclose(array(model.graph[0].inputs[1]), 2 * before)
    assert len(model.graph[0].inputs) == 2


def test_what_cannot_be_is_refused_before_any_edit():
    model = stack([0.3, 0.1])
    before = bytes_of(model)
    for keep in (0.0, 1.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="share between 0 and 1") as error:
            Layers(keep=keep)
        assert error.value.where == "layers.keep"
    with pytest.raises(UsageError, match="no layer is called 'Add/h7'") as error:
        Layers(data=rows(), keep=0.5, spare=("Add/h7",))(model)
    assert (error.value.where, error.value.hint) == ("layers.spare", "did you mean 'Add/h1'?")
    with pytest.raises(UsageError, match="1 of 2 layers are to go, 0 can") as error:
        Layers(data=rows(), keep=0.5, spare=("Add/h0", "Add/h1"))(model)
    with pytest.raises(UsageError, match="calibration data"):
        Layers()(model)
    with pytest.raises(DataInvalid, match="NaN or infinity"):
        Layers(data=Samples([{"a": np.full((5, WIDTH), np.nan, np.float32)}]))(stack([0.3] * 4))
    assert told(Layers(data=Samples(), keep=0.5)(model)) == [("", "skipped", UNSEEN)]
    assert bytes_of(model) == before


def test_a_model_without_residual_blocks_is_an_error_or_left_alone():
    model = build("out = MatMul(a, w)", "float[b, s, 16] a", "float[b, s, 16] out", w=normal(WIDTH, WIDTH))
    with pytest.raises(UsageError, match="the model has no residual layers"):
        Layers(data=rows())(model)
    outcome = Layers(data=rows(), missing="skip")(model)
    assert (outcome.modified, told(outcome)) == (False, [("", "skipped", "no residual layers")])


def test_caches_that_are_outputs_keep_layers_in():
    attend = "k = MatMul(a, w) kt = Transpose<perm=[0,2,1]>(k) z = MatMul(a, kt) p = Softmax(z) c = MatMul(p, a) "
    told_outputs = "float[b, s, 16] out, float[b, s, 16] k"
    body = attend + "o = MatMul(c, w) h = Add(a, o) out = Relu(h)"
    model = build(body, "float[b, s, 16] a", told_outputs, w=normal(WIDTH, WIDTH))
    with pytest.raises(UsageError, match="no layer can be removed, 'Add/h': its cache is an output of the model"):
        Layers(data=rows())(model)
    outcome = Layers(data=rows(), missing="skip")(model)
    assert told(outcome) == [("Add/h", "skipped", "its cache is an output of the model")]


def test_quantized_models_are_left_alone():
    body = "q = QuantizeLinear(a, one, zero) x = DequantizeLinear(q, one, zero) out = MatMul(x, w)"
    told_constants = {"one": np.float32(1), "zero": np.int8(0), "w": normal(WIDTH, WIDTH)}
    model = build(body, "float[b, s, 16] a", "float[b, s, 16] out", **told_constants)
    assert told(Layers(data=rows())(model)) == [("", "skipped", "already quantized")]


def test_recipes_set_its_options():
    recipe = override(Recipe(name="one", step=[{"pass": "layers"}]), ["layers.keep=0.5", "layers.unit=block"])
    ((_, step),) = instantiate(recipe, {"data": rows()})
    assert (step.keep, step.unit) == (0.5, "block")
    with pytest.raises(UsageError, match="criterion"):
        override(recipe, ["layers.criterion=size"])


WORDS = 2000


def without(folder, path, dropped=()):
    """A folder of the model with few words and without some layers, the others numbered anew."""
    config = json.loads((folder / "config.json").read_text())
    kept = [i for i in range(config["num_hidden_layers"]) if i not in dropped]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        head, mark, rest = name.partition("encoder.layer.")
        number, _, tail = rest.partition(".")
        if not mark or int(number) in kept:
            tensors[f"{head}{mark}{kept.index(int(number))}.{tail}" if mark else name] = tensor
    words = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[words] = tensors[words][:WORDS].copy()
    config["vocab_size"] = WORDS
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(kept)}))
    save_file(tensors, path / "model.safetensors")
    for extra in ("modules.json", "1_Pooling/config.json"):
        if (folder / extra).is_file():
            (path / extra).parent.mkdir(exist_ok=True)
            write(path / extra, (folder / extra).read_bytes())
    return path


def test_minilm_without_two_layers_is_the_model_that_is_built_without_them(minilm, tmp_path):
    reference = load_model(without(minilm, tmp_path / "four", (2, 4)))
    model = Cleanup()(load_model(without(minilm, tmp_path / "six"))).model
    names = ("input_ids", "attention_mask", "token_type_ids")
    tokens = np.random.default_rng(0).integers(WORDS // 2, WORDS, (2, 9))
    data = Samples({name: row if name == names[0] else np.full(9, name == names[1], np.int64) for name in names}
                   for row in tokens)  # fmt: skip
    spare = tuple(f"encoder.layer.{i}.output/Add" for i in (0, 1, 3, 5))
    outcome = Layers(data=data, keep=4 / 6, spare=spare, repair=False)(model)
    assert sorted(gone(outcome)) == ["encoder.layer.2.output/Add", "encoder.layer.4.output/Add"]
    assert all("1,774,464 parameters fewer" in d.detail for d in outcome.decisions if d.action == "pruned")
    size = [sum(v.const_value.size for v in m.graph.initializers.values()) for m in (model, Cleanup()(reference).model)]
    assert size[0] == size[1]
    feeds = {name: np.stack([sample[name] for sample in data]) for name in names}
    for one, other in zip(session(model).run(None, feeds), session(reference).run(None, feeds), strict=True):
        assert np.abs(one - other).max() < 1e-5
