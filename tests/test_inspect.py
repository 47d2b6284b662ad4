from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import call

import qexport
from qexport.errors import UsageError
from qexport.exporter.looking.inspect import inspect_model

FLOAT = "float[n, 32] x"


def parse(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(proto)


def matmul() -> ir.Model:
    text = "g (float[n, 32] x) => (float[n, 8] y) { h = Relu(x)\n y = MatMul(h, w) }"
    return parse(text, w=np.ones((32, 8), np.float32))


def qdq(weight: str = "DequantizeLinear(wq, s, z)") -> ir.Model:
    text = f"""g (float[n, 32] x) => (float[n, 8] y) {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        w = {weight}
        y = MatMul(d, w)
    }}"""
    return parse(text, s=np.float32(0.1), z=np.int8(0), wq=np.ones((32, 8), np.int8))


def test_inputs_outputs_and_opsets_are_told() -> None:
    found = inspect_model(matmul())
    assert [(port.name, port.dtype, port.shape) for port in found.inputs] == [("x", "float32", ("n", 32))]
    assert [(port.name, port.shape) for port in found.outputs] == [("y", ("n", 8))]
    assert found.opsets == {"": 21}


def test_operators_parameters_and_bytes_are_counted() -> None:
    found = inspect_model(qdq())
    assert found.ops == {"DequantizeLinear": 2, "QuantizeLinear": 1, "MatMul": 1}
    assert found.nodes == 4
    assert found.parameters == 32 * 8 + 2
    assert found.weight_bytes == {"int8": 32 * 8 + 1, "float32": 4}


def test_a_file_is_inspected_from_python_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(qdq()).SerializeToString())
    found = qexport.inspect(path)
    assert (found.precision, found.ops) == (inspect_model(qdq()).precision, inspect_model(qdq()).ops)
    told = json.loads(call(capsys, "inspect", str(path), "--json")[1])
    assert told == {"schema": "qexport.inspect/1", **found.model_dump(mode="json")}
    with pytest.raises(UsageError, match="no such file or folder"):
        qexport.inspect(str(tmp_path / "n.onnx"))


def test_a_float_layer_is_float_even_where_its_input_carries_no_type() -> None:
    model = matmul()
    assert next(iter(model.graph.all_nodes())).outputs[0].dtype is None
    found = inspect_model(model)
    assert found.precision == {"float32 x float32": 1}
    assert not found.quantized
    assert next(iter(model.graph.all_nodes())).outputs[0].dtype is None


def test_a_layer_is_seen_through_its_quantizers() -> None:
    found = inspect_model(qdq())
    assert found.precision == {"int8 x int8": 1}
    assert found.quantized


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("Transpose <perm = [0, 1]> (DequantizeLinear(wq, s, z))", "int8 x int8"),
        ("Cast <to = 1> (DequantizeLinear(wq, s, z))", "int8 x int8"),
        ("Relu(DequantizeLinear(wq, s, z))", "int8 x float32"),
    ],
)
def test_only_operators_that_move_data_are_looked_through(between: str, expected: str) -> None:
    outer, _, inner = between.partition("(DequantizeLinear")
    text = f"""g (float[n, 32] x) => (float[n, 8] y) {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear{inner.removesuffix(")")}
        w = {outer} (v)
        y = MatMul(d, w)
    }}"""
    model = parse(text, s=np.float32(0.1), z=np.int8(0), wq=np.ones((32, 8), np.int8))
    assert inspect_model(model).precision == {expected: 1}


def test_unsigned_and_default_types_of_quantizelinear_are_told() -> None:
    text = """g (float[n, 32] x) => (float[n, 8] y) {{
        q = QuantizeLinear {attribute} (x, s{zero})
        d = DequantizeLinear(q, s{zero})
        y = MatMul(d, w)
    }}"""
    weights = {"s": np.float32(0.1), "w": np.ones((32, 8), np.float32)}
    plain = parse(text.format(attribute="", zero=""), **weights)
    typed = parse(text.format(attribute="<output_dtype = 3>", zero=""), **weights)
    zero = parse(text.format(attribute="", zero=", z"), z=np.int8(0), **weights)
    assert [list(inspect_model(model).precision) for model in (plain, typed, zero)] == [
        ["uint8 x float32"],
        ["int8 x float32"],
        ["int8 x float32"],
    ]


def test_integer_operators_show_their_own_types() -> None:
    text = "g (uint8[n, 32] x) => (int32[n, 8] y) { y = MatMulInteger(x, w) }"
    assert inspect_model(parse(text, w=np.ones((32, 8), np.int8))).precision == {"uint8 x int8": 1}


def test_layers_in_subgraphs_are_counted() -> None:
    text = """g (bool c, float[n, 32] x) => (float[n, 8] y) {
        y = If (c) <
            then_branch = t () => (float[n, 8] a) { a = MatMul(x, w) },
            else_branch = e () => (float[n, 8] b) { b = MatMul(x, w) }
        >
    }"""
    found = inspect_model(parse(text, w=np.ones((32, 8), np.float32)))
    assert found.ops == {"MatMul": 2, "If": 1}
    assert found.precision == {"float32 x float32": 2}


def test_check_tells_what_was_done_about_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "g (float[n, 2] x) => (float[n, 2] y) { h = Relu(x)\n y = Neg(h) }"
    proto = ir.to_proto(parse(text))
    proto.graph.node.reverse()
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    code, out, _ = call(capsys, "check", str(path))
    assert code == 0
    assert "warning: the nodes were not in order" in out
    told = json.loads(call(capsys, "check", str(path), "--json")[1])
    assert told["warnings"] == ["the nodes were not in order and have been sorted"]
    assert (told["nodes"], told["opsets"], told["quantized"]) == (2, {"": 21}, False)
