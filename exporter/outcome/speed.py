"""What calls of a decoder take on the machine that wrote it, kept beside the model for whoever decodes there."""

from __future__ import annotations

import onnx_ir as ir

from qexport.calibration.reading.spec import keeps_cache
from qexport.errors import EnvironmentMismatch, QexportError
from qexport.exporter.load import ONNX_FILE
from qexport.passes.portable import CROSS, PAST
from qexport.passes.target import Target
from qexport.runtime.accounting.costs import count_costs
from qexport.runtime.accounting.curve import Plan, Setting, measure_profile
from qexport.runtime.accounting.machine import count_threads, fingerprint
from qexport.runtime.accounting.profiles import FILE, Profile, profiles_json
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions
from qexport.safe_io import Stage

MOST = 128_000_000
"""Bytes of a model from which it is not loaded for that: writing it took a fraction of this memory. Whoever loads it to
decode measures then."""
SECONDS = 0.15  # for each number of threads
_RUNNABLE = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def keep_profile(stage: Stage, model: ir.Model) -> tuple[str, ...]:
    """Measure a decoder in the portable layout and keep what was found in the stage; returns warnings.

    Nothing is measured, and nothing said, where the model is no such decoder, where the processor does not run it,
    where it is large, or where onnxruntime is missing. Nothing that goes wrong here is a reason to lose an export.
    """
    size = sum(size for name, (size, _) in stage.files.items() if name.startswith(ONNX_FILE))
    if size > MOST or not _measurable(model):
        return ()
    try:
        found = [_measured(stage, model, threads) for threads in sorted({1, count_threads(0)})]
    except EnvironmentMismatch:
        return ()
    except QexportError as error:
        return (f"how long the decoder takes was not measured: {error.what}",)
    stage.write_json(FILE, profiles_json(found))
    return ()


def runs_on_processor(target: Target) -> bool:
    """Whether what is built for a target is run by onnxruntime on the processor."""
    return target.engine is None and target.providers[0] == "CPUExecutionProvider"


def _measurable(model: ir.Model) -> bool:
    """Whether it decodes by itself, in types that the processor has."""
    inputs = {value.name or "": value for value in model.graph.inputs}
    crossed = any(name.startswith(CROSS) for name in inputs)
    caches = {value.dtype for name, value in inputs.items() if name.startswith(PAST)}
    return keeps_cache(model) and not crossed and caches <= set(_RUNNABLE)


def _measured(stage: Stage, model: ir.Model, threads: int) -> Profile:
    with Decoder(stage.path / ONNX_FILE, SessionOptions(threads=threads)) as decoder:
        return measure_profile(decoder, count_costs(model), Setting(fingerprint(), threads), Plan(seconds=SECONDS))
