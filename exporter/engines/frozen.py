"""Fixed numbers in place of dynamic sizes that a builder does not take, such as the length of caches."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import onnx

from qexport.errors import UsageError


def freeze(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """Give the dynamic sizes called so their numbers wherever the main graph names them; edits and returns ``model``.

    Raises:
        UsageError: No input has a size of that name, or a number is below 1.
    """
    graph = model.graph
    named = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    for name, size in sizes.items():
        if name not in named:
            near = get_close_matches(name, named, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"dynamic sizes: {', '.join(sorted(named)) or 'none'}"
            raise UsageError(f"no input has a size called {name!r}", where="frozen sizes", hint=hint)
        if size < 1:
            raise UsageError(f"{name} = {size}: expected a size of at least 1", where="frozen sizes")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return model
