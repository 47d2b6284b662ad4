"""What each backend accepts, as rows: adding a target is adding a row.

The TensorRT-RTX row was tried op by op with version 1.7.1 on a machine without a GPU; the TensorRT rows follow
the same parser and NVIDIA's documentation; the CPU row was measured on an AVX-512 VNNI machine with onnxruntime 1.31.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qexport.errors import UsageError
from qexport.passes.numbers.formats import Kind


@dataclass(frozen=True, slots=True)
class Target:
    """One backend.

    Attributes:
        name: What a person types.
        engine: Python module that builds engines, or ``None`` where the ONNX file is the artefact.
        providers: onnxruntime execution providers that run the file.
        activation: ``int8`` and ``fp8`` mean symmetric with zero point 0, ``uint8`` means affine.
        opset: Highest opset the backend reads.
        rest: Type of everything that is not quantized.
        table: How an int8 embedding table is read: ``dequantize`` puts DequantizeLinear before Gather,
            ``gather`` gathers rows and scales before it multiplies, ``float`` leaves the table alone.
        attention: Whether the Attention operator is read at any size and is faster than the operators it stands for.
            Engine builders find attention by themselves, and TensorRT-RTX 1.7 refuses the operator in float32 and for
            heads smaller than 16 where sizes are dynamic.
        min_dim: Smallest K and N of a matrix product worth quantizing.
        min_channels: Smallest number of input channels of a convolution worth quantizing.
        residual_add: Which inputs of a residual Add behind a convolution are quantized: ``skip``, where the other one
            fuses into the convolution; ``both``, where the Add itself has integer kernels; ``none``.
        integer_products: Whether onnxruntime's MatMulIntegerToFloat (uint8 x int8, float bias and output) is fast.
        plain_residuals: Whether a residual sum before LayerNormalization has to be kept from being merged with it.
        sparse_kernels: Whether it has kernels for 2:4 weights that read and write integers.
        formats: What else it reads: ``int4`` (blocked DequantizeLinear), ``nbits`` (onnxruntime's MatMulNBits), ``fp8``
            (float8e4m3fn Q/DQ), ``bfloat16``, ``dynamic`` (ranges per call), ``qlinear`` (integer-only operators),
            ``nf4`` (MatMulBnb4).
    """

    name: str
    engine: str | None
    providers: tuple[str, ...]
    activation: Kind
    opset: int
    rest: Literal["float16", "float32"]
    table: Literal["dequantize", "gather", "float"]
    attention: bool = False
    min_dim: int = 16
    min_channels: int = 16
    residual_add: Literal["none", "skip", "both"] = "skip"
    integer_products: bool = False
    plain_residuals: bool = False
    sparse_kernels: bool = False
    formats: frozenset[str] = frozenset()

    def demand(self, wanted: str, where: str = "") -> None:
        """Raise ``UsageError`` naming the targets that do, when this one does not read the format ``wanted``."""
        if wanted not in self.formats:
            others = [row.name for row in TARGETS.values() if wanted in row.formats]
            hint = f"targets that read it: {', '.join(others)}" if others else f"known: {', '.join(sorted(FORMATS))}"
            raise UsageError(f"target {self.name} does not read {wanted}", where=where or None, hint=hint)

    def using(self, numbers: Literal["fp8"] | None, where: str = "") -> Target:
        """The target with activations in other 8-bit numbers, or as it is; ``UsageError`` if it does not read them."""
        if numbers is None:
            return self
        self.demand(numbers, where)
        return replace(self, activation=numbers)


_CPU = ("CPUExecutionProvider",)
_ENGINE_FORMATS = frozenset({"int4", "fp8", "bfloat16"})
# no fp8: onnxruntime 1.31 has no such products, merges Q/DQ into MatMulIntegerToFloat, which refuses the type, and
# drops a Relu before an fp8 quantizer
_CPU_FORMATS = frozenset({"int4", "nbits", "nf4", "dynamic", "qlinear"})
FORMATS = _ENGINE_FORMATS | _CPU_FORMATS

TARGETS = {
    target.name: target
    for target in (
        # int8 arithmetic is not promised by TensorRT-RTX, so nothing is quantized for the sake of fusion alone
        Target(
            "tensorrt-rtx",
            "tensorrt_rtx",
            _CPU,
            "int8",
            24,
            "float16",
            "dequantize",
            residual_add="none",
            sparse_kernels=True,
            formats=_ENGINE_FORMATS,
        ),
        Target(
            "tensorrt",
            "tensorrt",
            _CPU,
            "int8",
            20,
            "float16",
            "dequantize",
            sparse_kernels=True,
            formats=_ENGINE_FORMATS - {"int4"},
        ),
        Target(
            "ort-cpu",
            None,
            _CPU,
            "uint8",
            24,
            "float32",
            "gather",
            residual_add="both",
            attention=True,
            integer_products=True,
            plain_residuals=True,
            formats=_CPU_FORMATS,
        ),
        Target(
            "ort-cuda",
            None,
            ("CUDAExecutionProvider", *_CPU),
            "int8",
            21,
            "float16",
            "dequantize",
            formats=_ENGINE_FORMATS - {"fp8"} | {"nbits"},
        ),
    )
}


def find_target(name: str) -> Target:
    """Return the row called ``name``; raise ``UsageError`` with the known names otherwise."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}", hint=f"known targets: {', '.join(TARGETS)}")
    return TARGETS[name]
