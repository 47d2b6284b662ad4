"""What holds for every graph, drawn by hypothesis: admission, loading, saving, inspection, exact passes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_faults import FAULTS, broken
from helpers import session
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import graphs, names

import qexport
from qexport.errors import QexportError
from qexport.exporter.admit import admit_proto, parse
from qexport.exporter.looking.inspect import inspect_model
from qexport.exporter.onnx_file import load_onnx, save_onnx
from qexport.exporter.options import BuildOptions
from qexport.exporter.proof.equality import distance
from qexport.passes.cleanup import Cleanup
from qexport.passes.equalize import Equalize
from qexport.passes.fold_batch_norm import FoldBatchNorm
from qexport.passes.fuse_attention import FuseAttention
from qexport.passes.fuse_gelu import FuseGelu
from qexport.passes.fuse_layer_norm import FuseLayerNorm
from qexport.passes.fuse_rms_norm import FuseRMSNorm
from qexport.passes.pipeline import run
from qexport.passes.raise_opset import RaiseOpset
from qexport.safe_io import publish

ALL = {"subgraphs": True, "functions": True, "quantized": True}
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "drawn",
    deadline=None,
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 60,
    suppress_health_check=CHECKS,
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
)


def drawn(*strategies, share=1.0):
    """Draw as many examples as the profile says, or a share of them for what is slow."""
    profile = settings.get_profile("drawn")
    return lambda test: settings(profile, max_examples=max(1, int(share * EXAMPLES)))(given(*strategies)(test))


def loaded(folder: Path, proto: onnx.ModelProto) -> ir.Model:
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return load_onnx(folder / "m.onnx")


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_a_drawn_graph_is_admitted_and_runs(folder):
    @drawn(graphs(**ALL))
    def check(graph):
        admit_proto(graph.proto, where="memory")
        outputs = session(loaded(folder, graph.proto)).run(None, graph.feeds)
        assert len(outputs) == len(graph.proto.graph.output)
        assert all(np.isfinite(output).all() for output in outputs)

    check()


@drawn(broken(), share=3)
def test_a_graph_with_one_fault_gets_the_code_of_that_fault(case):
    data, fault, code = case
    with pytest.raises(QexportError) as caught:
        admit_proto(parse(data, "memory"), where="memory", root=Path("/nonexistent"))
    assert (fault, caught.value.exit_code) == (fault, code)
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_has_its_code(fault):
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]>'
        "g (float[n, 2] x) => (float[n, 2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"
    )
    graph.graph.initializer[0].raw_data = np.array([1, 2], "f").tobytes()
    graph.graph.initializer[0].ClearField("float_data")
    admit_proto(graph, where="memory")
    code, change = FAULTS[fault]
    change(graph)
    with pytest.raises(QexportError) as caught:
        admit_proto(graph, where="memory", root=Path("/nonexistent"))
    assert caught.value.exit_code == code


EXACT = [
    *(Cleanup(), RaiseOpset(opset=23), FoldBatchNorm(), FuseLayerNorm(), FuseRMSNorm(), FuseGelu()),
    *(FuseAttention(target="ort-cpu"), Equalize()),
]


@pytest.mark.parametrize("step", EXACT, ids=lambda step: type(step).__name__)
def test_an_exact_pass_keeps_the_numbers_and_has_nothing_to_do_the_second_time(folder, step):
    @drawn(st.one_of(graphs(functions=True), graphs(subgraphs=True, functions=True)), share=0.5)
    def check(graph):
        model = loaded(folder, graph.proto)
        once, steps = run(model, [("step", step)])
        assert distance(outputs_of(model, graph.feeds), outputs_of(once, graph.feeds)) < 1e-5
        assert [port.name for port in once.graph.outputs] == [port.name for port in model.graph.outputs]
        onnx.checker.check_model(ir.to_proto(once))
        _, again = run(once, [("step", step)])
        assert not again[0].modified, (steps[0].decisions, again[0].decisions)

    check()


def outputs_of(model, feeds):
    names = [value.name for value in model.graph.outputs]
    opened = session(model)
    asked = {port.name for port in opened.get_inputs()}
    return dict(zip(names, opened.run(names, {name: feeds[name] for name in asked}), strict=True))


@pytest.mark.parametrize("threshold", [0, 1 << 30], ids=["beside", "inside"])
def test_saving_what_was_loaded_from_what_was_saved_gives_the_same_bytes(tmp_path, threshold):
    @drawn(graphs(**ALL), share=0.5)
    def check(graph):
        first = saved(loaded(tmp_path, graph.proto), tmp_path / "a", threshold)
        second = saved(load_onnx(tmp_path / "a" / "model.onnx"), tmp_path / "b", threshold)
        assert first == second

    check()


@pytest.mark.parametrize("recipe", ["int8", "float16"])
def test_a_build_of_a_drawn_graph_ends_well_or_with_a_reason(tmp_path, recipe):
    @drawn(graphs(functions=True), graphs(depth=4, subgraphs=True), share=0.1)
    def check(one, other):
        for graph in (one, other):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            (tmp_path / "m.onnx").write_bytes(graph.proto.SerializeToString())
            asked = BuildOptions(target="ort-cpu", output=tmp_path / "out", set=("export.never_worse=false",))
            data = {} if "flag" in graph.feeds else {"calib": lambda x=graph.feeds["x"]: ({"x": row} for row in x)}
            try:
                qexport.build(tmp_path / "m.onnx", recipe=recipe, options=asked, **data)
            except QexportError as error:
                if "flag" not in graph.feeds or error.exit_code not in (2, 5):
                    raise

    check()


def saved(model, folder, threshold):
    shutil.rmtree(folder, ignore_errors=True)
    with publish(folder) as stage:
        save_onnx(model, stage, threshold=threshold)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_inspection_takes_every_graph_whatever_its_names(folder):
    @drawn(graphs(**ALL), st.lists(names(), min_size=1, max_size=12, unique=True), share=0.5)
    def check(graph, labels):
        proto = onnx.ModelProto()
        proto.CopyFrom(graph.proto)
        for node, label in zip(proto.graph.node, labels, strict=False):
            node.name = label
        for index, label in enumerate(labels):
            rename(proto, f"v{index}", f"v_{label}")
        found = inspect_model(loaded(folder, proto))
        assert found.nodes == sum(1 for _ in walk(proto))
        with contextlib.suppress(QexportError):
            parse(proto.SerializeToString() + b"\xff", "memory")

    check()


def rename(proto, old, new):
    for node in proto.graph.node:
        for names_ in (node.input, node.output):
            names_[:] = [new if name == old else name for name in names_]
        for attribute in node.attribute:
            for inner in attribute.g.node:
                inner.input[:] = [new if name == old else name for name in inner.input]
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = new if value.name == old else value.name


def walk(proto):
    for function in proto.functions:
        yield from function.node
    for node in proto.graph.node:
        yield node
        for attribute in node.attribute:
            yield from attribute.g.node
