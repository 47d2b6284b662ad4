import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.calibrate import Calibrate
from qexport.errors import UsageError
from qexport.exporter.precision.triage import OUTWEIGHS, Triage, dominant
from qexport.passes.quantize import STAY_KEY, Quantize

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 32] x) => (float[n, 32] y) {
  a = MatMul(x, u)
  b = Relu(a)
  c = MatMul(b, v)
  d = Relu(c)
  y = MatMul(d, w)
}"""
NAMES = ("first", "second", "third")


class Rows(list):
    name, digest, warnings = "rows", "", ()

    @property
    def digests(self):
        return tuple(bytes([i]) * 32 for i in range(len(self)))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return Rows({"x": rng.standard_normal(32).astype(np.float32)} for _ in range(48))


def build(outlier=1.0):
    """Three products; the second one reads a channel ``outlier`` times the others, which its weights undo."""
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    rng = np.random.default_rng(1)
    for name, node in zip(NAMES, [n for n in model.graph if n.op_type == "MatMul"], strict=True):
        node.name = name
    for name in "uvw":
        kernel = (rng.standard_normal((32, 32)) / 5).astype(np.float32)
        if name == "u":
            kernel[:, 3] *= outlier
        if name == "v":
            kernel[3] /= outlier
        value = ir.Value(name=name, const_value=ir.tensor(kernel, name=name), shape=ir.Shape((32, 32)))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[name] = value
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
    return model


def calibrated(data, outlier=1.0):
    model = build(outlier)
    Calibrate(data=data, method="minmax")(model)
    return model


def test_the_layer_with_a_planted_outlier_stays_in_float(data):
    model = calibrated(data, outlier=6.0)
    result = Triage(data=data)(model)
    assert result.modified
    (decision,) = result.decisions
    assert (decision.node, decision.action) == ("second", "kept")
    assert decision.reason.startswith(OUTWEIGHS)
    done = Quantize(min_sqnr=0)(model)
    assert {d.node: d.action for d in done.decisions} == {
        "first": "quantized",
        "second": "skipped",
        "third": "quantized",
    }


def test_layers_of_a_kind_are_all_quantized(data):
    model = calibrated(data)
    assert not Triage(data=data, share=0.8)(model).modified
    assert not any(STAY_KEY in node.meta for node in model.graph)


def test_a_second_run_changes_nothing_and_a_new_choice_replaces_the_old(data):
    model = calibrated(data, outlier=6.0)
    assert Triage(data=data)(model).modified
    assert not Triage(data=data)(model).modified
    assert Triage(data=data, most=0)(model).modified
    assert not any(STAY_KEY in node.meta for node in model.graph)


def test_no_more_layers_stay_than_are_allowed():
    errors = {"a": 8.0, "b": 4.0, "c": 1.0, "d": 1.0}
    assert dominant(errors, 0.5, 1) == {"a": 8 / 14}
    assert dominant(errors, 0.5, 9) == {"a": 8 / 14, "b": 4 / 6}
    assert dominant(errors, 0.6, 9) == {}
    assert dominant({}, 0.5, 1) == {}


def test_bad_options_are_usage_errors():
    with pytest.raises(UsageError, match="share is 2"):
        Triage(share=2.0)
    with pytest.raises(UsageError, match="needs calibration data"):
        Triage()(build())
