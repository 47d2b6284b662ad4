"""The rules of docs/architecture.md and CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qexport

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/qexport"
LINKED = ("passes", "calibration", "exporter", "runtime")
OWN_CODE = ("src", *LINKED)
TESTED_CODE = (*OWN_CODE, "tests", "benchmarks", "samples")
GENERATED = {".git", ".venv", ".venv-optimum", ".venv-fuzz", "build", "dist", "__pycache__", "qexport.egg-info"}
GENERATED |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".coverage"}

# A layer may import itself and what stands here; imports only point up this table.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "safe_io": {"errors"},
    "passes": {"errors"},
    "runtime": {"errors", "safe_io", "passes"},
    "calibration": {"errors", "safe_io", "passes", "runtime"},
    "exporter": {"errors", "safe_io", "passes", "runtime", "calibration"},
    "cli": {"errors", "safe_io", "passes", "runtime", "calibration", "exporter", "__version__", "build"},
    "__main__": {"cli"},
    "__init__": {"exporter"},
}
# Packages from outside that a layer may load; layers that are not here may load what pyproject.toml declares.
# Passes load onnx for its operator schemas and version converter alone.
MAY_LOAD = {"errors": set(), "safe_io": set(), "passes": {"numpy", "onnx", "onnx_ir", "onnxscript", "onnxslim"}}

# Calls that are banned, and the files that may do it all the same.
BANNED_CALLS: dict[str, tuple[str, ...]] = {
    "onnx.save": (),
    "onnx.save_model": (),
    "onnx_ir.save": (),
    "ir.save": (),
    "numpy.load": ("calibration/",),
    "np.load": ("calibration/",),
    "np.save": (),
    "np.savez": (),
    "pickle.load": (),
    "pickle.loads": (),
    "torch.load": ("exporter/doors/pickled.py",),
    "yaml.load": (),
    "shutil.unpack_archive": (),
    "os.getenv": ("src/qexport/cli/",),
    "os.environ.get": ("src/qexport/cli/",),
    "np.random.seed": (),
    "sys.audit": ("src/qexport/safe_io/",),
    "eval": (),
    "exec": (),
}
BANNED_MODULES = {"pickle", "shelve", "marshal", "dill", "joblib"}
NETWORK = {"urllib", "http", "socket", "ssl", "socketserver", "ftplib", "smtplib", "xmlrpc", "asyncio", "_socket"}
NETWORK |= {"requests", "httpx", "aiohttp", "urllib3", "huggingface_hub"}
PLACE_FOR_NETWORK = "exporter/hub/connection.py"
IGNORED = re.compile(r"\[[\w, -]+\]\W+\w+")
WRITERS = {"write_text", "write_bytes"}
PLACE_FOR_WRITING = "src/qexport/safe_io/"

HEAVY = {"onnx", "onnx_ir", "onnxscript", "onnxslim", "onnxruntime", "torch", "transformers", "scipy", "tokenizers"}
HEAVY |= {"tensorrt", "tensorrt_rtx", "matplotlib", "ray", "PIL", "jinja2", "pyarrow"}


KEPT_KINDS = {".py", ".toml", ".j2", ".css", ".js"}  # of files that a wheel must hold


def python_files(*folders: str) -> Iterator[Path]:
    """Every Python file once, by its real path: links are not followed."""
    for folder in folders:
        yield from (p for p in sorted((ROOT / folder).rglob("*.py")) if p == p.resolve() and not generated(p))


def generated(path: Path) -> bool:
    return not GENERATED.isdisjoint(path.relative_to(ROOT).parts)


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[2] if parts[0] == "src" else parts[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "qexport":
                yield from (f"qexport.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_only_point_up_the_table_of_layers():
    hits = []
    for path in python_files(*OWN_CODE):
        used = {name.split(".")[1] for name in imported(path) if name.startswith("qexport.")}
        hits += [(names(path), name) for name in used - MAY_IMPORT[layer(path)] - {layer(path)}]
    assert hits == []


def test_folders_and_files_of_the_runtime_import_each_other_in_one_direction():
    arrows: dict[str, set[str]] = {}
    for path in python_files("runtime"):
        own = path.relative_to(ROOT / "runtime").with_suffix("").parts[0]
        found = {name.split(".")[2] for name in imported(path) if name.startswith("qexport.runtime.")}
        if own != "__init__":
            arrows.setdefault(own, set()).update(found - {own})
    assert {"generation", "speculation", "accounting"} <= set(arrows)
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, with the cycle


def test_a_layer_loads_only_the_packages_it_may():
    declared = declared_modules()
    hits = []
    for path in python_files(*OWN_CODE):
        roots = {name.split(".")[0] for name in imported(path)} - {"qexport"} - set(sys.stdlib_module_names)
        hits += [(names(path), name) for name in roots - MAY_LOAD.get(layer(path), declared)]
    assert hits == []


def declared_modules() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(t for extra in project["optional-dependencies"].values() for t in extra)]
    other_names = {"pillow": "PIL", "optimum_onnx": "optimum", "onnxruntime_gpu": "onnxruntime", "protobuf": "google"}
    other_names |= {"cuda_bindings": "cuda"}
    found = (Requirement(text).name.replace("-", "_") for text in texts)
    return {other_names.get(name, name) for name in found}


def test_a_file_has_at_most_400_lines():
    lengths = {names(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*TESTED_CODE)}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def switched_off(line: str) -> str | None:
    """What is wrong with how this line switches a check off, if it does."""
    if re.search(r"#\s*(ruff|flake8):\s*noqa", line):
        return "a whole file is never switched off"
    if match := re.search(r"#\s*noqa\b(.*)", line):
        if re.search(r"C901|PLR09", match[1]):
            return "limits are never switched off"
        if not re.match(r":\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*\W+\w+", match[1]):
            return "noqa without its rule or its reason"
    match = re.search(r"#\s*type:\s*ignore(.*)", line)
    return "type: ignore without its code or its reason" if match and not IGNORED.match(match[1]) else None


def test_a_check_that_is_switched_off_says_why():
    code = (path for path in python_files(*TESTED_CODE) if path != Path(__file__))
    lines = [(names(path), line) for path in code for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(name, line.strip(), wrong) for name, line in lines if (wrong := switched_off(line))] == []


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("x = 1  # noqa", False),
        ("x = 1  # noqa: E501", False),
        ("x = 1  # noqa: E501 a table reads better in one line", True),
        ("def f():  # noqa: C901 it is long", False),
        ("# ruff: noqa", False),
        ("import x  # type: ignore", False),
        ("import x  # type: ignore[import-untyped]", False),
        ("import x  # type: ignore[import-untyped]  # it has no stubs", True),
    ],
)
def test_the_search_for_switched_off_checks_finds_them(line, allowed):
    assert (switched_off(line) is None) == allowed


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden_call(node: ast.Call, where: str) -> str | None:
    name = dotted(node.func)
    if name in BANNED_CALLS and not where.startswith(BANNED_CALLS[name]):
        return name
    keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if keywords.get("allow_pickle") is True:
        return "allow_pickle=True"
    if where.startswith(PLACE_FOR_WRITING):
        return None
    if isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS and not written_through_safe_io(node.func):
        return name or node.func.attr
    return "open for writing" if opens_for_writing(node, name, keywords) else None


def written_through_safe_io(function: ast.Attribute) -> bool:
    """``safe_io.write_text(...)`` and the methods of a stage are the way to write."""
    return dotted(function.value).split(".")[-1] in {"safe_io", "stage"}


def opens_for_writing(node: ast.Call, name: str, keywords: dict[str | None, object]) -> bool:
    if name != "open" and not (isinstance(node.func, ast.Attribute) and node.func.attr == "open"):
        return False
    position = 1 if name in {"open", "io.open", "os.open"} else 0
    given = [a.value for a in node.args[position : position + 1] if isinstance(a, ast.Constant)]
    mode = keywords.get("mode", given[0] if given else "r")
    return isinstance(mode, str) and not set(mode).isdisjoint("wax+")


def test_no_call_writes_or_loads_behind_the_back_of_safe_io():
    hits = []
    for path in python_files(*OWN_CODE):
        calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
        hits += [(names(path), node.lineno, bad) for node in calls if (bad := forbidden_call(node, names(path)))]
        hits += [(names(path), 0, module) for module in BANNED_MODULES & set(imported(path))]
    assert hits == []


def test_one_file_alone_can_open_a_connection():
    users = {names(path) for path in python_files(*OWN_CODE) if NETWORK & {n.split(".")[0] for n in imported(path)}}
    assert users == {PLACE_FOR_NETWORK}


def test_one_command_alone_reaches_the_file_that_can_open_a_connection():
    door = "qexport.exporter.hub.connection"
    modules = {names(path): set(imported(path)) for path in python_files(*OWN_CODE)}
    users = {name for name, found in modules.items() if any(n == door or n.startswith(f"{door}.") for n in found)}
    assert users == {"exporter/hub/download.py", "exporter/hub/fetch.py", "src/qexport/cli/fetch.py"}
    users = {name for name, found in modules.items() if "qexport.exporter.hub.fetch" in found}
    assert users == {"src/qexport/cli/fetch.py"}


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("open('x', 'w')", "open for writing"),
        ("path.open('ab')", "open for writing"),
        ("path.open(mode='r+b')", "open for writing"),
        ("open('x')", None),
        ("path.open('rb')", None),
        ("path.write_text('x')", "path.write_text"),
        ("stage.write_text('name', 'x')", None),
        ("onnx.save(model, 'x')", "onnx.save"),
        ("read(file, allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_the_search_for_forbidden_calls_finds_them(code, bad):
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert forbidden_call(call, "exporter/x.py") == bad


def text_files() -> Iterator[Path]:
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".json", ""}
    found = (p for p in sorted(ROOT.rglob("*")) if not generated(p) and p == p.resolve() and p != Path(__file__))
    yield from (p for p in found if p.is_file() and p.suffix in kinds and "LICENSE" not in p.name)


def test_no_text_speaks_of_a_machine_or_of_how_the_project_was_made():
    banned = re.compile(
        r"(?<![\w.])/(work|home/\w+|root|Users/\w+)/|\.\./shared\b|\bsession [#0-9]|\bissue #?\d"
        r"|\bpypi\.org|pythonhosted|--(extra-)?index-url",
        re.IGNORECASE,
    )
    assert banned.search("see /work/main")
    assert banned.search("in session 3")
    assert not banned.search("a network/work/x of session state")
    hits = [f"{names(p)}: {m[0]}" for p in text_files() for m in banned.finditer(p.read_text(encoding="utf-8"))]
    assert hits == []


def test_every_symbolic_link_is_relative_and_resolves():
    links = [p for p in ROOT.rglob("*") if p.is_symlink() and not generated(p)]
    assert {PACKAGE / name for name in LINKED} <= set(links)
    for link in links:
        assert not link.readlink().is_absolute(), link
        assert link.exists(), link


def fresh_modules(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import qexport", HEAVY | {"numpy", "pydantic", "rich", "click"}),
        ("import qexport.runtime", HEAVY),
        ("import qexport.cli", HEAVY | {"numpy"}),
    ],
)
def test_importing_the_package_stays_light(statement, heavy):
    assert fresh_modules(statement) & heavy == set()


def test_the_public_names_are_these_and_resolve():
    names = ["BuildOptions", "ExportOptions", "ExportResult", "Recipe", "Result", "__version__"]
    assert qexport.__all__ == [*names, "build", "diff", "export", "inspect", "load_report", "verify"]
    for name in qexport.__all__:
        assert getattr(qexport, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        getattr(qexport, "biuld")  # noqa: B009 the point is a name that does not exist


def test_the_changelog_names_the_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert qexport.__version__ in headings


def test_constraints_pin_every_requirement_of_the_build_with_a_version_it_allows():
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *(text for name in ("cpu", "rtx", "export", "test", "dev") for text in extras[name]),
    ]
    for requirement in map(Requirement, texts):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_a_built_wheel_holds_every_module_recipe_and_template(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    skip = shutil.ignore_patterns(*GENERATED)
    for folder in OWN_CODE:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    inside = [p for p in PACKAGE.rglob("*") if not generated(p)]
    for folder in LINKED:
        inside += [PACKAGE / p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if not generated(p)]
    expected = {str(p.relative_to(ROOT / "src")) for p in inside if p.suffix in KEPT_KINDS or p.name == "py.typed"}
    assert {Path(name).suffix for name in expected} >= {".py", ".toml"}
    assert expected <= held
