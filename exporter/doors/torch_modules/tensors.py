"""Torch tensors to numpy arrays and back, without a copy where that is possible; numpy has bfloat16 from ml_dtypes."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qexport.errors import EnvironmentMismatch

_BITS = {
    "bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
"""Types that numpy does not have: the type of the same width that carries the bits, and who reads them."""


def import_torch(what: str) -> Any:
    """Return torch; raise ``EnvironmentMismatch``, with what needs it and how to get it, where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
    except ImportError as error:
        raise EnvironmentMismatch(f"{what} need torch", hint="pip install 'qexport[export]'") from error
    return torch


def to_array(tensor: Any) -> NDArray[Any]:
    """The numbers of a dense tensor in CPU memory, shared with it.

    Raises:
        TypeError: It is sparse, quantized, elsewhere, or of a type that arrays do not have.
    """
    import torch

    plain = tensor.detach()
    name = str(plain.dtype).removeprefix("torch.")
    if name in _BITS:
        bits, kind = _BITS[name]
        array: NDArray[Any] = plain.view(getattr(torch, bits)).numpy().view(kind)
        return array
    array = plain.resolve_conj().resolve_neg().numpy()
    return array


def to_tensor(array: NDArray[Any]) -> Any:
    """A tensor of the same numbers, in memory of its own."""
    import torch

    own = np.array(array, order="C")
    for name, (_, kind) in _BITS.items():
        if own.dtype == kind:
            bits = own.view(np.uint8 if kind.itemsize == 1 else np.int16)
            return torch.from_numpy(bits).view(getattr(torch, name))
    return torch.from_numpy(own)
