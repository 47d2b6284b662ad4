from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
import pytest

from qexport.errors import QexportError, UsageError
from qexport.exporter import toml
from qexport.exporter.recipe import instantiate, needs
from qexport.exporter.recipe_files import list_recipes, load_recipe, override
from qexport.exporter.recipe_text import annotated
from qexport.exporter.steps import PASSES, LazyTable
from qexport.passes.base import Outcome, Pass


@dataclass(frozen=True)
class Tidy(Pass):
    """Tidy up."""

    rounds: int = 1
    opset: int = 0

    def call(self, model: ir.Model) -> Outcome:
        return Outcome(model, False)


@dataclass(frozen=True)
class Smooth(Pass):
    """Smooth outliers."""

    alpha: float | None = None
    mode: Literal["mean", "max"] = "mean"
    keep: tuple[str, ...] = ()
    target: str = "none"

    def call(self, model: ir.Model) -> Outcome:
        return Outcome(model, False)

    def __post_init__(self) -> None:
        if self.alpha is not None and self.alpha > 1:
            raise ValueError("alpha must not exceed 1")


@dataclass(frozen=True)
class Measure(Pass):
    """Measure on data."""

    exact: ClassVar[bool] = True
    data: object = field(default=None, metadata={"bound": True})
    samples: int = 512

    def call(self, model: ir.Model) -> Outcome:
        return Outcome(model, False)


TABLE: Mapping[str, type[Pass]] = {"tidy": Tidy, "smooth": Smooth, "measure": Measure}


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def failure(path: Path | str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, TABLE)
    return caught.value


def test_a_recipe_without_a_name_is_called_after_its_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, '[[step]]\npass = "tidy"\nrounds = 3\n'), TABLE)
    assert (recipe.name, recipe.step[0].pass_) == ("mine", "tidy")
    assert recipe.step[0].options == {"rounds": 3}


def test_an_unknown_option_is_told_with_file_line_step_and_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, '[[step]]\npass = "tidy"\n\n[[step]]\npass = "smooth"\n# strength\nalhpa = 0.5\n')
    error = failure(path)
    assert error.where == f"{path}:7: step 2 (smooth)"
    assert "alhpa" in error.what
    assert error.hint == "did you mean 'alpha'?"
    assert error.exit_code == 2


def test_an_unknown_pass_is_told_with_line_step_and_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, '[[step]]\npass = "smoth"\n')
    error = failure(path)
    assert error.where == f"{path}:2: step 1 (smoth)"
    assert error.hint == "did you mean 'smooth'?"


def test_an_unknown_section_and_an_unknown_key_are_told_with_the_nearest_name(tmp_path: Path) -> None:
    section = failure(write(tmp_path, "\n[gate]\nmax_drop = 1\n"))
    assert (section.where, section.hint) == (f"{tmp_path / 'mine.toml'}:2", "did you mean 'gates'?")
    key = failure(write(tmp_path, '[export]\ntagret = "ort-cpu"\n'))
    assert (key.where, key.hint) == (f"{tmp_path / 'mine.toml'}:2: [export]", "did you mean 'target'?")
    nested = failure(write(tmp_path, "[data.image]\nsizes = 32\n"))
    assert (nested.where, nested.hint) == (f"{tmp_path / 'mine.toml'}:2: [data.image]", "did you mean 'size'?")


def test_a_key_far_from_all_others_gets_the_list_of_known_ones(tmp_path: Path) -> None:
    assert failure(write(tmp_path, "[gates]\nzzz = 1\n")).hint == "known: max_drop, min_cosine, min_worst_cosine"


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("a = 1\na = 2\n", ":2:6", "overwrite"),
        ("[export]\ntarget = \n", ":2:10", "value"),
        ("[export]\n[export]\n", ":2:8", "declare"),
        ('name = "open\n', ":1:13", ""),
    ],
)
def test_text_that_is_not_toml_is_told_with_line_and_column(
    tmp_path: Path, text: str, position: str, words: str
) -> None:
    path = write(tmp_path, text)
    error = failure(path)
    assert error.where == f"{path}{position}"
    assert words in error.what


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[[step]]\npass = "tidy"\nrounds = "3"\n', "3: step 1 (tidy)"),
        ('[[step]]\npass = "tidy"\nrounds = true\n', "3: step 1 (tidy)"),
        ('[[step]]\npass = "tidy"\nrounds = 1.5\n', "3: step 1 (tidy)"),
        ('[[step]]\npass = "tidy"\nrounds = 2020-01-01\n', "3: step 1 (tidy)"),
        ('[[step]]\npass = "smooth"\nmode = "min"\n', "3: step 1 (smooth)"),
        ('[[step]]\npass = "smooth"\nkeep = [1]\n', "3: step 1 (smooth)"),
        ('[[step]]\npass = "tidy"\nenabled = "no"\n', "3: step 1 (tidy)"),
        ("[gates]\nmax_drop = nan\n", "2: [gates]"),
        ("[gates]\nmin_cosine = 1.5\n", "2: [gates]"),
        ('[export]\nopset = "23"\n', "2: [export]"),
        ("[data]\nmax_length = 0\n", "2: [data]"),
    ],
)
def test_a_value_of_a_wrong_type_is_told_with_its_line(tmp_path: Path, text: str, place: str) -> None:
    path = write(tmp_path, text)
    assert failure(path).where == f"{path}:{place}"


def test_the_line_is_the_one_of_the_step_at_fault(tmp_path: Path) -> None:
    path = write(tmp_path, '[[step]]\npass = "tidy"\nrounds = 1\n\n[[step]]\npass = "tidy"\nrounds = "2"\n')
    assert failure(path).where == f"{path}:7: step 2 (tidy)"


def test_a_step_without_a_pass_is_refused(tmp_path: Path) -> None:
    assert "'pass' is missing" in failure(write(tmp_path, "[[step]]\nrounds = 1\n")).what


def test_a_bound_option_cannot_be_set_from_a_recipe(tmp_path: Path) -> None:
    assert "unknown option 'data'" in failure(write(tmp_path, '[[step]]\npass = "measure"\ndata = "x"\n')).what


def test_an_unknown_target_is_told_with_the_nearest(tmp_path: Path) -> None:
    error = failure(write(tmp_path, '[export]\ntarget = "tensorrt-rx"\n'))
    assert error.hint == "did you mean 'tensorrt-rtx'?"


def test_an_unknown_recipe_is_told_with_the_nearest() -> None:
    error = failure("int9")
    assert "no recipe called 'int9'" in error.what
    assert "int8" in (error.hint or "")


@pytest.mark.parametrize(
    "bomb",
    [
        "a = " + "[" * 20_000 + "]" * 20_000,
        "a = " + "{a = " * 5000 + "1" + "}" * 5000,
        ".".join("a" * 20_000) + " = 1",
        "a = " + "9" * 20_000,
        "\n".join(f"[a{i}.{'.'.join('b' * 50)}]" for i in range(500)),
        "x" * (toml.LIMIT + 1),
    ],
)
def test_a_bomb_is_refused_quickly(tmp_path: Path, bomb: str) -> None:
    path = write(tmp_path, bomb)
    start = time.process_time()
    with pytest.raises(QexportError):
        load_recipe(path, TABLE)
    assert time.process_time() - start < 5  # a fifth of a second by itself, five times that while lines are counted


def test_extends_overrides_option_by_option_and_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        'description = "base"\n[[step]]\npass = "tidy"\nrounds = 2\n[[step]]\npass = "smooth"\nalpha = 0.5\n'
        'mode = "max"\n[export]\ntarget = "ort-cpu"\nmax_batch = 4\n[gates]\nmax_drop = 1.0\n',
        "base.toml",
    )
    child = 'extends = "base.toml"\n[[step]]\npass = "smooth"\nalpha = 0.6\n[export]\nmax_batch = 8\n'
    recipe = load_recipe(write(tmp_path, child), TABLE)
    assert [(step.pass_, step.options) for step in recipe.step] == [
        ("tidy", {"rounds": 2}),
        ("smooth", {"alpha": 0.6, "mode": "max"}),
    ]
    assert (recipe.export.target, recipe.export.max_batch, recipe.gates.max_drop) == ("ort-cpu", 8, 1.0)
    assert (recipe.name, recipe.description, recipe.extends) == ("mine", "", None)


def test_the_second_step_of_a_name_overrides_the_second_one(tmp_path: Path) -> None:
    steps = '[[step]]\npass = "tidy"\nrounds = {}\n'
    write(tmp_path, steps.format(1) + steps.format(2), "base.toml")
    text = 'extends = "base.toml"\n[[step]]\npass = "tidy"\n' + steps.format(9)
    recipe = load_recipe(write(tmp_path, text), TABLE)
    assert [step.options["rounds"] for step in recipe.step] == [1, 9]


def test_a_new_step_goes_in_behind_the_childs_step_above_it(tmp_path: Path) -> None:
    write(tmp_path, '[[step]]\npass = "tidy"\n[[step]]\npass = "measure"\n', "base.toml")
    behind = write(tmp_path, 'extends = "base.toml"\n[[step]]\npass = "tidy"\n[[step]]\npass = "smooth"\n')
    assert [step.pass_ for step in load_recipe(behind, TABLE).step] == ["tidy", "smooth", "measure"]
    end = write(tmp_path, 'extends = "base.toml"\n[[step]]\npass = "smooth"\n')
    assert [step.pass_ for step in load_recipe(end, TABLE).step] == ["tidy", "measure", "smooth"]


def test_extends_is_followed_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, '[[step]]\npass = "tidy"\n', "root.toml")
    write(tmp_path / "deep", 'extends = "../root.toml"\n', "middle.toml")
    recipe = load_recipe(write(tmp_path, 'extends = "deep/middle.toml"\n'), TABLE)
    assert [step.pass_ for step in recipe.step] == ["tidy"]


def test_extends_that_leads_back_to_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 'extends = "./mine.toml"\n', "other.toml")
    error = failure(write(tmp_path, 'extends = "other.toml"\n'))
    assert "circle" in error.what
    assert "circle" in failure(write(tmp_path, 'extends = "self.toml"\n', "self.toml")).what


def test_an_error_in_the_extended_file_names_that_file(tmp_path: Path) -> None:
    base = write(tmp_path, '[[step]]\npass = "tidy"\nround = 1\n', "base.toml")
    assert failure(write(tmp_path, 'extends = "base.toml"\n')).where == f"{base}:3: step 1 (tidy)"


def base_recipe(folder: Path) -> Path:
    return write(folder, '[[step]]\npass = "tidy"\n[[step]]\npass = "smooth"\n[[step]]\npass = "tidy"\n')


def test_override_reads_values_as_toml_and_bare_words_as_strings(tmp_path: Path) -> None:
    recipe = override(
        load_recipe(base_recipe(tmp_path), TABLE),
        [
            "smooth.alpha=0.6",
            "smooth.mode=max",
            'smooth.keep=["a", "b"]',
            "export.target=ort-cpu",
            "data.max_length = 64",
            "data.tokenizer=/some where/tokenizer.json",
            "export.profiles.ids=[[1, 1], [8, 16], [32, 128]]",
            "tidy.rounds=7",
        ],
        TABLE,
    )
    assert recipe.step[1].options == {"alpha": 0.6, "mode": "max", "keep": ["a", "b"]}
    assert [step.options for step in recipe.step if step.pass_ == "tidy"] == [{"rounds": 7}, {"rounds": 7}]
    assert (recipe.export.target, recipe.data.max_length) == ("ort-cpu", 64)
    assert recipe.data.tokenizer == "/some where/tokenizer.json"
    assert recipe.export.profiles == {"ids": ([1, 1], [8, 16], [32, 128])}


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("smooth.alhpa=0.6", "did you mean 'alpha'?"),
        ("smoth.alpha=0.6", "did you mean 'smooth'?"),
        ("exprot.target=ort-cpu", "did you mean 'export'?"),
        ("export.target=ort-cpuu", "did you mean 'ort-cpu'?"),
        ("measure.samples=3", None),
        ("smooth.alpha", None),
        ("smooth=1", None),
        ("smooth.=1", None),
        ("smooth.alpha=high", None),
        ("smooth.keep=[1", None),
        ("tidy.rounds=2.0", None),
        ("tidy.rounds=1\nenabled=false", None),
        ("export.target.deep=1", None),
        ("name.x=1", None),
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_quotes_it(tmp_path: Path, setting: str, hint: str | None) -> None:
    recipe = load_recipe(base_recipe(tmp_path), TABLE)
    with pytest.raises(UsageError) as caught:
        override(recipe, [setting], TABLE)
    assert setting.partition("\n")[0] in f"{caught.value.where} {caught.value.what}"
    if hint:
        assert caught.value.hint == hint


def test_a_disabled_step_is_not_built(tmp_path: Path) -> None:
    recipe = override(load_recipe(base_recipe(tmp_path), TABLE), ["smooth.enabled=false"], TABLE)
    assert [name for name, _ in instantiate(recipe, {}, TABLE)] == ["tidy", "tidy"]


def test_passes_get_their_options_the_target_and_the_opset(tmp_path: Path) -> None:
    text = (
        '[[step]]\npass = "tidy"\n[[step]]\npass = "smooth"\nkeep = ["x"]\nalpha = 1\n[export]\ntarget = "ort-cuda"\n'
    )
    recipe = load_recipe(write(tmp_path, text), TABLE)
    assert instantiate(recipe, {}, TABLE) == [
        ("tidy", Tidy(opset=21)),
        ("smooth", Smooth(alpha=1.0, keep=("x",), target="ort-cuda")),
    ]
    pinned = override(recipe, ["export.opset=19", "smooth.target=ort-cpu"], TABLE)
    assert instantiate(pinned, {}, TABLE)[0][1] == Tidy(opset=19)
    assert instantiate(pinned, {}, TABLE)[1][1] == Smooth(alpha=1.0, keep=("x",), target="ort-cpu")
    assert instantiate(override(recipe, ["export.target=ort-cpu"], TABLE), {}, TABLE)[0][1] == Tidy(opset=23)


def test_bound_options_come_from_the_context_and_are_missed_without_it(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, '[[step]]\npass = "measure"\n'), TABLE)
    samples = [1, 2]
    assert instantiate(recipe, {"data": samples}, TABLE) == [("measure", Measure(data=samples))]
    for context in ({}, {"data": None}):
        with pytest.raises(UsageError) as caught:
            instantiate(recipe, context, TABLE)
        assert "--calib" in (caught.value.hint or "")
    assert needs(recipe, "data", TABLE)
    assert not needs(override(recipe, ["measure.enabled=false"], TABLE), "data", TABLE)


def test_what_a_pass_itself_refuses_is_told_with_the_step(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, '[[step]]\npass = "smooth"\nalpha = 2.0\n'), TABLE)
    with pytest.raises(UsageError) as caught:
        instantiate(recipe, {}, TABLE)
    assert (caught.value.where, caught.value.what) == ("mine: step 1 (smooth)", "alpha must not exceed 1")


def test_a_resolved_recipe_loads_again_as_the_same_one(tmp_path: Path) -> None:
    text = (
        'description = "odd \\"quotes\\", \\\\, \\u007f and ünïcode"\n'
        '[[step]]\npass = "smooth"\nkeep = ["/a/b", "c.d"]\nalpha = 1e-5\n[[step]]\npass = "tidy"\nenabled = false\n'
        '[export]\nopset = 20\n[export.profiles]\n"in put" = [[1], [2], [3]]\n[data.image]\nsize = [3, 4]\n'
        "mean = [0.5]\n[gates]\nmax_drop = 0.5\n"
    )
    recipe = load_recipe(write(tmp_path, text), TABLE)
    again = load_recipe(write(tmp_path, recipe.to_toml(), "again.toml"), TABLE)
    assert again == recipe
    commented = load_recipe(write(tmp_path, annotated(recipe, TABLE), "commented.toml"), TABLE)
    assert commented == recipe


def test_the_annotated_text_says_what_a_step_is_for_and_could_be_told(tmp_path: Path) -> None:
    shown = annotated(load_recipe(write(tmp_path, '[[step]]\npass = "smooth"\nalpha = 0.5\n'), TABLE), TABLE)
    assert "# 1. Smooth outliers." in shown
    assert '# mode = "mean"' in shown
    assert '# target = "tensorrt-rtx"' in shown
    assert "# alpha" not in shown


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_shipped_recipe_is_valid_and_resolves_to_itself(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description == list_recipes()[name] != ""
    assert load_recipe(write(tmp_path, recipe.to_toml())) == recipe
    assert tomllib.loads(annotated(recipe)) == tomllib.loads(recipe.to_toml())
    steps = instantiate(recipe, {"data": [], "advance": lambda: None})
    assert [name for name, _ in steps] == [step.pass_ for step in recipe.step if step.enabled]


def test_only_recipes_that_measure_need_data() -> None:
    free = "bfloat16 float16 float32 int8-dynamic int8-weights int4-weights int3-weights nf4-weights"
    assert {name for name in list_recipes() if not needs(load_recipe(name), "data")} == set(free.split())


@pytest.mark.parametrize("name", list(PASSES))
def test_every_row_of_the_table_is_a_documented_pass_with_readable_options(name: str) -> None:
    cls = PASSES[name]
    assert issubclass(cls, Pass)
    assert cls.help()
    recipe_name = name.replace("-", "")
    assert cls.__name__.lower() == recipe_name


def test_the_table_imports_a_pass_only_when_it_is_asked_for() -> None:
    table = LazyTable({"gone": "qexport.no_such_module:Gone"})
    assert list(table) == ["gone"]
    assert "gone" in table
    assert len(table) == 1
    with pytest.raises(ModuleNotFoundError):
        table["gone"]


def test_a_number_that_is_none_is_told_with_its_option() -> None:
    for number in ("nan", "inf", "-inf"):
        with pytest.raises(UsageError, match="expected a finite number") as error:
            override(load_recipe("prune-heads"), [f"heads.keep={number}", "export.target=ort-cpu"])
        assert f"--set heads.keep={number}" in str(error.value.where)
