"""Bad graphs, M23 to M27, in ONNX's own text form: the exit code of each, how it is written, what the error says."""

from __future__ import annotations

import re

import onnx
import onnx.parser
import pytest
from onnx import AttributeProto, TensorProto

from qexport.errors import ModelInvalid, QexportError, ResourceExhausted
from qexport.exporter.admit import Limits, admit_proto

SIGNATURE = "(float[N,4] x, bool c) => (float[N,4] y)"


def parsed(body, signature=SIGNATURE, weights="", functions="", imports='"": 17, "f": 1'):
    """A model from the text of its nodes."""
    head = f"<ir_version: 10, opset_import: [{imports}]> g {signature}"
    return onnx.parser.parse_model(f"{head} <{weights}> {{ {body} }} {functions}")


def function(name, body, opset=17):
    return f'<domain: "f", opset_import: ["": {opset}, "f": 1]> {name} (a) => (b) {{ {body} }}'


def branches(then, other="e = Relu(x)", after=""):
    """An If whose branches yield ``t`` and ``e``."""
    then_branch = f"then_branch = tg () => (float[N,4] t) {{ {then} }}"
    return f"y = If(c) <{then_branch}, else_branch = eg () => (float[N,4] e) {{ {other} }}> {after}"


def chain(length):
    """Functions that call each other in a row."""
    calls = [function(f"F{index}", f"b = f.F{index + 1}(a)") for index in range(length)]
    return parsed("y = f.F0(x)", functions=" ".join([*calls, function(f"F{length}", "b = Relu(a)")]))


def bomb(depth):
    """Functions that call the next one twice: 2^depth nodes when expanded."""
    calls = [function(f"F{i}", f"m = f.F{i + 1}(a) b = f.F{i + 1}(m)") for i in range(depth)]
    return parsed("y = f.F0(x)", functions=" ".join([*calls, function(f"F{depth}", "b = Relu(a)")]))


def nested(depth):
    """``depth`` If nodes inside each other, made without recursion."""
    model = parsed("y = If(c)")
    outer = model.graph.node[0]
    for level in range(depth):
        for branch in ("then_branch", "else_branch"):
            attribute = outer.attribute.add(name=branch, type=AttributeProto.GRAPH)
            attribute.g.name = branch
            attribute.g.output.add(name=f"{branch}{level}")
            attribute.g.node.add(op_type="Identity", input=["x"], output=[f"{branch}{level}"])
        inner = outer.attribute[1].g.node[0]
        if level < depth - 1:
            inner.op_type, inner.input[:] = "If", ["c"]
        outer = inner
    return model


def edited(change, body="y = Relu(x)", **kwargs):
    """A model after ``change(model)``."""
    model = parsed(body, **kwargs)
    change(model)
    return model


W = "float[1] w = {1.0}"
TWO_W = "float[1] w = {1.0}, float[1] w = {2.0}"
LOOP = "a = Add(x, b) b = Relu(a) y = Relu(b)"

BAD = [
    # M23: one writer for every name
    ("M23_dup_initializer", 3, parsed("y = Add(x, w)", weights=TWO_W), "initializer 'w' is there twice"),
    ("M23_dup_output", 3, parsed("y = Relu(x)", "(float x) => (float y, float y)"), "output 'y' is there twice"),
    ("M23_dup_input", 3, parsed("y = Relu(x)", "(float x, float x) => (float y)"), "'x' is written twice: by an input"),
    ("M23_non_ssa", 3, parsed("[one] a = Relu(x) [two] a = Abs(x) y = Relu(a)"),
     r"'a' is written twice: by node 'one' \(Relu\) and by node 'two' \(Abs\)"),
    # what torch writes for an output that is called like a layer
    ("M23_output_named_like_internal_value", 3, parsed("[emb] y = Relu(x) z = Abs(y) [fc] y = Neg(z)"),
     r"'y' is written twice: by node 'emb' \(Relu\) and by node 'fc' \(Neg\).*rename the output in the export"),
    ("M23_twice_in_one_node", 3, parsed("y, y = Split(x, w)", weights="int64[2] w = {2, 2}"), "written twice"),
    ("M23_output_named_like_input", 3, parsed("x = Relu(x)", "(float x) => (float x)"), "by an input and by node"),
    ("M23_node_writes_initializer", 3, parsed("w = Relu(x) y = Relu(w)", weights=W), "by an initializer and by node"),
    ("M23_shadowing", 3, parsed(branches("c = Relu(x) t = Relu(c)")), "'c' is written again inside a subgraph"),
    ("M23_in_function", 3, parsed("y = f.F(x)", functions=function("F", "b = Relu(a) b = Abs(a)")),
     "function 'F'.*'b' is written twice"),
    # M24: every reader has a writer, and nothing waits for itself
    ("M24_cycle", 3, parsed(LOOP),
     "cycle: node that writes 'a' .Add. -> node that writes 'b' .Relu. -> node that writes 'a'"),
    ("M24_self_cycle", 3, parsed("y = Add(x, y)"), "form a cycle"),
    ("M24_cycle_through_subgraph", 3, parsed(branches("t = Relu(z)", after="z = Relu(y)")), "form a cycle"),
    ("M24_cycle_in_function", 3, parsed("y = f.F(x)", functions=function("F", "c = Add(a, b) b = Relu(c)")),
     "function 'F'.*cycle"),
    ("M24_undefined_input", 3, parsed("[adder] y = Add(x, nowhere)"),
     r"node 'adder' \(Add\) reads 'nowhere', which nothing"),
    ("M24_undefined_in_subgraph", 3, parsed(branches("[deep] t = Relu(nowhere)")),
     "node 'deep' .Relu. reads 'nowhere'"),
    ("M24_sibling_is_not_outer", 3, parsed(branches("t = Relu(x)", "e = Relu(t)")), "reads 't', which nothing writes"),
    ("M24_inner_is_not_outer", 3, parsed(branches("i = Relu(x) t = Relu(i)", after="z = Relu(i)")),
     "reads 'i', which nothing"),
    ("M24_undefined_output", 3, parsed("z = Relu(x)"), "output 'y' is not written"),
    ("M24_outer_value_returned", 3, parsed(branches("o = Relu(x)").replace("float[N,4] t", "float[N,4] x")),
     "'x' is not written.*Identity"),
    ("M24_function_sees_no_outer", 3, parsed("y = f.F(x)", functions=function("F", "b = Relu(x)")),
     "function 'F': .*reads 'x'"),
    # M25: functions and nesting
    ("M25_func_cycle", 3, parsed("y = f.F(x)", functions=function("F", "b = f.G(a)") + function("G", "b = f.F(a)")),
     "circle: 'F' -> 'G' -> 'F'"),
    ("M25_func_self", 3, parsed("y = f.F(x)", functions=function("F", "b = f.F(a)")), "circle: 'F' -> 'F'"),
    ("M25_func_twice", 3, parsed("y = f.F(x)", functions=function("F", "b = Relu(a)") * 2),
     "'F' of domain 'f' is there twice"),
    ("M25_func_chain_3000", 3, chain(3000), "function calls nest more than 32 deep"),
    ("M25_func_bomb", 9, bomb(30), "expand to more than 1000000 nodes"),
    ("M25_nest_33", 3, nested(33), "subgraphs nest more than 32 deep"),
    ("M25_nest_3000", 3, nested(3000), "subgraphs nest more than 32 deep"),
    # M26: versions
    ("M26_opset_999", 3, parsed("y = Relu(x)", imports='"": 999'),
     r"opset 999 is not supported \(supported: opset 7 to \d\d"),
    ("M26_opset_1", 3, parsed("y = Relu(x)", imports='"": 1'), "opset 1 is not supported .supported: opset 7 to"),
    ("M26_opset_negative", 3, parsed("y = Relu(x)", imports='"": -1'), "opset -1 is not supported"),
    ("M26_opset_missing", 3, edited(lambda m: m.ClearField("opset_import")),
     "does not say which operator set.*supported: opset 7"),
    ("M26_opset_of_others_only", 3, parsed("y = Relu(x)", imports='"ai.onnx.ml": 3'),
     "operator set '' is not imported"),
    ("M26_opset_twice", 3, parsed("y = Relu(x)", imports='"": 17, "ai.onnx": 13'), "imported twice"),
    ("M26_ir_999", 3, edited(lambda m: setattr(m, "ir_version", 999)),
     r"IR version 999 is not supported \(supported: 3 to"),
    ("M26_ir_negative", 3, edited(lambda m: setattr(m, "ir_version", -1)), "IR version -1 is not supported"),
    ("M26_ir_missing", 3, edited(lambda m: m.ClearField("ir_version")), "does not say its IR version"),
    ("M26_function_opset", 3, parsed("y = f.F(x)", functions=function("F", "b = Relu(a)", 999)),
     "function 'F': opset 999"),
    # M27: operators
    ("M27_unknown_op", 3, parsed("y = Rleu(x)"),
     "node that writes 'y' .Rleu.: unknown operator 'Rleu' of set ai.onnx 17"),
    ("M27_op_of_later_opset", 3, parsed("y = Gelu(x)"),
     "unknown operator 'Gelu' of set ai.onnx 17 .it exists since version 20"),
    ("M27_op_gone", 3, parsed("y = Upsample(x, w)", weights=W), "'Upsample' no longer exists in set ai.onnx 17"),
    ("M27_custom_domain_no_plugin", 6, parsed("[mine] y = acme.MyOp(x)"),
     r"node 'mine' \(MyOp\): operator 'MyOp' of domain 'acme'"),
    ("M27_in_subgraph", 6, parsed(branches("[mine] t = acme.MyOp(x)")),
     "then_branch, node 'mine' .MyOp.: operator 'MyOp' of domain 'acme'"),
    ("M27_in_function", 3, parsed("y = f.F(x)", functions=function("F", "b = Rleu(a)")),
     "function 'F', .*unknown operator"),
    ("M27_other_overload", 6,
     edited(lambda m: setattr(m.graph.node[0], "overload", "v2"), "y = f.F(x)", functions=function("F", "b = Relu(a)")),
     "operator 'F' of domain 'f'"),
    ("M27_allowed_domain_not_imported", 3, parsed("y = com.microsoft.Gelu(x)"),
     "operator set 'com.microsoft' is not imported"),
    ("M27_too_few_inputs", 3, parsed("y = MatMul(x)"), "has 1 inputs, expected 2"),
    ("M27_too_many_inputs", 3, parsed("y = Relu(x, x)"), "has 2 inputs, expected 1"),
    ("M27_too_many_outputs", 3, parsed("y, z = Relu(x)"), "has 2 outputs, expected 1"),
    ("M27_missing_attribute", 3, parsed("y = Cast(x)"), "lacks the attribute 'to'"),
    ("M27_unknown_attribute", 3, parsed("y = Relu <alpha = 1.0> (x)"),
     "attribute 'alpha' that the operator does not know"),
    ("M27_attribute_type", 3, parsed("y = LeakyRelu <alpha = 1> (x)"), "attribute 'alpha' has the wrong type"),
    ("M27_attribute_twice", 3, parsed("y = LeakyRelu <alpha = 1.0, alpha = 2.0> (x)"), "an attribute twice"),
    # interface
    ("P01_no_graph", 3, onnx.ModelProto(ir_version=10), "has no graph"),
    ("P02_no_outputs", 3, edited(lambda m: m.graph.ClearField("output")), "has no outputs"),
    ("P03_input_without_type", 3, edited(lambda m: m.graph.input[0].ClearField("type")), "'x' has no type"),
    ("P03_input_of_no_known_type", 3,
     edited(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99)), "'x' has the unknown data type 99"),
    ("P03_input_sparse_of_no_type", 3,
     edited(lambda m: m.graph.input[0].type.sparse_tensor_type.shape.SetInParent()), "unknown data type 0"),
    ("P03_input_sequence_of_no_type", 3,
     edited(lambda m: m.graph.input[0].type.sequence_type.elem_type.sequence_type.SetInParent()), "data type 0"),
    ("P04_unnamed_input", 3, edited(lambda m: m.graph.input[0].ClearField("name")), "no name"),
]  # fmt: skip

GOOD = [
    ("unsorted", parsed("y = Relu(a) a = Abs(x)")),
    ("unsorted_through_subgraph", parsed(branches("t = Relu(z)", after="z = Abs(x)"))),
    ("names_shared_by_siblings", parsed(branches("i = Relu(x) t = Relu(i)", "i = Abs(x) e = Relu(i)"))),
    ("initializer_that_is_an_input", parsed("y = Add(x, w)", "(float[N,4] x, float[1] w) => (float[N,4] y)", W)),
    ("omitted_input", parsed("y = Clip(x, , w)", weights="float w = {1.0}")),
    ("omitted_outputs", parsed(", y = RNN <hidden_size = 1> (x, w, r)", "(float[2,N,4] x) => (float[1,N,1] y)",
                               "float[1,1,4] w = {1, 2, 3, 4}, float[1,1,1] r = {1}")),
    ("input_that_is_a_sequence", parsed("y = SequenceAt(x, w)", "(seq(float[4]) x) => (float[4] y)", "int64 w = {0}")),
    ("output_that_is_an_input", parsed("z = Relu(x)", "(float x) => (float x, float z)")),
    ("ten_functions_deep", chain(10)),
    ("M25_nest_20", nested(20)),
    ("nest_32", nested(32)),
    ("contrib_operator", parsed("y = com.microsoft.Gelu(x)", imports='"": 17, "com.microsoft": 1')),
    ("default_domain_by_its_long_name", parsed("y = ai.onnx.Relu(x)")),
    ("private_attribute", parsed("y = Relu <__note = 1> (x)")),
    ("loop", parsed("y = Loop(n, c, x) <body = b (int64 i, bool k, float s) => (bool k2, float s2)"
                    "{ k2 = Identity(c) s2 = Add(s, x) }>", weights="int64 n = {3}")),
    ("training_graphs_are_not_run", edited(lambda m: m.training_info.add().algorithm.node.add(input=["gone"]))),
    ("text_escapes", edited(lambda m: setattr(m.graph, "name", "\0\x1b[31m\u202e<script>../" + "x" * 1_000_000))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "model", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_graph_is_refused_with_its_reason(code, model, says):
    with pytest.raises(QexportError) as caught:
        admit_proto(model, where="memory")
    assert caught.value.exit_code == code
    assert re.search(says, str(caught.value)), str(caught.value)
    assert str(caught.value).startswith("memory: ")


@pytest.mark.parametrize("model", [row[1] for row in GOOD], ids=[row[0] for row in GOOD])
def test_an_unusual_but_correct_graph_is_admitted(model):
    before = model.SerializeToString()
    admit_proto(model, where="memory")
    assert model.SerializeToString() == before


def test_limits_move_the_borders():
    custom = parsed("y = acme.MyOp(x)", imports='"": 17, "acme": 1')
    admit_proto(custom, where="memory", limits=Limits(domains=frozenset({"acme"})))
    admit_proto(parsed("y = Relu(x)", imports='"": 1'), where="memory", limits=Limits(min_opset=1))
    with pytest.raises(ModelInvalid, match="opset 7 to 16"):
        admit_proto(parsed("y = Relu(x)"), where="memory", limits=Limits(max_opset=16))
    with pytest.raises(ResourceExhausted, match="more than 2 nodes"):
        admit_proto(parsed("a = Relu(x) b = Relu(a) y = Relu(b)"), where="memory", limits=Limits(max_nodes=2))


def test_hostile_names_are_escaped_and_cut_in_messages():
    name = "\x1b[31m\0\u202e" + "x" * 1_000_000
    with pytest.raises(ModelInvalid) as caught:
        admit_proto(edited(lambda m: m.graph.node[0].input.append(name)), where="memory")
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_a_huge_graph_takes_time_in_proportion():
    """M33 in small: 30 000 nodes and 10 000 initializers; anything quadratic would run for minutes."""
    model = parsed("y = Relu(v29999)")
    for index in range(30_000):
        previous = f"v{index - 1}" if index else "x"
        model.graph.node.add(op_type="Add", input=[previous, f"w{index % 10_000}"], output=[f"v{index}"])
    for index in range(10_000):
        model.graph.initializer.add(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[1], float_data=[1.0])
    admit_proto(model, where="memory")
