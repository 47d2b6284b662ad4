import time

import onnx
import onnx_ir as ir

from qexport.passes.match import Names

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (bool c, float[n] x) => (float[n] y) <float[1] k = {1.0}> {
    [inner] h = Mul(x, k)
    y = If (c) <then_branch = t () => (float[n] a) { a = Relu(h) }, else_branch = e () => (float[n] b) { b = Neg(h) }>
}"""


def test_names_of_values_nodes_and_initializers_are_taken_in_branches_too():
    names = Names(ir.from_proto(onnx.parser.parse_model(TEXT)).graph)
    for name in ("c", "x", "y", "k", "h", "a", "b", "inner"):
        assert names.fresh(name) == f"{name}_1"
    assert names.fresh("z") == "z"
    assert [names.fresh("z"), names.fresh("z"), names.fresh("z_1")] == ["z_1", "z_2", "z_1_1"]


def test_many_clashes_cost_no_more_than_their_number():
    names = Names(ir.from_proto(onnx.parser.parse_model(TEXT)).graph)
    started = time.perf_counter()
    found = {names.fresh("x") for _ in range(100_000)}
    assert len(found) == 100_000
    assert time.perf_counter() - started < 5
