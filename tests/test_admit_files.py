"""Bad files, M01 to M19: the exit code of each, how it is made, what the error says."""

from __future__ import annotations

import os
import pickle
import random
import re
import sys
import time
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, numpy_helper

from qexport.errors import ModelInvalid, QexportError, ResourceExhausted, UsageError
from qexport.exporter.admit import Limits, admit_file, admit_proto

FLOAT = TensorProto.FLOAT
TEXT = '<ir_version: 10, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) { [n] y = MatMul(x, w) }'


def small() -> onnx.ModelProto:
    """``y = x @ w``."""
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype="f"), "w"))
    return model


PLAIN = small().SerializeToString()


def zipped() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return file.getvalue()


FILES = [
    ("M01_zero_byte_model", 3, b"", "empty file"),
    ("M03_garbage", 3, random.Random(3).randbytes(4096), "not a readable ONNX file of 4096 bytes"),
    ("M03_trailing_ff", 3, PLAIN + b"\xff" * 64, "not a readable ONNX file"),
    ("M03_trailing_zeros", 3, PLAIN + bytes(64), "not a readable ONNX file"),
    ("M03_trailing_field", 3, PLAIN + b"\xa2\x06\x02ab", r"ONNX does not define \(fields \[100\]\)"),
    ("M03_two_models", 3, PLAIN + PLAIN, "twice"),
    ("M04_zip", 3, zipped(), "a zip archive"),
    ("M04_pickle", 4, pickle.dumps({"a": 1}), "a Python pickle"),
    ("M04_pickle_protocol_0", 4, b"cos\nsystem\n(S'true'\ntR.", "a Python pickle"),
    ("M04_pickle_protocol_0_dict", 4, pickle.dumps({"a": 1}, 0), "a Python pickle"),
    ("M04_html", 3, b"\n<!DOCTYPE html><html><body>Sign in", "an HTML page"),
    ("M04_lfs", 3, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run: git lfs pull"),
    ("M04_engine", 3, b"ftrt" + bytes(60), "a TensorRT engine"),
    ("M04_rtx_engine", 3, b"vtrt" + bytes(60), "a TensorRT engine"),
    ("M04_engine_prefixed", 3, b'\x10\0\0\0{"stride": 32}  ftrt', "a TensorRT engine"),
    ("M04_safetensors", 3, (64).to_bytes(8, "little") + b'{"w":{}}', "a safetensors file"),
    ("M04_json", 3, b'{"model_type": "bert"}', "a JSON file"),
    ("M04_gguf", 3, b"GGUF\3\0\0\0", "a GGUF file"),
    ("M04_npy", 3, b"\x93NUMPY\1\0", "a NumPy array"),
    ("M04_tar_gz", 3, b"\x1f\x8b\x08\0", "an archive"),
    ("P01_name_not_utf8", 3, PLAIN.replace(b"n", b"\xff"), "is not UTF-8"),
    ("P01_domain_not_utf8", 3, PLAIN + b"\x42\x05\x0a\x01\xff\x10\x01", "is not UTF-8"),
    ("P01_metadata_not_utf8", 3, PLAIN + b"\x72\x03\x0a\x01\xff", "is not UTF-8"),
    ("P02_nothing_but_a_version", 3, b"\x08\x0a", "has no graph"),
]


def refusal(path: Path, limits: Limits | None = None) -> QexportError:
    """The error that admission raises; it comes soon, says where, and leaves the file alone."""
    before, start = path.read_bytes(), time.perf_counter()
    with pytest.raises(QexportError) as caught:
        admit_file(path, limits)
    assert time.perf_counter() - start < 20
    assert path.read_bytes() == before
    assert str(caught.value).startswith(f"{path}: ")
    return caught.value


@pytest.mark.parametrize(("code", "data", "says"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_file_that_is_no_model_is_refused_with_what_it_is(tmp_path, code, data, says):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    error = refusal(path)
    assert error.exit_code == code
    assert re.search(says, str(error)), str(error)


def test_a_good_model_is_admitted_and_parsed(tmp_path):
    (tmp_path / "m.onnx").write_bytes(PLAIN)
    assert admit_file(tmp_path / "m.onnx") == small()


def test_m02_a_file_cut_anywhere_is_refused(tmp_path):
    """64 offsets spread over the file, and each of its last 64; protobuf itself accepts some of the cuts."""
    path = tmp_path / "m.onnx"
    offsets = {*(len(PLAIN) * part // 64 for part in range(64)), *range(len(PLAIN) - 64, len(PLAIN))}
    accepted = []
    for offset in sorted(offsets):
        path.write_bytes(PLAIN[:offset])
        with suppress(ModelInvalid):
            admit_file(path)
            accepted.append(offset)
    assert accepted == []


def test_a_missing_model_or_a_folder_is_a_usage_error(tmp_path):
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(UsageError):
            admit_file(path)


def test_a_model_over_the_limit_is_not_read(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ResourceExhausted, match="1099511627776 bytes, the limit is 2147483647"):
        admit_file(tmp_path / "m.onnx")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(PLAIN) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.data())
def test_a_mutated_model_is_admitted_or_refused_and_nothing_else(tmp_path, edits, data):
    mutated = bytearray(PLAIN)
    for position, value in edits:
        mutated[position] = value
    cut = data.draw(st.integers(0, 3))
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(mutated) * cut if cut > 1 else bytes(mutated)[cut * 7 :])
    with suppress(QexportError):
        admit_file(path)


# ---------------------------------------------------------------- external data


def point(tensor: TensorProto, location="w.bin", **entries) -> None:
    """Make a tensor external."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def add(model, op, attribute, kind=AttributeProto.TENSOR) -> AttributeProto:
    return model.graph.node.add(op_type=op, output=["extra"]).attribute.add(name=attribute, type=kind)


HIDING_PLACES = {
    "initializer": lambda m: m.graph.initializer[0],
    "constant": lambda m: add(m, "Constant", "value").t,
    "wrong_attribute_type": lambda m: add(m, "Relu", "note", AttributeProto.INT).t,
    "attribute_list": lambda m: add(m, "Relu", "note", AttributeProto.TENSORS).tensors.add(),
    "sparse_attribute": lambda m: add(m, "Constant", "sparse_value").sparse_tensor.values,
    "sparse_attribute_list": lambda m: add(m, "Relu", "note").sparse_tensors.add().indices,
    "sparse_values": lambda m: m.graph.sparse_initializer.add().values,
    "sparse_indices": lambda m: m.graph.sparse_initializer.add().indices,
    "if_branch": lambda m: add(m, "If", "then_branch").g.initializer.add(),
    "nested_constant": lambda m: add(m, "If", "then_branch").g.node.add(op_type="Constant").attribute.add().t,
    "graph_list": lambda m: add(m, "If", "note").graphs.add().initializer.add(),
    "function": lambda m: m.functions.add(name="f").node.add(op_type="Constant").attribute.add(name="value").t,
    "function_default": lambda m: m.functions.add(name="f").attribute_proto.add(name="value").t,
    "training_info": lambda m: m.training_info.add().algorithm.initializer.add(),
    "training_start": lambda m: m.training_info.add().initialization.node.add().attribute.add().t,
}

# id, exit code, entries of the external data of a weight of 64 bytes, what the error says
EXTERNAL = [
    ("M05_ext_dotdot", 4, {"location": "../secret"}, "leaves the folder"),
    ("M06_ext_abs", 4, {"location": "/etc/hostname"}, "absolute path"),
    ("M07_ext_a_dotdot_b", 4, {"location": "sub/../../secret"}, "leaves the folder"),
    ("M08_ext_symlink", 4, {"location": "link"}, "symbolic link .copy the folder with its links resolved"),
    ("M08_ext_symlink_inside", 4, {"location": "inside"}, "symbolic link"),
    ("M09_ext_parent_symlink", 4, {"location": "up/secret"}, "symbolic link"),
    ("M10_ext_hardlink", 4, {"location": "hard"}, "2 hard links"),
    ("M11_ext_fifo", 4, {"location": "fifo"}, "not a regular file"),
    ("M11_ext_dev", 4, {"location": "/dev/zero"}, "absolute path"),
    ("M11_ext_dir", 4, {"location": "sub"}, "not a regular file"),
    ("M13_ext_neg_offset", 3, {"offset": -4}, "offset '-4'"),
    ("M13_ext_neg_length", 3, {"length": -1}, "length '-1'"),
    ("M13_ext_non_numeric", 3, {"offset": "abc"}, "offset 'abc'"),
    ("M13_ext_other_digits", 3, {"offset": "²"}, "not a number"),
    ("M13_ext_2_63", 3, {"offset": 2**63}, "offset '9223372036854775808'"),
    ("M13_ext_long_number", 3, {"length": "9" * 5000}, "not a number"),
    ("M13_ext_empty_number", 3, {"length": ""}, "length ''"),
    ("M14_ext_len_gt_file", 3, {"location": "short", "length": 64}, "bytes 0 to 64 of 'short', which has 60"),
    ("M14_ext_offset_gt_file", 3, {"offset": 8}, "bytes 8 to 72 of 'w.bin', which has 64"),
    ("M14_ext_huge_offset", 3, {"offset": 2**63 - 1}, "of 'w.bin', which has 64"),
    ("M15_ext_len_ne_dims", 3, {"length": 60}, r"length is 60, dimensions \[4, 4\] of FLOAT need 64"),
    ("M17_ext_missing", 3, {"location": "absent"}, "model/absent: .* does not exist"),
    ("M17_ext_wrong_case", 3, {"location": "W.bin"}, "there is 'w.bin': names are case-sensitive"),
    ("M17_ext_no_location", 3, {"location": ""}, "without the name of a file"),
    ("M17_ext_name_too_long", 3, {"location": "x" * 300}, "does not exist"),
    ("M18_ext_dunder_key", 4, {"__class__": "x"}, "unknown key '__class__'"),
    ("M18_ext_unknown_key", 4, {"basepath": "/"}, "unknown key 'basepath'"),
    ("M18_ort_marker", 4, {"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096}, "an address in memory"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good external file of 64 bytes, and traps around it."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(64))
    (model / "w.bin").write_bytes(bytes(64))
    (model / "short").write_bytes(bytes(60))
    (model / "link").symlink_to("../secret")
    (model / "inside").symlink_to("w.bin")
    (model / "up").symlink_to("..")
    (model / "hard").hardlink_to(tmp_path / "secret")
    os.mkfifo(model / "fifo")
    return model


def written(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("code", "entries", "says"), [r[1:] for r in EXTERNAL], ids=[r[0] for r in EXTERNAL])
def test_bad_external_data_is_refused_with_its_reason(folder, code, entries, says):
    model = small()
    point(model.graph.initializer[0], **entries)
    error = refusal(written(folder, model))
    assert error.exit_code == code
    assert re.search(says, str(error)), str(error)
    assert "initializer 'w'" in str(error)


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_m19_a_path_that_leads_out_is_found_everywhere(folder, place):
    model = small()
    tensor = HIDING_PLACES[place](model)
    tensor.data_type, tensor.dims[:] = FLOAT, [4]
    point(tensor, "../secret")
    error = refusal(written(folder, model))
    assert error.exit_code == 4
    assert "leaves the folder" in str(error)


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def test_m05_the_target_of_a_path_that_leads_out_is_never_opened(folder):
    for location in ("../secret", "/etc/hostname", "sub/../../secret", "link", "up/secret", "hard", "fifo"):
        model = small()
        point(model.graph.initializer[0], location)
        path = written(folder, model)
        OPENED.clear()
        refusal(path)
        names = {Path(name).name for name in OPENED}
        assert "m.onnx" in names
        assert names.isdisjoint({"secret", "hostname", "link", "hard", "fifo"})


def test_an_external_key_that_is_given_twice_is_refused(folder):
    model = small()
    point(model.graph.initializer[0])
    point(model.graph.initializer[0])
    assert "key 'location' twice" in str(refusal(written(folder, model)))


@pytest.mark.parametrize("entries", [{}, {"offset": 0}, {"length": 64}, {"checksum": "x"}, {"location": "./w.bin"}])
def test_good_external_data_is_admitted_and_not_loaded(folder, entries):
    model = small()
    point(model.graph.initializer[0], **entries)
    assert admit_file(written(folder, model)) == model


def test_m16_tensors_that_share_a_range_count_each_time(folder):
    (folder / "w.bin").write_bytes(bytes(1 << 20))
    model = small()
    for index in range(10_000):
        tensor = model.graph.initializer.add(name=f"t{index}", data_type=FLOAT, dims=[1 << 18])
        point(tensor, offset=0, length=1 << 20)
    path = written(folder, model)
    admit_file(path)
    error = refusal(path, Limits(max_external_bytes=1 << 30))
    assert error.exit_code == 9
    assert "more than 1073741824 bytes" in str(error)


def test_external_data_without_their_folder_are_refused(tmp_path):
    model = small()
    point(model.graph.initializer[0])
    with pytest.raises(ModelInvalid, match="no folder"):
        admit_proto(model, where="memory")
    with pytest.raises(UsageError, match="no such file or folder"):
        admit_proto(model, where="memory", root=tmp_path / "gone")
