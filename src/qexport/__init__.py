"""qexport: a trained model in, a small and fast engine out, with the proof that it is as good.

``build``, ``export``, ``diff``, ``verify`` and ``inspect`` do what the commands of these names do, and return what
``--json`` prints. ``load_report`` reads what a build has left in its folder; ``qexport.runtime`` runs it. Errors are of
``qexport.errors``, where each class has the exit code that the command ends with.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qexport.exporter.build import build as build
    from qexport.exporter.compare.changes import diff as diff
    from qexport.exporter.export import export as export
    from qexport.exporter.looking.inspect import inspect as inspect
    from qexport.exporter.options import BuildOptions as BuildOptions
    from qexport.exporter.options import ExportOptions as ExportOptions
    from qexport.exporter.outcome.export_result import ExportResult as ExportResult
    from qexport.exporter.outcome.result import Result as Result
    from qexport.exporter.recipe import Recipe as Recipe
    from qexport.exporter.replay import verify as verify
    from qexport.exporter.report.files import load_report as load_report

_HOMES = {
    "BuildOptions": "qexport.exporter.options",
    "build": "qexport.exporter.build",
    "diff": "qexport.exporter.compare.changes",
    "ExportOptions": "qexport.exporter.options",
    "ExportResult": "qexport.exporter.outcome.export_result",
    "export": "qexport.exporter.export",
    "inspect": "qexport.exporter.looking.inspect",
    "load_report": "qexport.exporter.report.files",
    "Recipe": "qexport.exporter.recipe",
    "Result": "qexport.exporter.outcome.result",
    "verify": "qexport.exporter.replay",
}

__all__ = [
    "BuildOptions",
    "ExportOptions",
    "ExportResult",
    "Recipe",
    "Result",
    "__version__",
    "build",
    "diff",
    "export",
    "inspect",
    "load_report",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562), so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qexport' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return __all__
