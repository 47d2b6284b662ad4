from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import call, save_model

import qexport.cli
from qexport.cli import build as build_module
from qexport.cli import bundle, cli
from qexport.cli.common import default_cache, print_json
from qexport.errors import GateFailed, QexportError
from qexport.exporter.recipe_files import list_recipes

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxslim", "pydantic", "tokenizers", "rich", "torch")

FLAGS = {
    "--int8": [],
    "--recipe": ["float16"],
    "--calib": ["calib.npz"],
    "--eval": ["test.csv"],
    "--target": ["ort-cpu"],
    "--set": ["calibrate.samples=64"],
    "--max-drop": ["0.5"],
    "-o": ["build/out"],
    "--cache": ["cache"],
    "--no-cache": [],
    "--allow-nonfinite": [],
    "--strict-cache": [],
    "--cache-limit": ["5G"],
    "--lock-timeout": ["5"],
    "--limit-memory": ["4G"],
    "--limit-time": ["900"],
    "--json": [],
    "--debug": [],
}
"""Every documented flag of ``build`` with a value."""


def run(*arguments: str | bytes, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "qexport", *arguments],
        capture_output=True,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_the_command_line_and_its_help_import_nothing_heavy() -> None:
    script = (
        "import sys, qexport.cli\n"
        "for name in qexport.cli.COMMANDS: qexport.cli.cli.get_command(None, name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_help_lists_every_command() -> None:
    told = CliRunner().invoke(cli, ["--help"])
    assert told.exit_code == 0
    for name in qexport.cli.COMMANDS:
        assert f"\n  {name} " in told.output


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"qexport {qexport.__version__}\n", "")


def test_the_documented_flags_are_the_flags_of_build() -> None:
    known = {name for option in build_module.build.params for name in option.opts if name.startswith("-")}
    assert known - {"--output"} == set(FLAGS)


@pytest.mark.parametrize("pair", list(itertools.combinations(FLAGS, 2)), ids=" ".join)
@pytest.mark.parametrize("model_first", [True, False])
def test_every_pair_of_flags_parses(pair: Sequence[str], model_first: bool) -> None:
    flags = [word for flag in pair for word in (flag, *FLAGS[flag])]
    arguments = ["model.onnx", *flags] if model_first else [*flags, "model.onnx"]
    context = build_module.build.make_context("build", arguments)
    assert context.params["model"] == "model.onnx"
    for flag in pair:
        name = next(option.name for option in build_module.build.params if flag in option.opts)
        assert context.get_parameter_source(name or "") == click.core.ParameterSource.COMMANDLINE


def test_int8_and_a_recipe_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "build", "m.onnx", "--int8", "--recipe", "int8")
    assert (code, out) == (2, "")
    assert err == "error: --int8 and --recipe exclude each other\nhint: --int8 is --recipe int8\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Usage"),
        (("biuld",), "no such command 'biuld'"),
        (("build",), "missing argument 'MODEL'"),
        (("build", "m.onnx", "--tagret", "x"), "no such option"),
        (("build", "m.onnx", "--max-drop", "much"), "not a valid float"),
        (("recipe", "show", "int9"), "no recipe called 'int9'"),
        (("recipe", "show", "nowhere.toml"), "nowhere.toml"),
        (("inspect", "nowhere.onnx"), "nowhere.onnx"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert words in err
    assert out == ""


def test_an_error_with_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "recipe", "show", "int9", "--json")
    assert (code, err) == (2, "")
    told = json.loads(out)
    assert told == {
        "schema": "qexport.error/1",
        "error": "UsageError",
        "exit_code": 2,
        "what": "no recipe called 'int9'",
        "where": None,
        "hint": told["hint"],
    }
    assert "int8" in told["hint"]


def test_a_command_line_that_cannot_be_parsed_with_json_is_one_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "build", "--json", "--bogus")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("qexport.exporter.doctor.doctor.diagnose", fail)


@pytest.mark.parametrize("error", QexportError.__subclasses__(), ids=lambda cls: cls.__name__)
def test_every_error_class_leaves_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: type[QexportError]
) -> None:
    failing(monkeypatch, error("it broke", where="node 'a'", hint="mend it"))
    assert call(capsys, "doctor") == (error.exit_code, "", "error: node 'a': it broke\nhint: mend it\n")


def test_an_unexpected_exception_is_a_bug_with_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, ZeroDivisionError("by zero"))
    code, out, err = call(capsys, "doctor")
    assert (code, out) == (1, "")
    assert "a bug in qexport" in err
    assert "--debug" in err
    assert "Traceback" not in err
    code, _, err = call(capsys, "doctor", "--debug")
    assert code == 1
    assert "Traceback" in err
    code, out, _ = call(capsys, "doctor", "--json")
    assert json.loads(out)["error"] == "ZeroDivisionError"


def test_running_out_of_memory_is_not_a_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, MemoryError())
    code, _, err = call(capsys, "doctor")
    assert (code, "bug" in err) == (9, False)


def test_an_interrupt_is_exit_code_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert call(capsys, "doctor")[0] == 130


def test_names_of_a_model_cannot_forge_lines_or_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, GateFailed("bad", where="x\nerror: forged\x1b[31m\u202e"))
    _, _, err = call(capsys, "doctor")
    assert err == "error: x; error: forged\\u001b[31m\\u202e: bad\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model.onnx")


def test_check_says_ok_with_the_facts_and_leaves_the_file_alone(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    before = model.read_bytes()
    code, out, err = call(capsys, "check", str(model))
    assert (code, err) == (0, "")
    assert out == f"ok: {model}: opset 21, 2 nodes, 1024 parameters\n"
    assert model.read_bytes() == before


def test_check_refuses_an_empty_file_with_exit_code_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    code, out, err = call(capsys, "check", str(path))
    assert (code, out) == (3, "")
    assert str(path) in err


def test_inspect_shows_ports_operators_and_precision(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    code, out, _ = call(capsys, "inspect", str(model), "--layers")
    assert code == 0
    for words in ("opset onnx 21", "[n, 32]", "MatMul", "Relu", "4.1 kB", "float32 x float32"):
        assert words in out


@pytest.mark.parametrize("command", ["check", "inspect", "doctor", "recipe list", "recipe show int8"])
def test_json_is_one_object_on_stdout_and_nothing_else(model: Path, command: str) -> None:
    names = [str(model)] if command in ("check", "inspect") else []
    told = run(*command.split(), *names, "--json")
    assert told.returncode == 0, told.stderr
    assert isinstance(json.loads(told.stdout), dict)
    assert told.stdout.count(b"\n") == 1
    assert told.stderr == b""


def test_json_replaces_what_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": float("inf"), "c": "\udcff"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": None, "c": "\udcff"}


def test_recipe_show_prints_a_recipe_that_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = call(capsys, "recipe", "show", "int8", "--set", "export.target=ort-cpu")
    path = tmp_path / "mine.toml"
    path.write_text(out)
    _, again, _ = call(capsys, "recipe", "show", str(path))
    assert again == out
    assert 'target = "ort-cpu"' in out


def test_recipe_list_names_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "recipe", "list")
    assert [line.split()[0] for line in out.splitlines()] == list(list_recipes())


POOR_TERMINALS = [
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"caf\xc3\xa9.onnx"),
    ({"PYTHONIOENCODING": "ascii"}, b"\xff\xfe.onnx"),
    ({"PYTHONIOENCODING": "latin-1", "TERM": "dumb"}, b"x" * 250 + b".onnx"),
    ({"NO_COLOR": "1", "COLUMNS": "20"}, b"[bold]with space.onnx"),
]


@pytest.mark.parametrize(("environment", "name"), POOR_TERMINALS)
def test_any_name_on_any_terminal_will_do(tmp_path: Path, environment: dict[str, str], name: bytes) -> None:
    save_model(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    told = run("inspect", name, folder=tmp_path, **environment)
    assert (told.returncode, told.stderr) == (0, b"")
    assert b"1024 parameters" in told.stdout
    assert b"\x1b" not in told.stdout
    missing = run("check", b"no" + name[:200], folder=tmp_path, **environment)
    assert missing.returncode == 2
    assert missing.stderr.startswith(b"error: ")
    assert b"Traceback" not in missing.stderr


def test_json_of_a_name_that_is_no_text_is_json(tmp_path: Path) -> None:
    name = b"\xff\xfe.onnx"
    save_model(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    told = json.loads(run("check", name, "--json", folder=tmp_path).stdout)
    assert os.fsencode(told["path"]) == name


def test_a_home_that_cannot_be_written_is_no_trouble(tmp_path: Path, model: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert run("check", str(model), HOME=str(home)).returncode == 0
    assert run("check", str(model), HOME=str(home / "missing")).returncode == 0
    assert not list(home.iterdir())


def test_without_a_home_nothing_is_kept_and_relative_places_are_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert default_cache() == tmp_path / "home/.cache/qexport"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", str)  # what it does for a user whom the system does not know
    assert default_cache() is None
    assert bundle.write_bundle([], "", "", "") is None
    assert call(capsys, "cache", "ls")[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [{}, {"COLUMNS": "40"}], ids=str)
def test_lines_of_tables_end_with_their_last_letter(model: Path, columns: dict[str, str]) -> None:
    told = run("inspect", str(model), **columns).stdout.decode()
    assert "MatMul" in told
    assert [line for line in told.splitlines() if line != line.rstrip()] == []


def test_a_reader_that_goes_away_is_no_crash() -> None:
    script = f"{sys.executable} -m qexport recipe show int8 | head -c 1"
    told = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in told.stderr
    assert b"bug" not in told.stderr
