"""Loading and saving: what is read is what was written, wherever the weights lie."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from qexport.errors import BuildFailed, ModelInvalid, UnsafeInput
from qexport.exporter.admit import admit_file
from qexport.exporter.load import load_source
from qexport.exporter.onnx_file import NOTES, load_onnx, save_onnx
from qexport.safe_io import publish, publishing

T = TensorProto


def parsed(body, weights=None, functions="", imports='"": 21, "f": 1') -> onnx.ModelProto:
    signature = "(float[N,4] x, bool c) => (float[N,4] y)"
    model = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: [{imports}]> g {signature} {{ {body} }} {functions}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    return model


def weighted() -> onnx.ModelProto:
    """``y = x @ w + b``; ``w`` is large enough to be moved out, ``b`` is not."""
    generator = np.random.default_rng(0)
    arrays = {"w": generator.normal(size=(4, 1000)), "v": generator.normal(size=(1000, 4)), "b": np.ones(4)}
    body = "h = MatMul(x, w) k = MatMul(h, v) y = Add(k, b)"
    return parsed(body, {name: array.astype("f") for name, array in arrays.items()})


def put(folder: Path, model: onnx.ModelProto, name="m.onnx") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def save(model: ir.Model, directory: Path, threshold=1 << 40) -> Path:
    with publish(directory) as stage:
        save_onnx(model, stage, threshold=threshold)
        stage.write_json("manifest.json", {"schema": "qexport.manifest/1", "files": list(stage.files)})
    return directory / "model.onnx"


def run(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    feeds = {"x": np.linspace(-1, 1, 12, dtype="f").reshape(3, 4), "c": np.array(True)}
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in feeds.items() if name in wanted})[0]


def names(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph]


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["external", "inline"])
def test_a_saved_model_computes_what_the_source_computed(tmp_path, threshold):
    source = put(tmp_path, weighted())
    before = source.read_bytes()
    saved = save(load_onnx(source), tmp_path / "out", threshold)
    assert (tmp_path / "out" / "model.onnx.data").exists() == (threshold == 0)
    np.testing.assert_array_equal(run(saved), run(source))
    again = save(load_onnx(saved), tmp_path / "again")
    np.testing.assert_array_equal(run(again), run(source))
    assert source.read_bytes() == before


def test_external_weights_start_on_a_page_and_small_ones_stay_inside(tmp_path):
    saved = save(load_onnx(put(tmp_path, weighted())), tmp_path / "out", threshold=0)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in admit_file(saved).graph.initializer}
    assert entries == {
        "w": {"location": "model.onnx.data", "offset": "0", "length": "16000"},
        "v": {"location": "model.onnx.data", "offset": "16384", "length": "16000"},
        "b": {},
    }


@pytest.mark.parametrize("threshold", [0, 1 << 40])
def test_the_same_model_gives_the_same_bytes_and_is_left_as_it_was(tmp_path, threshold):
    model = load_onnx(put(tmp_path, weighted()))
    tensors = [value.const_value for value in model.graph.initializers.values()]
    first, second = (save(model, tmp_path / name, threshold) for name in "ab")
    assert [path.read_bytes() for path in first.parent.iterdir()] == [p.read_bytes() for p in second.parent.iterdir()]
    assert all(a is b.const_value for a, b in zip(tensors, model.graph.initializers.values(), strict=True))


RAW = {
    **dict.fromkeys((T.FLOAT, T.INT32, T.UINT32), 4),
    **dict.fromkeys((T.DOUBLE, T.INT64, T.UINT64, T.COMPLEX64), 8),
    **dict.fromkeys((T.FLOAT16, T.BFLOAT16, T.INT16, T.UINT16), 2),
    **dict.fromkeys((T.INT8, T.UINT8, T.BOOL, T.FLOAT8E4M3FN, T.FLOAT8E5M2, T.FLOAT8E8M0), 1),
    **dict.fromkeys((T.INT4, T.UINT4, T.FLOAT4E2M1), 0.5),
    **dict.fromkeys((T.INT2, T.UINT2), 0.25),
}


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("data_type", RAW, ids=T.DataType.Name)
def test_weights_of_every_type_keep_their_bytes(tmp_path, data_type, external):
    data = b"\x01\x00" * int(2048 * RAW[data_type])
    model = parsed("y = Relu(x)")
    model.graph.initializer.add(name="t", data_type=data_type, dims=[64, 64], raw_data=data)
    saved = save(load_onnx(put(tmp_path, model)), tmp_path / "out", 0 if external else 1 << 40)
    loaded = load_onnx(saved).graph.initializers["t"].const_value
    assert loaded is not None
    assert (loaded.dtype, loaded.shape, loaded.name) == (ir.DataType(data_type), ir.Shape([64, 64]), "t")
    assert loaded.tobytes() == data
    assert loaded.numpy().shape == (64, 64)


def test_numbers_in_typed_fields_and_strings_survive(tmp_path):
    model = parsed("y = Relu(x)")
    model.graph.initializer.add(name="h", data_type=T.FLOAT16, dims=[2], int32_data=[0x3C00, 0xC000])
    model.graph.initializer.add(name="q", data_type=T.INT4, dims=[3], int32_data=[0x21, 0x0F])
    model.graph.initializer.add(name="s", data_type=T.STRING, dims=[2], string_data=[b"a", b"\xff"])
    model.graph.initializer.add(name="e", data_type=T.FLOAT, dims=[0, 3])
    values = load_onnx(save(load_onnx(put(tmp_path, model)), tmp_path / "out", 0)).graph.initializers
    arrays = {name: value.const_value.numpy().tolist() for name, value in values.items() if value.const_value}
    assert arrays == {"h": [1.0, -2.0], "q": [1, 2, -1], "s": [b"a", b"\xff"], "e": []}


def test_loaded_weights_do_not_keep_the_protobuf_alive(tmp_path):
    model = load_onnx(put(tmp_path, parsed("k = Constant <value = float {2.0}> () y = Mul(x, k)", {"w": np.ones(9)})))
    constant = model.graph.node(0).attributes["value"].as_tensor()
    for tensor in (constant, model.graph.initializers["w"].const_value):
        assert type(tensor) is ir.Tensor
    assert constant.numpy() == 2


def test_models_of_real_exporters_are_loaded_and_saved(tmp_path):
    paths = sorted((Path(__file__).parent / "models").glob("*.onnx"))
    assert paths
    for path in paths:
        model = load_onnx(path)
        admit_file(save(model, tmp_path / path.stem))
        assert len(names(model)) == len(set(names(model)))


# ---------------------------------------------------------------- what loading repairs


def test_m24_nodes_out_of_order_are_sorted_and_said_so(tmp_path):
    then = "then_branch = a () => (float[N,4] t) { t = Relu(z) }"
    other = "else_branch = b () => (float[N,4] e) { e = Abs(k) k = Neg(z) }"
    path = put(tmp_path, parsed(f"y = If(c) <{then}, {other}> z = Abs(x)"))
    model = load_onnx(path)
    assert model.meta[NOTES] == ("the nodes were not in order and have been sorted",)
    assert [node.op_type for node in model.graph] == ["Abs", "If"]
    assert (
        run(save(model, tmp_path / "out")).tolist() == np.abs(np.linspace(-1, 1, 12, dtype="f")).reshape(3, 4).tolist()
    )


def test_nodes_in_order_stay_as_they_are_without_a_word(tmp_path):
    model = load_onnx(put(tmp_path, parsed("b = Abs(x) a = Relu(x) d = Neg(b) y = Add(a, d)")))
    assert [node.outputs[0].name for node in model.graph] == ["b", "a", "d", "y"]
    assert model.meta[NOTES] == ()


def test_nodes_without_a_name_of_their_own_get_one(tmp_path):
    body = "a = Relu(x) [same] b = Relu(a) [same] d = Relu(b) [Relu_0] e = Relu(d) y = f.F(e)"
    functions = '<domain: "f", opset_import: ["": 21]> F (a) => (b) { b = Relu(a) }'
    model = load_onnx(put(tmp_path, parsed(body, functions=functions)))
    assert names(model) == ["Relu_1", "same", "same_0", "Relu_0", "F_0"]
    assert [node.name for function in model.functions.values() for node in function] == ["Relu_2"]


def test_a_negative_dimension_of_an_input_means_any(tmp_path):
    model = parsed("y = Relu(x)")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    shape = load_onnx(put(tmp_path, model)).graph.inputs[0].shape
    assert shape is not None
    assert shape.is_dynamic(0)
    assert shape[1] == 4


def test_sparse_attributes_are_refused_with_the_reason(tmp_path):
    model = parsed("k = Constant <value = float {0.0}> () y = Mul(x, k)")
    attribute = model.graph.node[0].attribute[0]
    attribute.Clear()
    attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
    attribute.sparse_tensor.dims.append(4)
    attribute.sparse_tensor.values.CopyFrom(numpy_helper.from_array(np.ones(1, "f")))
    attribute.sparse_tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, "int64")))
    with pytest.raises(BuildFailed, match=r"not readable: .*[Ss]parse"):
        load_onnx(put(tmp_path, model))


def test_sparse_initializers_are_refused_not_dropped(tmp_path):
    model = parsed("y = MatMul(x, w)")
    sparse = model.graph.sparse_initializer.add(dims=[4, 4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, "f"), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, "int64")))
    with pytest.raises(BuildFailed, match="sparse initializers"):
        load_onnx(put(tmp_path, model))


# ---------------------------------------------------------------- external data


def externalized(tensor: TensorProto, folder: Path, location: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / location).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def test_external_tensors_are_read_from_constants_and_functions_too(tmp_path):
    functions = (
        '<domain: "f", opset_import: ["": 21]> F (a) => (b) { k = Constant <value = float {0.0}> () b = Add(a, k) }'
    )
    model = parsed("k = Constant <value = float {0.0}> () m = Mul(x, k) y = f.F(m)", functions=functions)
    for number, node in enumerate((model.graph.node[0], model.functions[0].node[0]), start=2):
        node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(number)))
        externalized(node.attribute[0].t, tmp_path, f"k{number}")
    saved = save(load_onnx(put(tmp_path, model)), tmp_path / "out")
    assert not any(a.t.external_data for a in admit_file(saved).graph.node[0].attribute)
    np.testing.assert_array_equal(run(saved), np.linspace(-1, 1, 12, dtype="f").reshape(3, 4) * 2 + 3)


def test_size_and_digest_cover_external_data_wherever_the_model_holds_it(tmp_path):
    functions = (
        '<domain: "f", opset_import: ["": 21]> F (a) => (b) { k = Constant <value = float {0.0}> () b = Add(a, k) }'
    )
    then = "then_branch = a () => (float[N,4] t) <float[4] v> { t = Mul(m, v) }"
    other = "else_branch = b () => (float[N,4] e) { e = Abs(m) }"
    body = f"k = Constant <value = float {{0.0}}> () m = Mul(x, k) n = If(c) <{then}, {other}> y = f.F(n)"
    model = parsed(body, functions=functions)
    branch = next(a.g for a in model.graph.node[2].attribute if a.name == "then_branch")
    branch.initializer.clear()
    branch.initializer.add().CopyFrom(numpy_helper.from_array(np.ones(4, "f"), "v"))
    constants = [model.graph.node[0].attribute[0].t, model.functions[0].node[0].attribute[0].t]
    for tensor in constants:
        tensor.CopyFrom(numpy_helper.from_array(np.float32(1)))
    for number, tensor in enumerate([*constants, branch.initializer[0]]):
        externalized(tensor, tmp_path, f"k{number}")
    path = put(tmp_path, model)
    before = load_source(path).info
    assert before.bytes == path.stat().st_size + 4 + 4 + 16
    assert before.parameters == 4
    for number in range(3):
        data = (tmp_path / f"k{number}").read_bytes()
        (tmp_path / f"k{number}").write_bytes(np.full(len(data) // 4, 2, "f").tobytes())
        assert load_source(path).info.digest != before.digest
        (tmp_path / f"k{number}").write_bytes(data)
    assert load_source(path).info == before


def test_two_spellings_of_an_external_file_count_it_once(tmp_path):
    model = weighted()
    for tensor, name in zip(model.graph.initializer, ("w.bin", "./w.bin"), strict=False):
        externalized(tensor, tmp_path, "w.bin")
        tensor.external_data[0].value = name
    path = put(tmp_path, model)
    assert load_source(path).info.bytes == path.stat().st_size + 16000


def test_external_weights_are_mapped_and_outlive_their_file_name(tmp_path):
    model = weighted()
    expected = numpy_helper.to_array(model.graph.initializer[0])
    externalized(model.graph.initializer[0], tmp_path, "w.bin")
    loaded = load_onnx(put(tmp_path, model))
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    assert not tensor.numpy().flags.owndata
    (tmp_path / "w.bin").unlink()
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_f11_a_model_can_be_saved_over_the_file_it_is_mapped_from(tmp_path):
    first = save(load_onnx(put(tmp_path, weighted())), tmp_path / "out", threshold=0)
    before, expected = first.with_suffix(".onnx.data").read_bytes(), run(first)
    second = save(load_onnx(first), tmp_path / "out", threshold=0)
    assert second.with_suffix(".onnx.data").read_bytes() == before
    np.testing.assert_array_equal(run(second), expected)


def test_m12_swapping_the_data_for_a_link_never_shows_the_secret(tmp_path):
    folder = tmp_path / "model"
    model = weighted()
    externalized(model.graph.initializer[0], folder, "w.bin")
    path = put(folder, model)
    secret = np.full((4, 1000), 7, "f")
    (tmp_path / "secret").write_bytes(secret.tobytes())
    (folder / "link").symlink_to("../secret")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            publishing.exchange(folder / "w.bin", folder / "link")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(300):
            with suppress(UnsafeInput):
                tensor = load_onnx(path).graph.initializers["w"].const_value
                assert tensor is not None
                assert not np.any(tensor.numpy() == 7)
    finally:
        stop.set()
        thread.join()


def shrink(folder: Path) -> None:
    os.truncate(folder / "w.bin", 100)


def redirect(folder: Path) -> None:
    os.rename(folder / "w.bin", folder / "elsewhere")
    (folder / "w.bin").symlink_to("elsewhere")


@pytest.mark.parametrize(("change", "error"), [(shrink, ModelInvalid), (redirect, UnsafeInput)])
def test_a_file_that_changes_between_admission_and_mapping_is_noticed(tmp_path, monkeypatch, change, error):
    model = weighted()
    externalized(model.graph.initializer[0], tmp_path, "w.bin")
    path = put(tmp_path, model)

    def admit_and_change(*args):
        proto = admit_file(*args)
        change(tmp_path)
        return proto

    monkeypatch.setattr("qexport.exporter.onnx_file.admit_file", admit_and_change)
    with pytest.raises(error):
        load_onnx(path)


# ---------------------------------------------------------------- faults


def test_f10_the_files_of_a_model_follow_the_umask(tmp_path):
    model = load_onnx(put(tmp_path, weighted()))
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            saved = save(model, tmp_path / f"out{umask}", threshold=0)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in saved.parent.iterdir()} == {mode}


FILL = """
    import resource, sys
    from pathlib import Path
    from qexport.errors import QexportError
    from qexport.exporter.onnx_file import load_onnx, save_onnx
    from qexport.safe_io import publish
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    model, codes = load_onnx(source), []
    for limit in map(int, sys.argv[3:]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with publish(out) as stage:
                save_onnx(model, stage, threshold=0)
            codes.append(0)
        except QexportError as error:
            codes.append(error.exit_code)
    print(*codes)
"""


def test_f01_no_space_while_a_model_is_saved_keeps_the_old_one(tmp_path):
    source = put(tmp_path, weighted())
    old = save(load_onnx(source), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in old.parent.iterdir()}
    limits = ["0", "1", "300", "15999", "16000", "16384", "32383"]
    command = [sys.executable, "-c", textwrap.dedent(FILL), str(source), str(tmp_path / "out"), *limits]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout.split(), result.stderr) == (["9"] * len(limits), "")
    assert {path.name: path.read_bytes() for path in old.parent.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "out"]
