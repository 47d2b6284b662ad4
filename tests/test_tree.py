"""``inspect --tree``: sums of blocks, how names are cut, what is not shown, and names that nest ten thousand deep."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.exporter.looking.inspect import inspect_model
from qexport.exporter.looking.tree import MOST, lines, name_tree


def model_with(names: list[str], sizes: list[int] | None = None) -> ir.Model:
    """A chain of Adds with these names, each with a bias of its own size [1, size]."""
    sizes = sizes or [1] * len(names)
    value = first = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", None]))
    nodes, weights = [], []
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        weight = ir.Value(name=f"w{number}", const_value=ir.Tensor(np.ones((1, size), np.float32)))
        nodes.append(ir.Node("", "Add", [value, weight], name=name, num_outputs=1))
        weights.append(weight)
        value = nodes[-1].outputs[0]
        value.name = f"v{number}"
    graph = ir.Graph([first], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def tree(model: ir.Model, depth: int = 3):
    return name_tree(model, inspect_model(model).layers, depth)


def shape(names: list[str], depth: int = 3) -> list[tuple[int, str, int]]:
    return [(branch.depth, branch.name, branch.nodes) for branch in tree(model_with(names), depth)]


def test_blocks_are_cut_at_slashes_and_dots_in_the_order_of_the_graph():
    names = ["/emb/Add", "/layer.0/att/Add", "/layer.0/att/Mul", "/layer.0/out/Add", "/layer.1/att/Add", "end"]
    assert shape(names) == [
        (0, "g", 6),
        (1, "emb/Add", 1),
        (1, "layer", 4),
        (2, "0", 3),
        (3, "att", 2),
        (3, "out/Add", 1),
        (2, "1/att/Add", 1),
        (1, "end", 1),
    ]
    assert shape(names, depth=1) == [(0, "g", 6), (1, "emb/Add", 1), (1, "layer", 4), (1, "end", 1)]


def test_blocks_with_one_block_in_them_share_a_line():
    assert shape(["m.encoder.layer.0.a", "m.encoder.layer.0.b"]) == [
        (0, "g", 2),
        (1, "m.encoder.layer.0", 2),
        (2, "a", 1),
        (2, "b", 1),
    ]


def test_words_are_never_cut_in_the_middle():
    assert shape(["/block/query", "/block/queue", "/blocked/x"]) == [
        (0, "g", 3),
        (1, "block", 2),
        (2, "query", 1),
        (2, "queue", 1),
        (1, "blocked/x", 1),
    ]


def test_a_node_that_is_called_like_its_block_counts_for_the_block():
    assert shape(["a", "a/b", "a/c"]) == [(0, "g", 3), (1, "a", 3), (2, "b", 1), (2, "c", 1)]
    assert shape(["same", "same", "", ""]) == [(0, "g", 4), (1, "same", 2)]


def test_what_is_beyond_forty_blocks_is_one_line_with_its_sum():
    found = tree(model_with([f"block{number}" for number in range(100)], [*range(1, 101)]))
    assert len(found) == 1 + MOST
    assert (found[-1].name, found[-1].blocks, found[-1].nodes) == ("61 more", 61, 61)
    assert found[-1].parameters == sum(range(40, 101))
    assert len(tree(model_with([f"block{number}" for number in range(MOST)]))) == 1 + MOST


def test_a_weight_counts_for_the_first_that_reads_it_and_one_that_nobody_reads_for_the_whole():
    text = """g (float[n, 4] x) => (float[n, 4] y) { a = MatMul(x, w) b = MatMul(a, w) y = Add(b, v) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in {"w": np.ones((4, 4)), "v": np.ones(4), "u": np.ones(100)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for node, name in zip(proto.graph.node, ("one/p", "two/p", "two/q"), strict=True):
        node.name = name
    found = {branch.path: branch for branch in tree(ir.from_proto(proto))}
    assert [(found[path].parameters, found[path].bytes) for path in ("", "one/p", "two")] == [
        (120, 480),
        (16, 64),
        (4, 16),
    ]
    assert found[""].precision == {"float32 x float32": 2}
    assert found["one/p"].precision == {"float32 x float32": 1}


NAMES = st.lists(st.text("ab/.", max_size=6), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.data())
def test_the_lines_below_a_block_never_add_up_to_more_than_the_block(names, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(names), max_size=len(names)))
    found = tree(model_with(names, sizes), depth=10)
    assert (found[0].nodes, found[0].parameters) == (len(names), sum(sizes))
    for place, branch in enumerate(found):
        inner = []
        for other in found[place + 1 :]:
            if other.depth <= branch.depth:
                break
            inner += [other] if other.depth == branch.depth + 1 else []
        own = [size for name, size in zip(names, sizes, strict=True) if name == branch.path]
        if inner:
            assert branch.nodes == sum(b.nodes for b in inner) + len(own)
            assert branch.parameters == sum(b.parameters for b in inner) + sum(own)


def test_names_that_nest_ten_thousand_deep_make_lines():
    deep = ["/".join(["a"] * level) for level in range(1, 300)] + ["a/" * 10_000 + "b"]
    found = tree(model_with(deep), depth=1000)
    assert found[0].nodes == len(deep)
    assert max(branch.depth for branch in found) >= 299
    text = list(lines(tree(model_with(deep), depth=2)))
    assert max(map(len, text)) < 200


def test_the_command_shows_the_tree_or_hands_it_over(tmp_path, capsys):
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(model_with(["a/b", "a/\x1b[31mc", "d"])).SerializeToString())
    code, out, _ = call(capsys, "inspect", str(path), "--tree")
    assert code == 0
    assert "\x1b" not in out
    assert next(line.split()[:2] for line in out.splitlines() if line.startswith("  ")) == ["a", "2"]
    told = json.loads(call(capsys, "inspect", str(path), "--tree", "--depth", "1", "--json")[1])
    found = [(line["depth"], line["path"], line["nodes"]) for line in told["tree"]]
    assert found == [(0, "", 3), (1, "a", 2), (1, "d", 1)]
    assert "tree" not in json.loads(call(capsys, "inspect", str(path), "--json")[1])


@pytest.mark.parametrize("arguments", [("--depth", "2"), ("--tree", "--depth", "0")])
def test_a_depth_without_a_tree_and_no_levels_at_all_are_refused(tmp_path, capsys, arguments):
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(model_with(["a"])).SerializeToString())
    assert call(capsys, "inspect", str(path), *arguments)[0] == 2
