"""Shape bombs, M32: small files that ask for huge values are refused before anything is allocated."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qexport.errors import ResourceExhausted
from qexport.exporter.admit import Limits, admit_file, admit_proto, sizes

SIGNATURE = "(float[N,4] x, bool c) => (float[] y)"
BIG = 1 << 40


def parsed(body, weights="", functions="", **initializers):
    head = f'<ir_version: 10, opset_import: ["": 20, "f": 1]> g {SIGNATURE}'
    model = onnx.parser.parse_model(f"{head} <{weights}> {{ {body} }} {functions}")
    for name, array in initializers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


ONE = "float[1] one = {1.0}"
TWO = "float[1] one = {1.0}, int64[1] big = {1099511627776}"
PICTURE = np.zeros((1, 1, 8, 8), np.float32)
WIDE = np.zeros((1, 1 << 18), np.float32)
FILL = '<domain: "f", opset_import: ["": 20]> Fill (s) => (o) { o = ConstantOfShape(s) }'
DEEP = '<domain: "f", opset_import: ["": 20, "f": 1]> Outer (s) => (o) { o = f.Fill(s) }'

BOMBS = [
    ("constant_of_shape", parsed("y = ConstantOfShape(big)", TWO)),
    ("constant_of_shape_in_a_node", parsed("s = Constant <value_ints = [1099511627776]> () y = ConstantOfShape(s)")),
    ("expand", parsed("y = Expand(one, big)", TWO)),
    ("expand_an_input", parsed("y = Expand(x, s)", "int64[3] s = {1048576, 65536, 4}")),
    ("tile", parsed("y = Tile(one, big)", TWO)),
    ("tile_a_little_three_times",
     parsed("a = Tile(one, r) b = Tile(a, r) y = Tile(b, r)", f"{ONE}, int64[1] r = {{65536}}")),
    ("range", parsed("y = Range(a, big, b)", a=np.int64(0), big=np.int64(BIG), b=np.int64(1))),
    ("one_hot", parsed("y = OneHot(i, d, v)", i=np.zeros(1, np.int64), d=np.int64(BIG), v=np.zeros(2, np.float32))),
    ("pad", parsed("y = Pad(one, p)", ONE, p=np.array([0, BIG]))),
    ("pad_one_axis", parsed("y = Pad(x, p, , a)", p=np.array([BIG, 0]), a=np.array([1]))),
    ("resize", parsed("y = Resize(t, , s)", t=PICTURE, s=np.array([1, 1, 1e6, 1e6], np.float32))),
    ("resize_to_sizes", parsed("y = Resize(t, , , s)", t=PICTURE, s=np.array([1, 1, 1 << 20, 1 << 20]))),
    ("eye_like", parsed("e = Expand(one, s) y = EyeLike(e)", ONE, s=np.array([1 << 20, 1 << 20]))),
    ("outer_product", parsed("t = Transpose(w) y = MatMul(t, w)", w=WIDE)),
    ("broadcast", parsed("t = Transpose(w) y = Add(t, w)", w=WIDE)),
    ("concat", parsed("a = Expand(one, s) y = Concat <axis = 0> (" + "a, " * 299 + "a)", ONE, s=np.array([1 << 26]))),
    ("convolution", parsed("y = Conv <pads = [1000000, 1000000, 1000000, 1000000]> (t, k)",
                           t=np.zeros((1, 1, 4, 4), np.float32), k=np.zeros((1, 1, 1, 1), np.float32))),
    ("random", parsed("y = RandomNormal <shape = [1048576, 1048576]> ()")),
    ("window", parsed("y = HannWindow(s)", s=np.int64(BIG))),
    ("computed_shape", parsed("a = Mul(s, s) b = Concat <axis = 0> (a, a) d = Cast <to = 7> (b) y = ConstantOfShape(d)",
                              s=np.array([1 << 12]))),
    ("range_of_a_computed_end", parsed("n = Squeeze(big) o = Sub(n, n) u = Div(n, n) y = Range(o, n, u)", TWO)),
    ("one_hot_of_a_computed_depth",
     parsed("d = Squeeze(big) v = Concat <axis = 0> (big, big) i = Sub(big, big) y = OneHot(i, d, v)", TWO)),
    ("shape_of_a_value",
     parsed("t = Transpose(w) a = Shape(w) b = Shape(t) m = Max(a, b) y = Expand(one, m)", ONE, w=WIDE)),
    ("out_of_order", parsed("y = Expand(one, s) s = Mul(a, a)", ONE, a=np.array([1 << 20]))),
    ("in_a_branch", parsed("y = If(c) <then_branch = t () => (float[] u) { u = ConstantOfShape(big) },"
                           " else_branch = e () => (float[] v) { v = Relu(x) }>", TWO)),
    ("in_a_function", parsed("y = f.Fill(big)", TWO, FILL)),
    ("in_a_function_of_a_function", parsed("y = f.Outer(big)", TWO, FILL + DEEP)),
]  # fmt: skip


@pytest.mark.parametrize("model", [row[1] for row in BOMBS], ids=[row[0] for row in BOMBS])
def test_a_value_larger_than_memory_is_refused_before_it_is_made(model):
    tracemalloc.start()
    try:
        with pytest.raises(ResourceExhausted, match=r"would take \d+ bytes, the limit is 17179869184"):
            admit_proto(model, where="memory")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


SOUND = [
    ("constant_of_shape", parsed("y = ConstantOfShape(s)", s=np.array([1024, 1024]))),
    ("expand", parsed("y = Expand(x, s)", s=np.array([8, 1, 4]))),
    ("reshape",
     parsed("a = Expand(one, s) r = Reshape(a, t) y = Relu(r)", ONE, s=np.array([1 << 20]), t=np.array([1024, -1]))),
    ("shape_that_data_tells", parsed("s = Shape(x) y = ConstantOfShape(s)")),
    ("negative_size", parsed("y = ConstantOfShape(s)", s=np.array([-BIG, -BIG]))),
    ("range_that_never_ends", parsed("y = Range(a, b, d)", a=np.float32(0), b=np.float32(1), d=np.float32(0))),
    ("many_axes", parsed("y = Max(" + ", ".join(f"w{i}" for i in range(2)) + ")",
                         w0=np.zeros((64, 1), np.float32), w1=np.zeros((1, 64), np.float32))),
    ("function_that_nobody_calls", parsed("y = Relu(x)", functions=FILL)),
]  # fmt: skip


@pytest.mark.parametrize("model", [row[1] for row in SOUND], ids=[row[0] for row in SOUND])
def test_a_model_of_ordinary_sizes_is_admitted(model):
    admit_proto(model, where="memory")


def test_many_small_constants_that_broadcast_are_not_multiplied_out():
    shapes = [[64 if axis == index else 1 for axis in range(6)] for index in range(6)]
    model = parsed("y = Max(" + ", ".join(f"w{i}" for i in range(6)) + ")",
                   **{f"w{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)})  # fmt: skip
    tracemalloc.start()
    with pytest.raises(ResourceExhausted, match=f"would take {4 * 64**6} bytes"):
        admit_proto(model, where="memory")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_the_limit_moves_and_the_message_names_node_and_value():
    model = parsed("[fill] y = ConstantOfShape(s)", s=np.array([1024]))
    admit_proto(model, where="memory", limits=Limits(max_value_bytes=4096))
    with pytest.raises(ResourceExhausted) as caught:
        admit_proto(model, where="memory", limits=Limits(max_value_bytes=4095))
    assert "memory: node 'fill' (ConstantOfShape): the value 'y' would take 4096 bytes" in str(caught.value)


def test_a_shape_that_lies_in_an_external_file_is_read(tmp_path):
    (tmp_path / "s.bin").write_bytes(np.array([BIG]).tobytes())
    model = parsed("y = ConstantOfShape(s)", s=np.array([1]))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="s.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ResourceExhausted, match="would take"):
        admit_file(tmp_path / "m.onnx")


def test_types_count_by_their_bits():
    value = helper.make_tensor("v", TensorProto.INT8, [1], [0])
    model = parsed("y = ConstantOfShape(s)", s=np.array([1000]))
    model.graph.node[0].attribute.append(helper.make_attribute("value", value))
    admit_proto(model, where="memory", limits=Limits(max_value_bytes=1000))
    with pytest.raises(ResourceExhausted, match="would take 1000 bytes"):
        admit_proto(model, where="memory", limits=Limits(max_value_bytes=999))


def test_functions_that_call_each_other_twice_are_not_gone_through_a_million_times(monkeypatch):
    calls = []
    real = sizes._result
    monkeypatch.setattr(sizes, "_result", lambda call: calls.append(call) or real(call))
    inner = '<opset_import: ["": 20], domain: "f"> F0 (a) => (b) { b = Relu(a) }'
    head = '<opset_import: ["": 20, "f": 1], domain: "f">'
    for depth in range(1, 19):
        called = f"F{depth - 1}"
        inner += f"{head} F{depth} (a) => (c) {{ b = f.{called}(a) c = f.{called}(b) }}"
    admit_proto(parsed("y = f.F18(x)", functions=inner), where="m")
    assert 0 < len(calls) < 100
