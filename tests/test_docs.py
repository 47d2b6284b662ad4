"""What the pages say can be typed: commands parse, recipes and options exist, files and links are there."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.reading.data import open_dataset
from qexport.calibration.reading.spec import DataSpec, input_specs
from qexport.cli import cli
from qexport.errors import UsageError
from qexport.exporter.recipe import Recipe, instantiate, needs
from qexport.exporter.recipe_files import list_recipes, load_recipe, override
from qexport.exporter.steps import PASSES, find_pass, settable
from qexport.passes.pipeline import run
from qexport.passes.target import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "samples/README.md", ROOT / "benchmarks/README.md"]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PLACEHOLDER = re.compile(r"[A-Z_]+")
SECTIONS = ("export", "data", "gates")


shipped = functools.cache(load_recipe)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(text, language):
    return [match[1] for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def spans(text):
    """Inline code outside code blocks."""
    prose = re.sub(r"^```.*?^```|^    [^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [match[1] for match in re.finditer(r"`([^`\n]+)`", prose)]


def commands(text) -> Iterator[list[str]]:
    """The arguments of every ``qexport ...`` in a code block."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for block in fenced(joined, "(?:sh|console)?") for line in block.splitlines()]
    lines += re.findall(r"^    +(.*)$", joined, re.MULTILINE)
    for line in lines:
        if found := re.match(r"(?:\$ )?qexport\s+(.+)", line):
            yield shlex.split(found[1], comments=True)


def parsed(arguments) -> tuple[click.Command, list[str]]:
    """The command that ``arguments`` name, and what is left of them."""
    command: click.Command = cli
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"no command {name!r}"
        command = found
    return command, arguments


def chosen(options) -> Recipe | None:
    """The recipe of a command with its settings, if the page names one that is there."""
    name = options.get("recipe") or options.get("name") or "int8"
    if PLACEHOLDER.fullmatch(str(name)) or (str(name).endswith(".toml") and not (ROOT / str(name)).is_file()):
        return None
    target = options.get("target")
    settings = list(options.get("settings") or ())
    settings += [f"export.target={target}"] if target and not PLACEHOLDER.fullmatch(str(target)) else []
    return override(shipped(ROOT / name if str(name).endswith(".toml") else name), settings)


def check(arguments) -> None:
    """Raise where a command of a page could not be typed."""
    command, rest = parsed(arguments)
    options = command.make_context(command.name, list(rest)).params
    if "settings" in options or "recipe" in options:
        chosen(options)
    for value in options.values():
        if isinstance(value, str | Path) and str(value).startswith("samples/"):
            assert (ROOT / value).exists(), f"{value} is not there"


def settings_in(span) -> list[str]:
    """What follows each ``--set`` of a command or a piece of one, or the whole of it where it names an option."""
    words = shlex.split(span) if re.match("--set |qexport ", span) else []
    if words:
        found = [word for before, word in itertools.pairwise(words) if before == "--set"]
        return [word for word in found if word != "step.option=value"]
    if not re.fullmatch(rf"({'|'.join([*PASSES, *SECTIONS])})\.[a-z_.]+( ?= ?.*)?", span):
        return []
    return [] if re.search(r"\.(md|py|toml|npz|txt|csv|json|safetensors)$", span) else [span]


def setting_exists(text) -> bool:
    """Whether ``step.option`` or ``section.key``, maybe with a value, is one that some recipe takes."""
    key, equals, value = (part.strip() for part in text.partition("="))
    head, _, option = key.partition(".")
    if head in SECTIONS:
        known = type(getattr(shipped("int8"), head)).model_fields
    else:
        known = {"enabled": None, **settable(find_pass(head, ""))}
    if option.partition(".")[0] not in known or not equals:
        return option.partition(".")[0] in known
    recipe = shipped("int8") if head in SECTIONS else Recipe(name="one", step=[{"pass": head}])
    try:
        override(recipe, [f"{key}={value}"])
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("page", NAMES)
def test_every_command_of_a_page_could_be_typed(page):
    for arguments in commands(text_of(page)):
        try:
            check(arguments)
        except (click.ClickException, UsageError, AssertionError) as error:
            pytest.fail(f"qexport {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize("page", NAMES)
def test_every_command_that_a_page_names_in_passing_has_these_options(page):
    for line in (span for span in spans(text_of(page)) if re.match(r"qexport [a-z-]", span)):
        command, rest = parsed(line.split()[1:])
        known = {name for parameter in command.params for name in parameter.opts} | {"--help", "--version"}
        assert {word for word in rest if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", NAMES)
def test_every_option_that_a_page_names_exists(page):
    named = [setting for span in spans(text_of(page)) for setting in settings_in(span)]
    assert [setting for setting in named if not setting_exists(setting)] == []


@pytest.mark.parametrize("page", NAMES)
def test_every_recipe_that_a_page_shows_loads(page, tmp_path):
    for number, text in enumerate(fenced(text_of(page), "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(re.sub(r'keep = \["[^"]*"\]', "keep = []", text), encoding="utf-8")
        load_recipe(path)


@pytest.mark.parametrize("page", NAMES)
def test_every_example_in_python_compiles(page):
    for text in fenced(text_of(page), "python"):
        compile(text, page, "exec")


@pytest.mark.parametrize("page", NAMES)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} leads to {target}"
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in known, f"{page} leads to {target}#{anchor}"


def rows() -> dict[str, list[str]]:
    """Recipe to the cells behind its name, of the table in docs/recipes.md."""
    found = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text_of("docs/recipes.md"), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found if name in list_recipes()}


def test_the_table_of_recipes_has_all_of_them_and_knows_which_need_data():
    assert set(rows()) == set(list_recipes())
    assert {name: cells[1] == "yes" for name, cells in rows().items()} == {
        name: needs(shipped(name), "data") for name in list_recipes()
    }


def test_the_steps_of_int8_are_told_in_the_order_in_which_they_run():
    told = re.findall(r"^\d+\. `([\w-]+)` ", text_of("docs/recipes.md"), re.MULTILINE)
    first = len(shipped("float32").step)
    assert told == [step.pass_ for step in shipped("int8").step if step.enabled][first:]


PRODUCT = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 128] x) => (float[n, 32] y) { y = MatMul(x, w) }"""


def product():
    proto = onnx.parser.parse_model(PRODUCT)
    numbers = np.random.default_rng(0).standard_normal((128, 32)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers, "w"))
    return ir.from_proto(proto)


@pytest.mark.parametrize("name", list_recipes())
def test_the_targets_in_the_table_of_recipes_are_those_that_take_them(name, tmp_path):
    model = product()
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((16, 128)).astype(np.float32))
    data = open_dataset(tmp_path / "x.npy", input_specs(model), DataSpec())
    taken = []
    cuts = [step.pass_ for step in shipped(name).step if "missing" in settable(find_pass(step.pass_, ""))]
    for target in TARGETS:
        recipe = override(shipped(name), [f"export.target={target}", *(f"{step}.missing=skip" for step in cuts)])
        try:
            run(model, instantiate(recipe, {"data": data}))
        except UsageError:
            continue
        taken.append(target)
    told = rows()[name][2]
    assert taken == list(TARGETS) if told.startswith("all") else set(taken) == set(told.split(", "))


@pytest.mark.parametrize(
    "line",
    [
        "build model.onnx --int8 --calb x",
        "biuld model.onnx",
        "build model.onnx --recipe int9",
        "build model.onnx --set quantize.min_snr=3",
        "build model.onnx --recipe float16 --set quantize.min_sqnr=3",
        "build model.onnx --target tensort",
        "build samples/nothing.onnx",
        "plan model.onnx --max-drop",
        "recipe shw int8",
    ],
)
def test_the_search_for_commands_that_cannot_be_typed_finds_them(line):
    with pytest.raises((click.ClickException, UsageError, AssertionError)):
        check(line.split())


def test_the_search_for_options_that_do_not_exist_finds_them():
    known = ("quantize.min_sqnr", "equalize.tolerance=0.2", "export.never_worse=false", "data.image.mean")
    unknown = ("quantize.min_snr", "equalize.tolerant=1", "export.never_wors=false", "gates.max", "half.headroom=no")
    assert [setting for setting in known if not setting_exists(setting)] == []
    assert [setting for setting in unknown if setting_exists(setting)] == []


def test_commands_are_found_in_blocks_and_code_in_running_text():
    page = "    qexport a b \\\n        -o c\n\n    $ qexport d  # why\n\n`qexport e --f`, not qexport g.\n"
    page += "```sh\nqexport h\n```\n"
    assert list(commands(page)) == [["h"], ["a", "b", "-o", "c"], ["d"]]
    assert spans(page) == ["qexport e --f"]
