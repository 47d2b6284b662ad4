"""X, what people type: bad recipes, every pair of flags of every command, poor surroundings."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import test_recipe

import qexport.cli
from faults.case import Case, Ended, Room

# ---------------------------------------------------------------- X01: recipes

STEP = '[[step]]\npass = "cleanup"\n'

RECIPES = {
    "unknown_key": ('[export]\ntagret = "ort-cpu"\n', r"mine.toml:2: \[export\].*did you mean 'target'"),
    "unknown_section": ("[gate]\nmax_drop = 1\n", "mine.toml:1.*did you mean 'gates'"),
    "unknown_pass": ('[[step]]\npass = "claenup"\n', r"mine.toml:2: step 1 \(claenup\).*did you mean 'cleanup'"),
    "unknown_option": (f"{STEP}silm = true\n", r"mine.toml:3: step 1 \(cleanup\).*did you mean 'slim'"),
    "duplicate_key": ("[gates]\nmax_drop = 1\nmax_drop = 2\n", "mine.toml:3:13.*overwrite"),
    "duplicate_section": ("[gates]\n[gates]\n", "mine.toml:2:7.*declare"),
    "wrong_type": (f'{STEP}slim = "yes"\n', r"mine.toml:3: step 1 \(cleanup\)"),
    "wrong_type_of_gate": ("[gates]\nmax_drop = nan\n", r"mine.toml:2: \[gates\]"),
    "no_toml": ('name = "open\n', "mine.toml:1:13"),
    "no_text": ("name = '\0'\n", "mine.toml:1"),
    "cyclic": ('extends = "mine.toml"\n', "circle"),
    "cyclic_by_another": ('extends = "other.toml"\n', "circle"),
    "extends_nothing": ('extends = "absent.toml"\n', "absent.toml"),
    "extends_fifo": ('extends = "fifo.toml"\n', "fifo.toml"),
}

BOMBS = {
    "lists": "a = " + "[" * 20_000 + "]" * 20_000,
    "tables": "a = " + "{a = " * 5000 + "1" + "}" * 5000,
    "dots": ".".join("a" * 20_000) + " = 1",
    "digits": "a = " + "9" * 20_000,
    "headers": "\n".join(f"[a{i}.{'.'.join('b' * 50)}]" for i in range(500)),
    "long": "x" * (test_recipe.toml.LIMIT + 1),
    "aliases": "a: &a [x, x]\n" + "\n".join(f"{c}: &{c} [*a, *a]" for c in "bcdefghij"),
}


def recipe(room: Room, text: str) -> str:
    """A recipe among the inputs, and others that it may name."""
    for name, content in (("mine.toml", text), ("other.toml", 'extends = "./mine.toml"\n')):
        (room.inputs / name).write_text(content, "utf-8")
    os.mkfifo(room.inputs / "fifo.toml")
    return str(room.inputs / "mine.toml")


def showing(text: str) -> Callable[[Room], list[str]]:
    """Show it."""
    return lambda room: ["recipe", "show", recipe(room, text)]


def building(text: str) -> Callable[[Room], list[str]]:
    """Build with it."""
    return lambda room: room.build("--recipe", recipe(room, text))


def recipes() -> Iterable[Case]:
    for id, (text, says) in RECIPES.items():
        codes = (2, 4) if id == "extends_fifo" else 2
        yield Case(f"X01_{id}", showing(text), codes, says, limits={"wall": 1})
        yield Case(f"X01_{id}_build", building(text), codes, says, limits={"wall": 1})
    for id, text in BOMBS.items():
        yield Case(f"X01_bomb_{id}", showing(text), (2, 9), "mine.toml", limits={"wall": 1})


# ---------------------------------------------------------------- X02: flags


def commands(
    group: click.Group | None = None, start: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that name it; those of groups too."""
    root = group or qexport.cli.cli
    context = click.Context(root)
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*start, name))
        else:
            yield (*start, name), command


def value_of(kind: click.ParamType) -> str:
    """A value that a parameter of this type takes."""
    if isinstance(kind, click.Choice):
        return str(kind.choices[0])
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        low, high = (1 if bound is None else bound for bound in (kind.min, kind.max))
        return str(type(kind.min if kind.min is not None else kind.max)(max(low, min(2, high))))
    return "2" if isinstance(kind, (type(click.INT), type(click.FLOAT))) else "word"


SIZES = {"SIZE": "2G"}


def words(option: click.Parameter, flag: str) -> list[str]:
    """The words that set an option."""
    if isinstance(option, click.Option) and (option.is_flag or option.count):
        return [flag]
    value = SIZES.get(getattr(option, "metavar", None) or "", value_of(option.type))
    return [flag, *[value] * max(option.nargs, 1)]


def every_pair_parses(words_before: tuple[str, ...], command: click.Command) -> Callable[[Room, Ended], None]:
    """Whatever two flags are given, before or after the arguments: both are heard, with what is required."""

    def after(room: Room, ended: Ended) -> None:
        arguments = [
            value_of(p.type) for p in command.params if isinstance(p, click.Argument) for _ in range(max(p.nargs, 1))
        ]
        options = [p for p in command.params if isinstance(p, click.Option)]
        flags = [(option, flag) for option in options for flag in (*option.opts, *option.secondary_opts)]
        assert b"--json" in ended.stdout
        for (one, first), (other, second) in itertools.combinations(flags, 2):
            needed = [w for option in options if option.required and option not in (one, other)
                      for w in words(option, option.opts[0])]  # fmt: skip
            told = [*words(one, first), *words(other, second), *needed]
            for line in ([*arguments, *told], [*told, *arguments]):
                context = command.make_context(" ".join(words_before), line)
                for option in (one, other):
                    source = context.get_parameter_source(option.name or "")
                    assert source == click.core.ParameterSource.COMMANDLINE, (line, option.name)

    return after


def matrix() -> Iterable[Case]:
    for name, command in commands():
        after = every_pair_parses(name, command)
        yield Case(f"X02_{'_'.join(name)}", lambda room, name=name: [*name, "--help"], after=after)


# ---------------------------------------------------------------- X03: surroundings


def copied(folder: Path, name: str) -> Path:
    """The good model and data in a folder of this name."""
    target = folder / name
    target.mkdir()
    for file in (folder.parent / "good").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def from_folder(name: str) -> Callable[[Room], list[str]]:
    """A build of what lies in a folder of this name, into one of this name."""

    def plant(room: Room) -> list[str]:
        folder = copied(room.inputs, name)
        argv = room.build_of(folder / "model.onnx", "--calib", str(folder / "calib.npz"))
        return [word if word != str(room.artefact) else str(room.out / name) for word in argv]

    return plant


def there(name: str) -> Callable[[Room, Ended], None]:
    def after(room: Room, ended: Ended) -> None:
        assert (room.out / name / "manifest.json").is_file()

    return after


def no_home(mode: int, home: str = "home") -> Callable[[Room], list[str]]:
    """A build with a home that cannot be written, and no other place for caches."""

    def plant(room: Room) -> list[str]:
        (room.root / "home").chmod(mode)
        return room.build()

    return plant


C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SURROUNDINGS: dict[str, tuple[str, dict[str, str]]] = {
    "c_locale": ("caf\u00e9", C_LOCALE),
    "c_locale_not_utf8": ("caf\udcff\udcfe", C_LOCALE),
    "not_utf8": ("\udcff\udcfe\udc80", {}),
    "spaces": (" two  words ", {}),
    "quotes": ('it\'s "$(id)" [bold]x %s {0}', {}),
    "newline": ("a\nerror: forged", {}),
    "escape": ("\x1b[31mred", {}),
    "255_bytes": ("x" * 255, {}),
    "dash": ("-o", {}),
    "dumb": ("plain", {"TERM": "dumb"}),
    "narrow": ("plain", {"COLUMNS": "20", "NO_COLOR": "1"}),
    "forced_colour": ("plain", {"TERM": "xterm-256color", "LINES": "0", "COLUMNS": "0"}),
    "ascii": ("caf\u00e9", {"PYTHONIOENCODING": "ascii"}),
    "no_term": ("plain", {"TERM": ""}),
}

STARTUP = {"PYTHONIOENCODING", "LC_ALL"}  # what an interpreter reads once

CASES = [
    *recipes(),
    *matrix(),
    *(Case(f"X03_{id}", from_folder(name), env=env, way="cold" if STARTUP & set(env) else "warm", after=there(name),
           again=lambda room, name=name: ["check", str(room.inputs / name / "model.onnx")])
      for id, (name, env) in SURROUNDINGS.items()),
    Case("X03_home_read_only", no_home(0o500), env={"XDG_CACHE_HOME": ""}, limits={"uid": 65534}),
    Case("X03_home_closed", no_home(0), env={"XDG_CACHE_HOME": ""}, limits={"uid": 65534}),
    Case("X03_home_missing", lambda room: room.build(), env={"XDG_CACHE_HOME": "", "HOME": "/nonexistent/home"},
         limits={"uid": 65534}),
]  # fmt: skip


KNOWN: dict[str, str] = {}
