from __future__ import annotations

import signal
import threading
import types
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qexport.errors import BuildFailed, EnvironmentMismatch, ResourceExhausted, UsageError
from qexport.exporter.engines.engine import EngineOptions, build_engine, run_support

SIZE = 64
INT8 = np.int8(0)
ANY_BATCH = {"x": ([1, SIZE], [8, SIZE], [32, SIZE])}


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def make(nodes, inputs, outputs, initializers=(), *, opset=19, domains=()):
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def quantized(*, size=SIZE, zero_point=INT8, output_dtype=None):
    """A fp16 matrix product with both sides quantized."""
    half = np.float16
    extra = [] if zero_point is None else [tensor("zero", zero_point)]
    sides = ["scale", *(value.name for value in extra)]
    attributes = {} if output_dtype is None else {"output_dtype": output_dtype}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *sides], ["q"], name="quant", **attributes),
        helper.make_node("DequantizeLinear", ["q", *sides], ["d"], name="dequant"),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], name="weight", axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"], name="product"),
    ]
    weights = np.random.default_rng(0).integers(-127, 128, (size, size), dtype=np.int8)
    values = [tensor("scale", half(0.05)), tensor("w", weights), tensor("w_scale", np.full(size, 0.01, half)), *extra]
    opset = 19 if output_dtype is None else 21
    return make(nodes, [("x", T.FLOAT16, ["n", size])], [("y", T.FLOAT16, ["n", size])], values, opset=opset)


def product(size):
    """The same product in fp16."""
    weights = tensor("w", np.random.default_rng(0).standard_normal((size, size)).astype(np.float16))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return make([node], [("x", T.FLOAT16, ["n", size])], [("y", T.FLOAT16, ["n", size])], [weights])


def unknown(count, op="Foo", domain=""):
    nodes = [helper.make_node(op, ["x"], [f"a{i}"], name=f"node{i}", domain=domain) for i in range(count)]
    nodes.append(helper.make_node("Sum", [f"a{i}" for i in range(count)], ["y"], name="sum"))
    return make(nodes, [("x", T.FLOAT, [1, 4])], [("y", T.FLOAT, [1, 4])], domains=[domain] if domain else [])


def attention(query, key, dtype=T.FLOAT16):
    node = helper.make_node("Attention", [query, key, "v"], ["y"], name="att", q_num_heads=2, kv_num_heads=2)
    inputs = [(name, dtype, [1, 8, SIZE]) for name in sorted({query, key, "v"})]
    return make([node], inputs, [("y", dtype, [1, 8, SIZE])], opset=23)


def build(model, module, **options):
    options.setdefault("profiles", (ANY_BATCH,))
    return build_engine(model.SerializeToString(), module, EngineOptions(**options))


# ------------------------------------------------------------ TensorRT-RTX, for real


@pytest.mark.rtx
def test_a_quantized_product_becomes_an_engine_that_says_what_it_is(rtx):
    engine = build(quantized(), rtx)
    assert engine.info.module == "tensorrt_rtx"
    assert engine.info.version == rtx.__version__
    assert engine.info.bytes == len(engine.plan) > 1000
    assert engine.info.layers >= 4
    assert engine.info.profiles == (ANY_BATCH,)
    assert not engine.info.ran


@pytest.mark.rtx
def test_int8_weights_make_the_engine_smaller_than_fp16_ones(rtx):
    size = 1024
    profile = {"x": ([1, size], [8, size], [32, size])}
    small = build(quantized(size=size), rtx, profiles=(profile,)).info.bytes
    large = build(product(size), rtx, profiles=(profile,)).info.bytes
    assert large - small > 0.6 * size * size


@pytest.mark.rtx
def test_int8_may_be_asked_for_by_output_dtype_alone(rtx):
    assert build(quantized(zero_point=None, output_dtype=T.INT8), rtx).plan


@pytest.mark.rtx
@pytest.mark.parametrize("zero_point", [np.uint8(0), None], ids=["uint8", "absent, which means uint8"])
def test_a_uint8_activation_that_the_parser_would_read_as_int8_is_refused_with_its_node(rtx, zero_point):
    with pytest.raises(BuildFailed, match=r"quant \(QuantizeLinear\): uint8 would be read as int8"):
        build(quantized(zero_point=zero_point), rtx)


@pytest.mark.rtx
@pytest.mark.parametrize("zero_point", [np.int8(3), np.uint8(128)])
def test_a_zero_point_that_is_not_zero_is_refused_with_its_node(rtx, zero_point):
    with pytest.raises(BuildFailed, match=r"quant \(QuantizeLinear\): Non-zero zero point"):
        build(quantized(zero_point=zero_point), rtx)


@pytest.mark.rtx
def test_an_unknown_operator_is_named_with_its_node(rtx):
    with pytest.raises(BuildFailed, match=r"node0 \(Foo\): there is no such operator"):
        build(unknown(1), rtx, profiles=())


@pytest.mark.rtx
def test_an_operator_of_another_domain_is_named_with_its_domain(rtx):
    with pytest.raises(BuildFailed, match=r"node0 \(my\.domain::Bar\)"):
        build(unknown(1, "Bar", "my.domain"), rtx, profiles=())


@pytest.mark.rtx
def test_all_refused_nodes_are_counted_and_ten_are_listed(rtx):
    with pytest.raises(BuildFailed) as caught:
        build(unknown(13), rtx, profiles=())
    lines = caught.value.what.splitlines()
    assert lines[0].endswith("(13):")
    assert len(lines) == 12
    assert lines[-1] == "- and 3 more"


@pytest.mark.rtx
def test_what_the_library_says_comes_without_its_source_places(rtx):
    scale, bias = tensor("g", np.ones(SIZE, np.float32)), tensor("b", np.zeros(SIZE, np.float32))
    node = helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], name="norm")
    shape = [1, SIZE]
    with pytest.raises(BuildFailed, match=r"norm.*identical types") as caught:
        build(make([node], [("x", T.FLOAT16, shape)], [("y", T.FLOAT16, shape)], [scale, bias]), rtx, profiles=())
    assert "/_src/" not in caught.value.what
    assert "cudaError" not in caught.value.what


@pytest.mark.rtx
@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_bytes_that_are_no_model_are_refused(rtx, content):
    with pytest.raises(BuildFailed):
        build_engine(content, rtx)


@pytest.mark.rtx
def test_a_dynamic_input_without_profile_is_refused_with_the_reason(rtx):
    with pytest.raises(BuildFailed, match="no optimization profile"):
        build(quantized(), rtx, profiles=())


@pytest.mark.rtx
def test_a_profile_out_of_order_is_a_usage_error(rtx):
    with pytest.raises(UsageError, match="MIN<=OPT<=MAX"):
        build(quantized(), rtx, profiles=({"x": ([9, SIZE], [8, SIZE], [32, SIZE])},))


@pytest.mark.rtx
@pytest.mark.parametrize("wanted", [("8.6",), ("7.5", "8.9", "12.0")])
def test_devices_can_be_named(rtx, wanted):
    assert build(quantized(), rtx, compute_capabilities=wanted).info.compute_capabilities == wanted


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("wanted", "message"), [(("9.0",), r"known: .*8\.6"), (("none",), "unknown"), (("current", "8.6"), "alone")]
)
def test_devices_that_cannot_be_named_are_usage_errors(rtx, wanted, message):
    with pytest.raises(UsageError, match=message):
        build(quantized(), rtx, compute_capabilities=wanted)


@pytest.mark.rtx
def test_every_option_is_accepted(rtx):
    options = {"workspace": 1 << 28, "sparse": True, "optimization_level": 0, "detailed": True}
    assert build(quantized(), rtx, **options).plan


@pytest.mark.rtx
def test_weights_may_lie_beside_the_model(rtx, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(quantized(), path, save_as_external_data=True, location="weights", size_threshold=64)
    assert (tmp_path / "weights").stat().st_size >= SIZE * SIZE
    whole = build(quantized(), rtx).info.bytes
    assert build_engine(path, rtx, EngineOptions(profiles=(ANY_BATCH,))).info.bytes == whole


@pytest.mark.rtx
def test_progress_only_grows_and_names_phases(rtx):
    seen = []
    build(quantized(), rtx, progress=lambda phase, done: seen.append((phase, done)))
    fractions = [done for _, done in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < 0.1
    assert 0.5 < fractions[-1] <= 1
    assert len({phase for phase, _ in seen}) > 3


@pytest.mark.rtx
def test_a_callback_that_says_no_stops_the_build(rtx):
    calls = []
    with pytest.raises(BuildFailed, match="cancelled"):
        build(quantized(), rtx, progress=lambda phase, done: calls.append(phase) or len(calls) < 5)
    assert len(calls) == 5


@pytest.mark.rtx
def test_what_a_callback_raises_comes_out_unchanged(rtx):
    def fail(phase, done):
        raise KeyError(phase)

    with pytest.raises(KeyError, match="Building engine"):
        build(quantized(), rtx, progress=fail)


@pytest.mark.rtx
def test_an_attention_that_would_end_the_process_is_refused(rtx):
    with pytest.raises(BuildFailed, match=r"att \(Attention\): query and key are the same tensor"):
        build(attention("q", "q"), rtx, profiles=())
    assert build(attention("q", "k"), rtx, profiles=()).plan


@pytest.mark.rtx
def test_without_a_gpu_the_current_device_is_an_environment_mismatch(rtx):
    if run_support(rtx) is None:
        pytest.skip("there is a GPU")
    with pytest.raises(EnvironmentMismatch, match="current"):
        build(quantized(), rtx, compute_capabilities=("current",))


# ------------------------------------------------------------ a stand-in for what cannot be run here


class Enum:
    def __init__(self, *names):
        self.__members__ = {name: SimpleNamespace(name=name) for name in names}
        self.__dict__.update(self.__members__)


class Network:
    num_layers = 3


class Builder:
    """A builder that notes what it was asked for, waits for a stop if told to, and logs what it is told to log."""

    def __init__(self, logger, script):
        if script.get("builder") is TypeError:
            logger.log(SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
            raise TypeError("factory function returned nullptr")
        self.logger, self.script = logger, script

    def create_network(self, flags):
        self.script["flags"] = flags
        return Network()

    def create_builder_config(self):
        return SimpleNamespace(add_optimization_profile=lambda profile: 0)

    def build_serialized_network(self, network, config):
        for severity, text in self.script.get("log", ()):
            self.logger.log(SimpleNamespace(name=severity), text)
        monitor = config.progress_monitor
        monitor.phase_start("phase", None, 10**6)
        if "until_stopped" in self.script:
            self.script["until_stopped"]()
            while monitor.step_complete("phase", 0):
                threading.Event().wait(0.001)
        return self.script.get("plan")


class Parser:
    def __init__(self, network, script):
        self.script = script
        self.num_errors = len(script.get("errors", ()))

    def parse(self, model):
        return not self.num_errors

    def get_error(self, index):
        node, name, op, text = self.script["errors"][index]
        values = {"node": node, "node_name": name, "node_operator": op, "desc": text}
        code = SimpleNamespace(name="UNSUPPORTED_NODE")
        return SimpleNamespace(code=lambda: code, **{key: lambda value=value: value for key, value in values.items()})


def tensorrt(version="10.3.0", flags=("EXPLICIT_BATCH", "STRONGLY_TYPED"), **script):
    """A module of TensorRT's shape; it takes no model apart, which only the real one can do."""
    module = types.ModuleType("tensorrt")
    module.__version__ = version
    module.ILogger, module.IProgressMonitor = type("ILogger", (), {}), type("IProgressMonitor", (), {})
    module.NetworkDefinitionCreationFlag = SimpleNamespace(**{name: bit for bit, name in enumerate(flags)})
    module.Builder = lambda logger: Builder(logger, script)
    module.OnnxParser = lambda network, logger: Parser(network, script)
    module.script = script
    return module


@pytest.mark.parametrize(("flags", "asked"), [(("EXPLICIT_BATCH", "STRONGLY_TYPED"), 2), ((), 0)])
def test_strong_typing_is_asked_for_where_there_is_a_choice(flags, asked):
    module = tensorrt(flags=flags, plan=b"plan")
    engine = build(quantized(), module, profiles=())
    assert module.script["flags"] == asked
    assert engine.plan == b"plan"
    assert engine.info.layers == 3


def test_a_builder_that_returns_nothing_fails_with_its_last_errors():
    log = [("WARNING", "careful"), ("ERROR", "IBuilder::build: Error Code 4: no tactic In f at /src/x.cpp:3")]
    with pytest.raises(BuildFailed) as caught:
        build(quantized(), tensorrt(log=log), profiles=())
    assert caught.value.what == "tensorrt cannot build the engine: no tactic"


def test_a_builder_that_gives_no_reason_says_so():
    with pytest.raises(BuildFailed, match="no reason given"):
        build(quantized(), tensorrt(), profiles=())


def test_a_gpu_without_memory_is_an_exhausted_resource():
    log = [("ERROR", "[memory.cpp::resize::145] Error Code 2: OutOfMemory (Requested size was 1 bytes.)")]
    with pytest.raises(ResourceExhausted, match="OutOfMemory"):
        build(quantized(), tensorrt(log=log), profiles=())


def test_parser_errors_name_node_and_operator_or_the_code_where_there_is_no_text():
    errors = [(3, "product", "MatMul", "Assertion failed: a == b: shapes differ"), (7, "", "Foo", "false")]
    with pytest.raises(BuildFailed) as caught:
        build(quantized(), tensorrt(errors=errors), profiles=())
    assert caught.value.what.splitlines()[1:] == [
        "- product (MatMul): shapes differ",
        "- node 7 (Foo): unsupported node",
    ]


def test_uint8_is_refused_for_tensorrt_too():
    with pytest.raises(BuildFailed, match="quant"):
        build(quantized(zero_point=np.uint8(0)), tensorrt(plan=b"plan"), profiles=())


def test_a_builder_that_cannot_start_is_an_environment_mismatch():
    with pytest.raises(EnvironmentMismatch, match="tensorrt cannot build here"):
        build(quantized(), tensorrt(builder=TypeError), profiles=())


def test_tensorrt_takes_no_compute_capabilities():
    with pytest.raises(UsageError, match="GPU at hand"):
        build(quantized(), tensorrt(), profiles=(), compute_capabilities=("8.6",))


def test_ctrl_c_stops_the_build_and_is_raised():
    def press():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(quantized(), tensorrt(until_stopped=press, plan=b"plan"), profiles=())
