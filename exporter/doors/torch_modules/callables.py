"""From ``package.module:name`` or ``path/to/file.py:name`` to the thing itself; importing a module runs its code."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from qexport.errors import EnvironmentMismatch, QexportError, UsageError

_FORM = "write module:callable, or path/to/file.py:callable"


def is_callable_name(source: str) -> bool:
    """Whether a source is meant as ``module:callable`` or ``file.py:callable`` and not as a path."""
    place, colon, name = source.rpartition(":")
    return bool(colon and place) and all(part.isidentifier() for part in name.split("."))


def call(source: str) -> Any:
    """Import the module and call the callable without arguments; what they print goes to stderr.

    Their folder, or the current one for a module, is on the module path meanwhile.

    Raises:
        UsageError: Not of that form, nothing of that name, not callable, or its code fails.
        EnvironmentMismatch: It imports a package that is missing.
    """
    if not is_callable_name(source):
        raise UsageError("neither a module and a callable nor a file and a callable", where=source, hint=_FORM)
    place, _, name = source.rpartition(":")
    path = Path(place) if place.endswith(".py") else None
    if path is not None and not path.is_file():
        raise UsageError("no such file", where=place, hint=_nearest(path.name, _files(path.parent)) or _FORM)
    with _importable(Path.cwd() if path is None else path.resolve().parent), redirect_stdout(sys.stderr):
        module = _guarded(source, lambda: _run_file(path) if path else _find_module(place))
        found = _attribute(module, name, source)
        return _guarded(source, found)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _guarded(source: str, action: Callable[[], Any]) -> Any:
    """Run code that is not ours; say what failed, and where in its file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # told, but never raised, whatever the caller's filters
            return action()
    except QexportError:
        raise
    except ModuleNotFoundError as error:
        hint = f"install what has {error.name!r}"
        raise EnvironmentMismatch(f"module {error.name!r} is missing", where=source, hint=hint) from error
    except (Exception, SystemExit) as error:  # exit() would end this program with a code of its own
        raise UsageError(f"its code failed: {told(error)}", where=source) from error


def told(error: BaseException) -> str:
    """The class of an exception and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _run_file(path: Path) -> ModuleType:
    """Import a file under a name that no other module has, whatever the file is called."""
    name = f"_qexport_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("not a Python file", where=str(path), hint=_FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _find_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # another one, that it imports
        parent = name.rpartition(".")[0]
        hint = _nearest(name, _modules(parent if error.name == name else "")) or _FORM
        raise UsageError(f"no module {error.name!r}", where=name, hint=hint) from error


def _attribute(module: ModuleType, name: str, where: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = _nearest(part, [each for each in dir(found) if not each.startswith("_")])
            raise UsageError(f"no {part!r} in {where.rpartition(':')[0]!r}", where=where, hint=near or _FORM)
        found = getattr(found, part)
    if not callable(found):
        what = f"{name!r} is no callable but of type {type(found).__name__!r}"
        raise UsageError(what, where=where, hint="name a function or class that makes the module")
    return found  # type: ignore[no-any-return]  # callable, as was just seen


def _nearest(name: str, known: list[str]) -> str | None:
    near = get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else None


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.py"))


def _modules(parent: str) -> list[str]:
    """Names of the modules of a package, or of all that can be imported."""
    if not parent:
        return [found.name for found in pkgutil.iter_modules()]
    places = getattr(sys.modules.get(parent), "__path__", [])
    return [f"{parent}.{found.name}" for found in pkgutil.iter_modules(places)]
