"""Inputs described in words, examples of them, and names that lead to callables; nothing here needs torch."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import DataInvalid, EnvironmentMismatch, ResourceExhausted, UsageError
from qexport.exporter.doors.inputs import (
    DTYPES,
    AskedInput,
    describe,
    free_dims,
    generate,
    parse_input,
    parse_inputs,
    resize,
    sizes_for,
    sizes_of,
)
from qexport.exporter.doors.torch_modules.callables import call, is_callable_name
from qexport.exporter.doors.torch_modules.module import TorchOptions, load_torch

IMAGE = "input:float32[batch,3,32,32]"
TEXT = ("ids:int64[batch,sequence]=0..99", "mask:bool[batch,sequence]")


def test_a_description_is_read():
    assert parse_input(IMAGE) == AskedInput("input", np.dtype(np.float32), ("batch", 3, 32, 32))
    assert parse_input(" a.b.x:int8[ n , 2 ] ") == AskedInput("a.b.x", np.dtype(np.int8), ("n", 2))
    assert parse_input("scale:bfloat16[]") == AskedInput("scale", np.dtype(ml_dtypes.bfloat16), ())
    assert parse_input(TEXT[0]).values == (0, 99)
    assert parse_input("t:int64[n]=-5..-1").values == (-5, -1)


DIMS = st.one_of(st.integers(1, 100), st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,8}", fullmatch=True))


@given(
    st.from_regex(r"[A-Za-z_.][\w./]{0,9}", fullmatch=True), st.sampled_from(list(DTYPES)), st.lists(DIMS, max_size=4)
)
def test_what_is_printed_is_read_again(name, dtype, dims):
    asked = AskedInput(name, DTYPES[dtype], tuple(dims))
    assert parse_input(str(asked)) == asked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a description"),
        ("x", "not a description.*NAME:DTYPE"),
        ("x:float32", "not a description"),
        ("float32[1]", "not a description"),
        ("x:float32[1", "not a description"),
        ("x:float32[1]=3", "not a description"),
        ("x:float23[1]", "unknown type 'float23'.*'float32'"),
        ("x:float32[0]", "dimension '0' is neither"),
        ("x:float32[-1]", "dimension '-1' is neither"),
        ("x:float32[1,,2]", "dimension '' is neither"),
        ("x:float32[2n]", "dimension '2n' is neither"),
        ("x:float32[²]", "dimension '²' is neither"),
        ("x:int64[n]=3..2", "no values from 3 to 2"),
        ("x:int8[n]=0..200", "int8 has no values from 0 to 200"),
        ("x:uint8[n]=-1..2", "uint8 has no values"),
        ("x:bool[n]=0..2", "bool has no values"),
        ("x:float16[n]=0..99999", "float16 has no values"),
        (f"x:int64[n]=0..{'9' * 99}", "not a description"),
        (f"x:int64[{'9' * 9999}]", "is neither"),
        (f"x:int64[{'n,' * 99}n]", "100 dimensions, expected 16 or fewer"),
    ],
)
def test_a_wrong_description_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_input(text)


def test_an_example_that_no_memory_holds_is_refused_before_it_is_made():
    with pytest.raises(ResourceExhausted, match="more than 1073741824 numbers"):
        parse_input("x:float32[batch,99999999999]")


def test_one_name_is_one_input():
    with pytest.raises(UsageError, match="'x' is described twice"):
        parse_inputs(["x:float32[n]", "x:int64[n]"])


def test_sizes_differ_from_each_other_and_from_fixed_ones():
    asked = parse_inputs(["a:float32[batch,2,16,width,24]", "b:int64[rows,width,height]"])
    assert free_dims(asked) == ("batch", "width", "rows", "height")
    sizes = sizes_for(asked)
    assert len({*sizes.values(), 2, 16, 24}) == 7
    assert min(sizes.values()) > 1
    assert sizes["batch"] < 16 <= sizes["width"]


def test_sizes_of_data_are_kept_where_they_may_be():
    asked = parse_inputs(["a:float32[batch,7,length]"])
    assert sizes_for(asked, {"batch": 1, "length": 9})["length"] == 9
    assert sizes_for(asked, {"batch": 1, "length": 9})["batch"] > 1
    assert sizes_for(asked, {"batch": 7, "length": 7})["length"] != 7


def test_generated_values_fit_the_description_and_stay_the_same():
    asked = parse_inputs([*TEXT, "x:float16[batch,4]", "u:float32[sequence]=2..3"])
    sizes = {"batch": 50, "sequence": 40}
    feeds = generate(asked, sizes)
    assert sizes_of(asked, feeds, "here") == sizes
    assert (feeds["ids"].min(), feeds["ids"].max()) == (0, 99)
    assert set(np.unique(feeds["mask"])) == {False, True}
    assert feeds["u"].min() >= 2
    assert feeds["u"].max() <= 3
    for name, array in generate(asked, sizes).items():
        np.testing.assert_array_equal(array, feeds[name])


def test_resizing_begins_again_or_cuts():
    asked = parse_inputs(["x:int64[n,2]"])
    feeds = {"x": np.array([[1, 2], [3, 4]])}
    assert resize(asked, feeds, {"n": 3})["x"].tolist() == [[1, 2], [3, 4], [1, 2]]
    assert resize(asked, feeds, {"n": 1})["x"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, "nothing for input 'y'"),
        ({"x": np.zeros((2, 3), np.float32), "z": np.zeros(2)}, "no input 'z'"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(2, np.int64)}, r"'x' is float64\[2, 3\].*takes x:float32\[n,3\]"),
        ({"x": np.zeros((2, 3, 1), np.float32), "y": np.zeros(2, np.int64)}, "'x' is"),
        ({"x": np.zeros((2, 4), np.float32), "y": np.zeros(2, np.int64)}, "3 is asked for"),
        ({"x": np.zeros((2, 3), np.float32), "y": np.zeros(4, np.int64)}, "n is 2 elsewhere"),
    ],
)
def test_data_that_does_not_fit_is_refused(feeds, said):
    with pytest.raises(DataInvalid, match=said):
        sizes_of(parse_inputs(["x:float32[n,3]", "y:int64[n]"]), feeds, "here")


def test_examples_share_their_batch_or_are_fixed():
    same = {"x": np.zeros((2, 3), np.float32), "y": np.zeros(2, np.int64), "s": np.zeros((), np.int64)}
    assert [str(one) for one in describe(same)] == ["x:float32[batch,3]", "y:int64[batch]", "s:int64[]"]
    other = {"x": np.zeros((2, 3), np.float32), "y": np.zeros(3, np.int64)}
    assert [str(one) for one in describe(other)] == ["x:float32[2,3]", "y:int64[3]"]
    for bad in (np.zeros((0, 3), np.float32), np.zeros(2, np.complex64)):
        with pytest.raises(UsageError, match="no example"):
            describe({"x": bad})


# ---------------------------------------------------------------- callables

CODE = """
from dataclasses import dataclass
import sibling

class Maker:
    @staticmethod
    def inner():
        return sibling.VALUE

@dataclass
class Plain:
    number: int = 3

def make():
    print("hello")
    return sibling.VALUE

def broken():
    raise ValueError("first line\\nsecond line")

def needy():
    import a_package_that_nobody_has

number = 5
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "sibling.py").write_text("VALUE = 41")
    (tmp_path / "door_code.py").write_text(CODE)
    (tmp_path / "door_broken.py").write_text("import nothing_of_that_name")
    (tmp_path / "door_wrong.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("sibling", "door_code"):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["door_code", "door_code.py", "{folder}/door_code.py"])
def test_modules_and_files_are_found_with_what_lies_beside_them(code, place, capsys):
    path = list(sys.path)
    assert call(f"{place.format(folder=code)}:make") == 41
    assert call(f"{place.format(folder=code)}:Maker.inner") == 41
    assert call(f"{place.format(folder=code)}:Plain").number == 3
    assert sys.path == path
    assert capsys.readouterr().out == ""


def test_a_file_called_like_a_library_is_no_library(code):
    import json

    (code / "json.py").write_text("def make():\n    return 7\n")
    assert call("json.py:make") == 7
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("door_code", UsageError, "write module:callable"),
        ("door_code:", UsageError, "write module:callable"),
        ("door_code:a b", UsageError, "write module:callable"),
        ("door_cod.py:make", UsageError, r"no such file.*did you mean 'door_code\.py'"),
        ("door_kode:make", UsageError, "no module 'door_kode'.*did you mean 'door_code'"),
        ("sys.nothing.there:make", UsageError, "no module 'sys.nothing'"),
        ("door_code:mak", UsageError, "no 'mak' in 'door_code'.*did you mean 'make'"),
        ("door_code:Maker.iner", UsageError, "no 'iner' in 'door_code'.*did you mean 'inner'"),
        ("door_code:number", UsageError, "'number' is no callable but of type 'int'"),
        ("door_code:broken", UsageError, r"its code failed: ValueError: first line$"),
        ("door_code:needy", EnvironmentMismatch, "'a_package_that_nobody_has' is missing"),
        ("door_broken:make", EnvironmentMismatch, "'nothing_of_that_name' is missing"),
        ("door_wrong:make", UsageError, "its code failed: SyntaxError"),
        ("door_wrong.py:make", UsageError, "its code failed: SyntaxError"),
    ],
)
def test_what_cannot_be_called_is_told(code, source, error, said):
    with pytest.raises(error, match=said):
        call(source)


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("package.module:make", True),
        ("path/to/file.py:Class.make", True),
        ("models/minilm", False),
        ("model.onnx", False),
        ("C:\\models\\a.onnx", False),
        (":make", False),
    ],
)
def test_callables_are_told_from_paths(source, meant):
    assert is_callable_name(source) is meant


def test_without_torch_the_way_to_get_it_is_told(code, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EnvironmentMismatch, match=r"need torch.*pip install 'qexport\[export\]'"):
        load_torch("door_code:make", TorchOptions())
