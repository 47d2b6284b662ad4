from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.cleanup import Cleanup
from qexport.passes.fuse_attention import FuseAttention
from qexport.passes.fuse_gelu import FuseGelu
from qexport.passes.fuse_layer_norm import FuseLayerNorm
from qexport.passes.fuse_rms_norm import FuseRMSNorm
from qexport.passes.raise_opset import RaiseOpset

FILES = sorted((Path(__file__).parent / "models").glob("*.onnx"))
ROAD = (RaiseOpset(23), Cleanup(), FuseLayerNorm(), FuseRMSNorm(), FuseGelu(), FuseAttention(), Cleanup())
EXPECTED = {
    "gelu": {"Gelu": 1},
    "layer": {"LayerNormalization": 1},
    "rms": {"RMSNormalization": 1},
    "attention": {"Attention": 1},
    "bert": {"LayerNormalization": 3, "Gelu": 1, "Attention": 1},
    "llama": {"RMSNormalization": 3, "Attention": 1},
}
LEFT = ("Erf", "Tanh", "ReduceMean", "Softmax", "IsNaN", "Sqrt")


def random_inputs(model: ir.Model, batch: int, length: int) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(0), {"batch": batch, "length": length}
    inputs = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape]
        numbers = rng.standard_normal(shape)
        if value.dtype in (ir.DataType.BOOL, ir.DataType.INT64):
            numbers = numbers > -1
            numbers[..., 0] = True
        inputs[value.name] = numbers.astype(value.dtype.numpy())
    return inputs


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("path", [path for path in FILES if "_past_" not in path.stem], ids=lambda path: path.stem)
def test_what_exporters_write_becomes_the_single_operators_with_the_same_numbers(path):
    model = ir.load(path)
    given = [random_inputs(model, batch, length) for batch, length in ((2, 3), (1, 1), (3, 7))]
    before = [run(model, inputs) for inputs in given]

    for step in ROAD:
        step(model)
        assert not step(model).modified, f"{step} again"

    found = Counter(node.op_type for node in model.graph.all_nodes())
    expected = EXPECTED[path.stem.split("_")[0]]
    assert {op: found[op] for op in expected} == expected
    assert not any(found[op] for op in LEFT)
    for inputs, outputs in zip(given, before, strict=True):
        tolerance = 2e-3 if "half" in path.stem else 3e-6
        np.testing.assert_allclose(run(model, inputs)[0], outputs[0], rtol=tolerance, atol=tolerance)


def test_the_three_axes_form_drops_every_transpose_of_bert():
    model = ir.load(next(path for path in FILES if path.stem == "bert_dynamo18"))
    for step in ROAD:
        step(model)
    found = Counter(node.op_type for node in model.graph.all_nodes())
    assert "Transpose" not in found
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes.get_int("q_num_heads") == 2
    assert attention.attributes.get_float("scale") == pytest.approx(0.5)
