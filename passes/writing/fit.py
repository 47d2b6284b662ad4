"""Which products of a model a method rounds, each on a grid that fits its number of inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir

from qexport.passes.base import Decision
from qexport.passes.numbers.groups import SMALLEST_GROUP, Grid, as_matrix, check_group, misfit_groups
from qexport.passes.placement import Site
from qexport.passes.target import Target
from qexport.passes.writing.lowbit import Choice, decision
from qexport.passes.writing.qdq import needs_half


def fitted(grid: Grid, k: int, node: str, *, fit: bool) -> Grid:
    """The grid for a product with ``k`` inputs.

    With ``fit``, a group that does not divide k is halved until it does, down to 16: 704 inputs in groups of 128 are
    stored in groups of 64. Smaller groups cost space and lose nothing. Where none divides k, and k is at most twice the
    group, all inputs share a scale, as 172 do.

    Raises:
        UsageError: No group fits, or ``grid.group`` does not divide k and ``fit`` is off; names the node and groups
            that do.
    """
    size = grid.group
    while fit and size and k % size and size % 2 == 0 and size // 2 >= SMALLEST_GROUP:
        size //= 2
    if fit and size and k % size and k <= 2 * grid.group:
        size = 0
    found = grid if size and k % size else replace(grid, group=size)
    check_group(found, k, node)
    return found


def choose_grids(
    model: ir.Model, choice: Choice, wanted: Grid, target: Target, *, fit: bool
) -> tuple[dict[Site, Grid], list[Decision]]:
    """The products to round, each with its grid, and why others are not.

    Raises:
        UsageError: As :func:`fitted`.
    """
    sites, refused = choice.linears(model)
    readers = Counter(site.node.inputs[1] for site in sites)
    grids = {}
    for site in sites:
        weight = as_matrix(site)
        grid = fitted(wanted, len(weight), site.node.name or "", fit=fit)
        reason = misfit_groups(weight, grid, half=needs_half(target, site.kernel.dtype))
        if readers[site.node.inputs[1]] > 1:
            reason = "several products read its weight"
        if reason is None:
            grids[site] = grid
        else:
            refused.append(decision(site.node, "skipped", reason))
    return grids, refused
