"""Groups for products whose number of inputs the wanted group does not divide."""

from __future__ import annotations

from dataclasses import replace

from qexport.passes.groups import Grid, check_group

STEP = 16  # groups are multiples of it, which every kernel for blocks takes


def fitted(grid: Grid, k: int, node: str, *, fit: bool) -> Grid:
    """The grid for a product with ``k`` inputs.

    With ``fit``, a group that does not divide k becomes the largest multiple of 16 below it that does: 704 inputs in
    groups of 128 are stored in groups of 64. Smaller groups cost space and lose nothing.

    Raises:
        UsageError: No group fits, or ``grid.group`` does not divide k and ``fit`` is off; names the node and groups
            that do.
    """
    if fit and grid.group and k % grid.group:
        smaller = range(grid.group - grid.group % STEP, 0, -STEP)
        grid = next((replace(grid, group=size) for size in smaller if k % size == 0), grid)
    check_group(grid, k, node)
    return grid
