"""SparseGPT: set weights to zero one input at a time, and let the inputs that are left make up for them.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot". With ``U^T U`` the
inverse of ``H = X^T X``, U upper triangular, as in ``numbers.gptq``:

1. What a number costs, once all inputs before it are settled, is ``w_k^2 / U_kk^2``. Masks are chosen by it for a block
   of inputs at a time, for ``n:m`` for a group at a time (section 3, "adaptive mask selection").
2. The error of input k, which is its weight where that goes and 0 elsewhere, is divided by ``U_kk`` and taken off every
   later input j times ``U_kj`` (algorithm 1).
3. Updates stay inside a block of inputs until it is done, then reach the others at once.
"""

from __future__ import annotations

import numpy as np

from qexport.passes.numbers.gptq import Square, inverse_factor
from qexport.passes.numbers.masks import Mask, Pattern, Scope, Scores, keep_mask, largest


def sparse_gpt(
    weight: Scores,
    hessian: Square,
    pattern: Pattern,
    *,
    per: Scope = "layer",
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Mask, Scores]:
    """Choose the mask of a weight and the numbers that stay, for the least output error.

    An input that no sample has used (a zero on H's diagonal) goes first and moves no other.

    Args:
        weight: ``[K, N]``.
        hessian: ``X^T X`` of the rows that the weight is multiplied with, ``[K, K]``, up to a positive factor.
        pattern: What is zero; its groups divide K.
        per: Whether numbers compete within a block of inputs of all outputs, or of each.
        damping: Share of H's mean diagonal that is added to the diagonal; raised tenfold until H can be factorized.
        block: Inputs whose masks are chosen together and whose updates are held back together.

    Returns:
        The mask, and the weight with its updates, zero elsewhere, float64.

    Raises:
        ValueError: The pattern would leave nothing, or does not divide K.
    """
    factor = inverse_factor(hessian, damping)
    cost = np.where(np.diag(hessian) > 0, 1 / np.square(np.diag(factor)), 0.0)[:, None]
    work = np.array(weight, np.float64)
    mask = np.empty(work.shape, bool)
    count, step = len(work), block if not pattern.group else max(block // pattern.group, 1) * pattern.group
    if pattern.group and count % pattern.group:
        raise ValueError(f"groups of {pattern.group} do not divide {count} inputs")
    for start in range(0, count, step):
        end = min(start + step, count)
        if not pattern.group:
            scores = np.square(work[start:end]) * cost[start:end]
            mask[start:end] = _share(scores, pattern, per, start, count)
        errors = np.empty((end - start, work.shape[1]))
        for k in range(start, end):
            if pattern.group and (k - start) % pattern.group == 0:
                group = slice(k, k + pattern.group)
                mask[group] = keep_mask(np.square(work[group]) * cost[group], pattern)
            error = np.where(mask[k], 0.0, work[k]) / factor[k, k]
            work[k + 1 : end] -= np.outer(factor[k, k + 1 : end], error)
            errors[k - start] = error
        work[end:] -= factor[start:end, end:].T @ errors
    return mask, np.where(mask, work, 0.0)


def _share(scores: Scores, pattern: Pattern, per: Scope, start: int, count: int) -> Mask:
    """The mask of a block of ``count`` inputs; blocks make up for how the ones before were rounded."""
    width = 1 if per == "output" else scores.shape[1]
    pattern.zeros(count * width)
    ends = [round(pattern.ratio * width * inputs) for inputs in (start, start + len(scores))]
    kept = len(scores) * width - (ends[1] - ends[0])
    return largest(scores if per == "output" else scores.reshape(-1), kept).reshape(scores.shape)
