"""Open what was built or exported with the backend that fits it and the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qexport.errors import EnvironmentMismatch, UsageError
from qexport.runtime.backends.artefact import (
    MANIFEST,
    MODEL,
    PLAN,
    Artefact,
    check_files,
    gpu_capability,
    load_module,
    load_plan,
    open_artefact,
    refuse_header,
)
from qexport.runtime.backends.cuda import open_cuda
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.backends.ort_cuda import CUDA
from qexport.runtime.backends.tensorrt import EngineSession
from qexport.runtime.session import Session, SessionOptions, available_providers
from qexport.safe_io import of_one_version, open_file

CPU = "CPUExecutionProvider"
ENGINES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Backends that run engines, and their modules."""

PROVIDERS = {"ort-cpu": (CPU,), "ort-cuda": (CUDA, CPU)}
"""Backends that run graphs, and the providers of onnxruntime for each."""

BACKENDS = (*PROVIDERS, *ENGINES)


def open_session(model: bytes | str | Path, options: SessionOptions | None = None) -> Session:
    """Open a model.

    What the manifest of a folder says of its files is checked before anything is loaded: their digests, and whether an
    engine was built by the installed module and for the GPU that is here. Where no backend is asked for, an engine that
    fits is taken, else the graph beside it: on a GPU if it was built for one, or exported for any, and onnxruntime has
    the provider; else on the processor. A folder that is replaced while it is read is read again.

    Args:
        model: A folder that ``build`` or ``export`` wrote, a graph or an engine in it, an .onnx file from elsewhere, or
            the bytes of one.
        options: How to run.

    Raises:
        UsageError: There is no such backend, or nothing that it runs.
        UnsafeInput: A folder or an engine without a manifest, or what is no regular file.
        IntegrityError: A file is not the one that the manifest lists.
        EnvironmentMismatch: A module, a driver or a GPU is missing, or of another kind than the engine was built for.
        BuildFailed: The backend cannot load the model.
    """
    chosen = options or SessionOptions()
    if chosen.backend is not None and chosen.backend not in BACKENDS:
        raise UsageError(f"no backend called {chosen.backend!r}", hint=f"known: {', '.join(BACKENDS)}")
    if isinstance(model, bytes):
        return _open_graph(model, chosen, None)
    path = Path(model)
    return of_one_version(path if path.is_dir() else path.parent, lambda: _open_path(path, chosen))


def _open_path(path: Path, chosen: SessionOptions) -> Session:
    if path.is_dir():
        return _open_folder(open_artefact(path), chosen)
    if path.name == PLAN:
        return _open_engine(open_artefact(path.parent), chosen)
    if not path.exists():
        raise UsageError("there is no such file", where=str(path))
    with open_file(path) as file:  # refuses what would be waited for, such as a FIFO
        refuse_header(file.read(5), str(path))
    if (path.parent / MANIFEST).exists():
        artefact = open_artefact(path.parent)
        check_files(artefact, path.name)
        return _open_graph(path, chosen, artefact.target)
    return _open_graph(path, chosen, None)


def _open_folder(artefact: Artefact, options: SessionOptions) -> Session:
    """An engine that fits, or the graph."""
    if options.backend in ENGINES:
        return _open_engine(artefact, options)
    if options.backend is None and artefact.engine is not None and PLAN in artefact.files:
        try:
            return _open_engine(artefact, options)
        except EnvironmentMismatch:
            if MODEL not in artefact.files:
                raise
    if MODEL not in artefact.files:
        raise UsageError(f"no {MODEL} in it", where=str(artefact.folder))
    check_files(artefact, MODEL)
    return _open_graph(artefact.folder / MODEL, options, artefact.target)


def _open_engine(artefact: Artefact, options: SessionOptions) -> Session:
    built_by = str((artefact.engine or {}).get("module"))
    wanted = built_by if options.backend is None else ENGINES.get(options.backend)
    if options.backend is not None and wanted != built_by:
        what = f"the folder has no engine of {options.backend}"
        hint = f"it has one of {built_by}" if artefact.engine else "qexport build makes engines"
        raise UsageError(what, where=str(artefact.folder), hint=hint)
    plan = load_plan(artefact, options.device)
    metadata = (artefact.engine or {}).get("metadata") or {}
    return EngineSession(plan, load_module(built_by), open_cuda(options.device), options, dict(metadata))


def _open_graph(model: bytes | Path, options: SessionOptions, target: str | None) -> Session:
    """A graph in onnxruntime."""
    if options.backend in ENGINES:
        raise UsageError(f"{options.backend} runs engines, not graphs", hint="give the folder of a build")
    if options.backend is not None:
        options = replace(options, providers=PROVIDERS[options.backend])
    elif options.providers == (CPU,) and isinstance(model, Path) and _on_gpu(target, options):
        options = replace(options, providers=PROVIDERS["ort-cuda"])
    return OrtSession(model, options)


def _on_gpu(target: str | None, options: SessionOptions) -> bool:
    """Whether a graph that was built for ``target`` runs better on a GPU that is here."""
    if target == "ort-cpu" or CUDA not in available_providers():
        return False
    try:
        gpu_capability(options.device)
    except EnvironmentMismatch:
        return False
    return True
