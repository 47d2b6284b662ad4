"""Bad tensors and scales, M20 to M22, M28 and M29: the exit code is always 3; how each is made, what the error says."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from qexport.errors import ModelInvalid
from qexport.exporter.admit import Limits, admit_proto

T = TensorProto
NAN, INF = np.nan, np.inf


def parsed(body="y = Relu(x)", opset=21, **weights):
    """A model from the text of its nodes and arrays."""
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g (float[N,4] x, bool c) => (float[N,4] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items())
    return model


def tensor(data_type, dims, **fields):
    """A model with one more initializer, which nothing reads."""
    model = parsed()
    model.graph.initializer.append(TensorProto(name="t", data_type=data_type, dims=dims, **fields))
    return model


def floats(*values):
    return tensor(T.FLOAT, [len(values)], float_data=values)


TENSORS = [
    ("M20_raw_short", tensor(T.FLOAT, [4, 4], raw_data=bytes(60)),
     r"holds 60 bytes, dimensions \[4, 4\] of FLOAT need 64"),
    ("M20_raw_long", tensor(T.FLOAT, [4, 4], raw_data=bytes(65)), "holds 65 bytes.* need 64"),
    ("M20_scalar_without_data", tensor(T.FLOAT, []), "holds 0 bytes.* need 4"),
    ("M20_typed_short", tensor(T.FLOAT, [3], float_data=[1]), "holds 1 entries in float_data.* need 3"),
    ("M20_int4_odd", tensor(T.INT4, [3], raw_data=b"a"), "holds 1 bytes.* need 2"),
    ("M20_int4_unpacked", tensor(T.UINT4, [4], raw_data=bytes(4)), "holds 4 bytes.* need 2"),
    ("M20_int4_typed", tensor(T.INT4, [3], int32_data=[1, 2, 3]), "holds 3 entries.* need 2"),
    ("M20_int2", tensor(T.INT2, [5], raw_data=b"a"), "holds 1 bytes.* need 2"),
    ("M20_float4", tensor(T.FLOAT4E2M1, [4], raw_data=b"abc"), "holds 3 bytes.* need 2"),
    ("M20_float6", tensor(T.FLOAT6E2M3, [4], raw_data=b"abcd"), "holds 4 bytes.* need 3"),
    ("M20_float8", tensor(T.FLOAT8E4M3FN, [3], raw_data=b"a"), "holds 1 bytes.* need 3"),
    ("M20_bfloat16", tensor(T.BFLOAT16, [3], raw_data=bytes(3)), "holds 3 bytes.* need 6"),
    ("M20_complex", tensor(T.COMPLEX64, [2], float_data=[1, 2]), "holds 2 entries.* need 4"),
    ("M20_strings", tensor(T.STRING, [2], string_data=[b"a"]), "holds 1 entries in string_data.* need 2"),
    ("M21_dims_overflow", tensor(T.FLOAT, [2**62, 2**62]), "overflow"),
    ("M21_many_dims", tensor(T.FLOAT, [1] * 260, raw_data=bytes(4)), "260 dimensions"),
    ("M22_empty_raw_data", tensor(T.FLOAT, [2], raw_data=b"", float_data=[1, 2]), "there and empty, beside float_data"),
    ("M21_neg_dim", tensor(T.FLOAT, [-1]), "negative dimension"),
    ("M21_two_neg_dims", tensor(T.FLOAT, [-2, -2], raw_data=bytes(16)), "negative dimension"),
    ("M21_2_40_no_data", tensor(T.FLOAT, [2**40]), "holds 0 bytes.* need 4398046511104"),
    ("M22_bad_dtype", tensor(99, [1], raw_data=b"abcd"), "unknown data type 99"),
    ("M22_no_dtype", tensor(0, [1], raw_data=b"abcd"), "unknown data type 0"),
    ("M22_mixed", tensor(T.FLOAT, [1], raw_data=bytes(4), float_data=[1]),
     "data in two fields, raw_data and float_data"),
    ("M22_wrong_field", tensor(T.FLOAT, [1], int32_data=[1]), "FLOAT in int32_data, its field is float_data"),
    ("M22_raw_strings", tensor(T.STRING, [1], raw_data=b"a"), "STRING in raw_data"),
    ("M22_segment", tensor(T.FLOAT, [1], raw_data=bytes(4), segment={"begin": 0}), "segmented"),
    ("M22_external_and_inline", tensor(T.FLOAT, [1], raw_data=bytes(4), external_data=[{"key": "location"}]),
     "names an external file but says that the data is inside"),
    ("M28_nan", floats(1, NAN), "NaN or Inf in initializer 't' .*--allow-nonfinite"),
    ("M28_one_nan_of_many", parsed(w=np.r_[np.ones(3_000_000, "f"), np.float32(NAN)]), "initializer 'w'"),
    ("M28_inf", floats(1, INF), "initializer 't'"),
    ("M28_minus_inf", floats(1, -INF), "initializer 't'"),
    ("M28_positive_mask", floats(0, INF), "initializer 't'"),
    ("M28_mask_with_nan", floats(0, -INF, NAN), "initializer 't'"),
    ("M28_infinities", floats(INF, -INF), "initializer 't'"),
    ("M28_mask_after_numbers", parsed(w=np.r_[np.ones(1 << 20), np.full(9, -INF)].astype("f")), "initializer 'w'"),
    ("M28_nan_alone", floats(NAN), "initializer 't'"),
    ("M28_half", tensor(T.FLOAT16, [2], int32_data=[0x3C00, 0x7E00]), "initializer 't'"),
    ("M28_bfloat16", tensor(T.BFLOAT16, [2], raw_data=b"\x80\x3f\xc0\x7f"), "initializer 't'"),
    ("M28_float8_e4m3fn", tensor(T.FLOAT8E4M3FN, [2], raw_data=b"\x01\xff"), "initializer 't'"),
    ("M28_float8_e4m3fnuz", tensor(T.FLOAT8E4M3FNUZ, [2], raw_data=b"\x01\x80"), "initializer 't'"),
    ("M28_float8_e5m2", tensor(T.FLOAT8E5M2, [2], raw_data=b"\x01\x7d"), "initializer 't'"),
    ("M28_float8_e8m0", tensor(T.FLOAT8E8M0, [2], raw_data=b"\x01\xff"), "initializer 't'"),
    ("M28_double", tensor(T.DOUBLE, [2], double_data=[1, NAN]), "initializer 't'"),
    ("M28_complex", tensor(T.COMPLEX64, [1], float_data=[1, NAN]), "initializer 't'"),
    ("M28_all_are_listed", parsed(**{f"w{i}": np.float32([1, NAN]) for i in range(7)}), "'w0'; .*'w4' and 2 more"),
]  # fmt: skip


def noted(options):
    return f"<{options}>" if options else ""


def dequantized(scale=0.1, zero=0, zero_type="int8", scale_type="float32", options=""):
    """A 4 x 4 int8 weight behind DequantizeLinear."""
    arrays = {"q": np.ones((4, 4), "int8"), "s": np.asarray(scale, scale_type), "z": np.asarray(zero, zero_type)}
    return parsed(f"[d] w = DequantizeLinear {noted(options)} (q, s, z) y = MatMul(x, w)", **arrays)


def activation(scale=0.1, zero=0, zero_type="int8", options=""):
    """QuantizeLinear and DequantizeLinear on the input."""
    arrays = {"s": np.asarray(scale, "f"), "z": np.asarray(zero, zero_type)}
    quantize = f"[q] q = QuantizeLinear {noted(options)} (x, s, z)"
    return parsed(f"{quantize} y = DequantizeLinear (q, s, z)", **arrays)


BRANCHES = """y = If(c) <
    then_branch = tg () => (float[N,4] t) { q = QuantizeLinear(x, s) t = DequantizeLinear(q, s) },
    else_branch = eg () => (float[N,4] e) { e = Relu(x) }>"""
FOUR, ZEROS = [0.1] * 4, [0] * 4

SCALES = [
    ("M29_scale_zero", dequantized(0.0), r"node 'd' \(DequantizeLinear\): the scale 's' is 0; a scale is positive"),
    ("M29_scale_minus_zero", dequantized(-0.0), "the scale 's' is -0;"),
    ("M29_scale_neg", dequantized(-1.0), "the scale 's' is -1;"),
    ("M29_scale_nan", dequantized(NAN), "the scale 's' is nan;"),
    ("M29_scale_inf", dequantized(INF), "the scale 's' is inf;"),
    ("M29_scale_denormal", dequantized(2.0**-127), "the scale 's' is 5.87747e-39;"),
    ("M29_scale_half_denormal", dequantized(1e-6, scale_type="float16"), "the scale 's' is"),
    ("M29_scale_of_one_channel", dequantized([0.1, 0.1, 0, 0.1], ZEROS, options="axis = 0"),
     r"the scale 's'\[2\] is 0;"),
    ("M29_scale_of_quantize", activation(0.0), r"node 'q' \(QuantizeLinear\): the scale 's' is 0;"),
    ("M29_scale_type", dequantized(1, scale_type="int32"), "the scale 's' has type INT32"),
    ("M29_scale_from_constant",
     parsed("s = Constant <value_float = 0.0> () q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)"),
     "the scale 's' is 0;"),
    ("M29_scale_from_outside", parsed(BRANCHES, s=np.float32(0)),
     "then_branch, node that writes 'q' .*the scale 's' is 0;"),
    ("M29_scale_of_qlinear",
     parsed("q = QuantizeLinear(x, s, z) m = QLinearMatMul(q, s, z, b, s, z, t, z) y = DequantizeLinear(m, s, z)",
            s=np.float32(1), t=np.float32(0), z=np.int8(0), b=np.ones((4, 4), "int8")), "the scale 't' is 0;"),
    ("M29_zp_float", dequantized(zero_type="float32"), "the zero point 'z' has type FLOAT"),
    ("M29_zp_int64", activation(zero_type="int64"), "the zero point 'z' has type INT64"),
    ("M29_zp_int32_in_quantize", activation(zero_type="int32"), "the zero point 'z' has type INT32"),
    ("M29_zp_not_like_the_data", dequantized(zero_type="uint8"), "zero point has type UINT8, the data has INT8"),
    ("M29_zp_not_as_produced",
     parsed("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s, z)", s=np.float32(1), z=np.int8(0)),
     "zero point has type INT8, the data has UINT8"),
    ("M29_zp_not_as_declared", activation(options="output_dtype = 2"), "has type INT8, output_dtype is UINT8"),
    ("M29_zp_count", dequantized(FOUR, [0, 0], options="axis = 0"), "has 4 scales but 2 zero points"),
    ("M29_axis_out_of_range", dequantized(FOUR, ZEROS, options="axis = 2"),
     "axis 2 is out of range for 'q' with 2 dim"),
    ("M29_axis_too_negative", dequantized(FOUR, ZEROS, options="axis = -3"), "axis -3 is out of range"),
    ("M29_axis_of_activation", activation(FOUR, ZEROS, options="axis = 5"), "axis 5 is out of range for 'x'"),
    ("M29_per_channel_length", dequantized([0.1] * 3, [0] * 3, options="axis = 1"),
     "has 3 scales, but axis 1 of 'q' has 4"),
    ("M29_scale_rank", dequantized([FOUR], [ZEROS]), "without block_size it has at most one"),
    ("M29_blocks", dequantized([FOUR], [ZEROS], options="axis = 0, block_size = 2"),
     r"\[1, 4\], blocks of 2 need \[2, 4\]"),
    ("M29_block_negative", dequantized([FOUR], [ZEROS], options="axis = 0, block_size = -2"), "block_size is -2"),
]  # fmt: skip
BAD = [*TENSORS, *SCALES]

GOOD = [
    ("empty", tensor(T.FLOAT, [0, 2**40])),
    ("int4_odd", tensor(T.INT4, [3], raw_data=b"ab")),
    ("int4_typed", tensor(T.INT4, [3], int32_data=[1, 2])),
    ("float6_typed", tensor(T.FLOAT6E2M3, [4], int32_data=[1, 2, 3, 4])),
    ("complex", tensor(T.COMPLEX128, [1], double_data=[1, 2])),
    ("bool", tensor(T.BOOL, [2], int32_data=[0, 1])),
    ("attention_mask", parsed(w=np.triu(np.full((512, 512), -INF, "f"), 1))),
    ("half_mask", parsed(w=np.triu(np.full((64, 64), -INF, "float16"), 1))),
    ("lone_infinity", floats(INF)),
    ("lone_minus_infinity", floats(-INF)),
    ("largest_float8", tensor(T.FLOAT8E4M3FN, [2], raw_data=b"\x7e\xfe")),
    ("per_channel", dequantized(FOUR, ZEROS, options="axis = -1")),
    ("blocks", dequantized([FOUR, FOUR], [ZEROS, ZEROS], options="axis = 0, block_size = 2")),
    ("uneven_blocks", dequantized([FOUR, FOUR], [ZEROS, ZEROS], options="axis = 0, block_size = 3")),
    ("half_scale", dequantized(0.1, scale_type="float16")),
    ("smallest_scale", dequantized(2.0**-126)),
    ("no_zero_point", parsed("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", s=np.float32(1))),
    ("declared_type",
     parsed("q = QuantizeLinear <output_dtype = 3> (x, s) y = DequantizeLinear(q, s, z)",
            s=np.float32(1), z=np.int8(0))),
    ("bias_in_int32", parsed("b = DequantizeLinear(q, s) y = Add(x, b)", q=np.ones(4, "int32"), s=np.float32(1))),
    ("computed_scale", parsed("q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)")),
]  # fmt: skip


@pytest.mark.parametrize(("model", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_numbers_are_refused_with_their_reason(model, says):
    with pytest.raises(ModelInvalid) as caught:
        admit_proto(model, where="memory")
    assert re.search(says, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("model", [row[1] for row in GOOD], ids=[row[0] for row in GOOD])
def test_unusual_but_correct_numbers_are_admitted(model):
    admit_proto(model, where="memory")


@pytest.mark.parametrize("model", [row[1] for row in BAD if row[0].startswith("M28")])
def test_weights_that_are_not_finite_are_let_through_on_request(model):
    admit_proto(model, where="memory", limits=Limits(allow_nonfinite=True))


def outside(model, name, tmp_path, data):
    """Move an initializer into a file that starts with 8 other bytes."""
    kept = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    kept.ClearField("raw_data")
    kept.data_location = T.EXTERNAL
    kept.external_data.add(key="location", value="data")
    kept.external_data.add(key="offset", value="8")
    (tmp_path / "data").write_bytes(bytes(8) + data)
    return model


def test_numbers_in_external_files_are_looked_at_too(tmp_path):
    weight = np.r_[np.ones(3_000_000), NAN].astype("<f4")
    model = outside(parsed(w=weight), "w", tmp_path, weight.tobytes())
    with pytest.raises(ModelInvalid, match="NaN or Inf in initializer 'w'"):
        admit_proto(model, where="memory", root=tmp_path)
    model = outside(dequantized(), "s", tmp_path, bytes(4))
    with pytest.raises(ModelInvalid, match="the scale 's' is 0;"):
        admit_proto(model, where="memory", root=tmp_path)
    model = outside(dequantized(), "s", tmp_path, np.float32(0.5).tobytes())
    admit_proto(model, where="memory", root=tmp_path)
