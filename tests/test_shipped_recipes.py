"""What the shipped recipes hold in which order, and what they leave to a setting."""

from __future__ import annotations

import pytest

from qexport.exporter.recipe import list_recipes, load_recipe, override

OFF = {
    "equalize": ("fold-batch-norm", "cleanup"),
    "adaround": ("triage", "quantize"),
    "correct-bias": ("quantize", "half"),
}


@pytest.mark.parametrize("name", list(OFF))
def test_int8_holds_passes_that_one_setting_switches_on_where_they_belong(name: str) -> None:
    recipe = load_recipe("int8")
    plain = [step.pass_ for step in recipe.step if step.enabled]
    assert name not in plain
    changed = [step.pass_ for step in override(recipe, [f"{name}.enabled=true"]).step if step.enabled]
    place = changed.index(name)
    assert (changed[place - 1], changed[place + 1]) == OFF[name]
    assert changed[:place] + changed[place + 1 :] == plain


def test_int8_begins_with_the_steps_of_float32() -> None:
    first = [step.pass_ for step in load_recipe("float32").step]
    assert [step.pass_ for step in load_recipe("int8").step if step.enabled][: len(first)] == first


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_no_recipe_switches_on_what_int8_leaves_out(name: str) -> None:
    assert not {step.pass_ for step in load_recipe(name).step if step.enabled} & set(OFF)
