"""``qexport completion``: what a shell needs to complete commands, options, recipes and targets."""

from __future__ import annotations

from importlib import resources

import click
from click.shell_completion import CompletionItem, get_completion_class

from qexport.cli.common import print_json, shared_flags
from qexport.cli.shells import VARIABLE
from qexport.errors import EnvironmentMismatch

TARGETS = ("tensorrt-rtx", "tensorrt", "ort-cpu", "ort-cuda")
"""Names of the targets, literally: their table takes long to load for somebody who waits after pressing a key."""

_HOMES = {
    "bash": "qexport completion bash > ~/.local/share/bash-completion/completions/qexport",
    "zsh": 'qexport completion zsh > "${fpath[1]}/_qexport"',
    "fish": "qexport completion fish > ~/.config/fish/completions/qexport.fish",
}


def complete_recipe(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the shipped recipes that begin so, and files."""
    folder = resources.files("qexport.exporter").joinpath("recipes")
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_target(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the targets that begin so."""
    return [CompletionItem(name) for name in TARGETS if name.startswith(incomplete)]


@click.command(epilog="\b\n" + "\n".join(_HOMES.values()))
@click.argument("shell", type=click.Choice(list(_HOMES)))
@shared_flags
def completion(shell: str, *, as_json: bool) -> None:
    """Print the script by which SHELL completes qexport.

    For this session: eval "$(qexport completion bash)". For good, write it where the shell looks for such scripts:
    """
    from qexport.cli import cli

    cls = get_completion_class(shell)
    if cls is None:
        raise EnvironmentMismatch(f"this version of click does not know {shell}", hint="pip install -U click")
    try:
        script = cls(cli, {}, "qexport", VARIABLE).source()
    except RuntimeError as error:
        raise EnvironmentMismatch(str(error).rstrip("."), hint="use a newer shell") from error
    if as_json:
        print_json({"schema": "qexport.completion/1", "shell": shell, "script": script})
        return
    click.echo(script)
