"""``qexport recipe``: which recipes there are and what is in them."""

from __future__ import annotations

import click

from qexport.cli.common import make_console, print_json, shared_flags
from qexport.cli.completion import complete_recipe


@click.group()
def recipe() -> None:
    """List recipes, or show all of one."""


@recipe.command("list")
@shared_flags
def list_(*, as_json: bool) -> None:
    """List the shipped recipes."""
    from qexport.exporter.recipe_files import list_recipes

    found = list_recipes()
    if as_json:
        print_json({"schema": "qexport.recipes/1", "recipes": found})
        return
    width = max(map(len, found))
    for name, description in found.items():
        make_console().print(f"{name:<{width}} {description}")


@recipe.command()
@click.argument("name", shell_complete=complete_recipe)
@click.option("--set", "settings", multiple=True, metavar="STEP.OPTION=VALUE", help="Override one option; repeatable.")
@shared_flags
def show(name: str, *, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the recipe NAME as it would run.

    NAME is a shipped recipe or a file. Comments say what each step is for and what else it could be told; the text
    is a recipe itself.
    """
    from qexport.exporter.recipe_files import load_recipe, override
    from qexport.exporter.recipe_text import annotated

    found = override(load_recipe(name), settings)
    if as_json:
        print_json(found.as_dict())
    else:
        make_console().print(annotated(found), end="")
