"""Which shapes an engine is built for: profiles from the samples, and for decoders how long their caches are."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qexport.calibration.reading.spec import keeps_cache
from qexport.errors import UsageError
from qexport.exporter.engines.profiles import Profile, check_profile, derive_profile
from qexport.exporter.recipe import Recipe
from qexport.exporter.samples import Samples, longest, positions
from qexport.passes.portable import COLUMNS, IDS, past_name

DEFAULT_COLUMNS = 2048
STEP = 8  # tokens of the widest step: one, or a draft that is verified


@dataclass(frozen=True, slots=True)
class Shapes:
    """Profiles of an engine, and the dynamic sizes that are fixed numbers in it."""

    profiles: tuple[Profile, ...]
    frozen: tuple[tuple[str, int], ...] = ()


def engine_shapes(model: ir.Model, recipe: Recipe, samples: Samples) -> Shapes:
    """What the recipe says, or else what the samples show.

    Builders do not take caches of a dynamic length, so an engine has room for ``export.max_seq`` tokens. Of a decoder
    that keeps a cache there are two profiles: one for prompts, one for steps of up to 8 tokens.

    Raises:
        UsageError: A profile does not fit the model, or gives caches several lengths.
    """
    inputs, given = model.graph.inputs, recipe.export.profiles
    cached = keeps_cache(model)
    if given is not None:
        profile = check_profile(inputs, given)
        return Shapes((profile,), _frozen(profile) if cached else ())
    known = samples.calibration or (samples.judge.data if samples.judge else ())
    seen = [{name: array.shape for name, array in sample.items()} for sample in known]
    limit = longest(model, recipe) if any(value.name == IDS for value in inputs) else None
    batch = recipe.export.max_batch
    if not cached:
        return Shapes((derive_profile(inputs, seen, limit=limit, max_batch=batch),))
    columns = {COLUMNS: recipe.export.max_seq or min(DEFAULT_COLUMNS, positions(model) or DEFAULT_COLUMNS)}
    prompts = derive_profile(inputs, seen, limit=limit, max_batch=batch, fixed=columns)
    steps = derive_profile(inputs, [{IDS: (1,)}], limit=STEP, max_batch=batch, fixed=columns)
    return Shapes((prompts, steps), tuple(columns.items()))


def _frozen(profile: Profile) -> tuple[tuple[str, int], ...]:
    sizes = {shape[2] for shape in profile[past_name(0, "key")]}
    if len(sizes) > 1:
        what = f"caches of an engine have one length, the profile gives {', '.join(map(str, sorted(sizes)))}"
        raise UsageError(what, where="export.profiles", hint="write the same number three times")
    return ((COLUMNS, sizes.pop()),)
