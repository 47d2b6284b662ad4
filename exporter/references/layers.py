"""The layers that models are made of, in plain numpy; every function keeps the float type of ``x``.

Shapes: ``x`` [..., width]; heads [batch, heads, tokens, size]; weights as torch stores them, [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.exporter.families.form import Form

Array: TypeAlias = NDArray[Any]

_STEP, _END = 1 / 512, 6.5  # of the table of erf, which is 1 in double precision from 5.93 on
_GRID = np.arange(-_END, _END + 2 * _STEP, _STEP)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x W^T + b``; the product in the type of the weight, which takes half the time of doubles."""
    product: Array = (x.astype(weight.dtype, copy=False) @ weight.T).astype(x.dtype, copy=False)
    return product if bias is None else product + bias


def layer_norm(x: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    """``(x - mean) / sqrt(variance + epsilon) gamma + beta`` over the last axis (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    scaled: Array = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + _like(x, epsilon))
    return scaled * gamma + beta


def rms_norm(x: Array, gamma: Array, epsilon: float) -> Array:
    """``x / sqrt(mean(x x) + epsilon) gamma`` over the last axis (Zhang & Sennrich 2019)."""
    scaled: Array = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + _like(x, epsilon))
    return scaled * gamma


def gelu(x: Array) -> Array:
    """``x Phi(x)`` with the distribution function of a normal variable (Hendrycks & Gimpel 2016)."""
    below: Array = (0.5 + 0.5 * erf(x / math.sqrt(2))).astype(x.dtype)
    return x * below


def erf(x: Array) -> NDArray[np.float64]:
    """The error function, to 1e-12: cubic between values and slopes of a table."""
    places = np.clip((x.astype(np.float64) + _END) / _STEP, 0, 2 * _END / _STEP)
    left = np.nan_to_num(places).astype(np.int64)
    values, slopes = _erf_table()
    along = places - left
    rise, first, last = values[left + 1] - values[left], slopes[left], slopes[left + 1]
    bend = (1 - along) * (first - rise) - along * (last - rise)
    found: NDArray[np.float64] = values[left] + along * (rise + (1 - along) * bend)
    return found


@cache
def _erf_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values on the grid, and slopes times the step."""
    return np.array([math.erf(x) for x in _GRID]), 2 / math.sqrt(math.pi) * np.exp(-np.square(_GRID)) * _STEP


def gelu_tanh(x: Array) -> Array:
    """The approximation of ``gelu`` by tanh, of the same paper."""
    below: Array = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * below


def silu(x: Array) -> Array:
    """``x sigmoid(x)``."""
    sigmoid: Array = 0.5 + 0.5 * np.tanh(0.5 * x)  # without an overflow of exp
    return x * sigmoid


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    positive: Array = np.maximum(x, _like(x, 0))
    return positive


def relu2(x: Array) -> Array:
    """``max(x, 0)^2`` (So et al. 2021)."""
    positive = relu(x)
    return positive * positive


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
    "silu": silu,
    "swish": silu,
}
"""By the names that config.json has for them."""


def softmax(x: Array) -> Array:
    """Over the last axis; a row of nothing but ``-inf`` is all 0."""
    most = x.max(-1, keepdims=True)
    powers: Array = np.exp(x - np.where(np.isfinite(most), most, _like(x, 0)))
    total = powers.sum(-1, keepdims=True)
    chances: Array = powers / np.where(total == 0, _like(x, 1), total)
    return chances


def kept(x: Array, form: Form) -> Array:
    """Numbers as a graph of the form has them among its weights."""
    return x.astype(form.dtype.numpy()).astype(x.dtype)


def constant(number: float, form: Form) -> float:
    """What is an attribute in the portable layout, and elsewhere a number of the graph's own type."""
    return number if form.cached else float(kept(np.array(number, np.float32), form))


def split_heads(x: Array, heads: int) -> Array:
    """[batch, tokens, heads * size] to [batch, heads, tokens, size]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """The way back from ``split_heads``."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def causal(tokens: int, window: int | None = None) -> NDArray[np.bool_]:
    """[tokens, tokens], true where a query (row) sees a key: none after it, the last ``window`` with itself."""
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def attention(
    heads: tuple[Array, Array, Array],
    *,
    scale: float,
    seen: NDArray[np.bool_] | None = None,
    bias: Array | None = None,
) -> Array:
    """``softmax(scale q k^T + bias) v``; neighbouring queries share a key head (Ainslie et al. 2023).

    Args:
        heads: Query [batch, heads, queries, size]; key and value [batch, key heads, keys, size].
        scale: Factor of the products.
        seen: True where a query sees a key; broadcasts to [batch, heads, queries, keys]. All, if not given.
        bias: Added to the scaled products; broadcasts likewise.

    Returns:
        [batch, queries, heads * size].
    """
    query, key, value = heads
    times = query.shape[1] // key.shape[1]
    scores = query @ np.repeat(key, times, axis=1).swapaxes(-1, -2) * _like(query, scale)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = np.where(seen, scores, _like(query, -np.inf))
    return merge_heads(softmax(scores) @ np.repeat(value, times, axis=1))


def rope_frequencies(dim: int, theta: float) -> NDArray[np.float64]:
    """Radians per position of each pair, [dim / 2] (Su et al. 2021, section 3.2.2)."""
    return np.array([theta ** (-2 * pair / dim) for pair in range(dim // 2)])


def rotate(x: Array, turns: NDArray[np.complex128]) -> Array:
    """Turn the first coordinates of each head as pairs; coordinate ``i`` pairs with ``i + n``.

    Args:
        x: [..., tokens, size].
        turns: [tokens, n], ``exp(i angle)`` times a factor; what stands behind coordinate ``2 n`` stays.
    """
    pairs = turns.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = (first + 1j * second) * turns
    return np.concatenate([turned.real.astype(x.dtype), turned.imag.astype(x.dtype), rest], -1)


def _like(x: Array, number: float) -> Any:
    return x.dtype.type(number)
