"""Dtypes as the profiler names them."""

from __future__ import annotations

SIZES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "long": 8, "short": 2, "short int": 2,
    "signed char": 1, "char": 1, "unsigned char": 1, "bool": 1, "c10::Float8_e4m3fn": 1, "c10::Float8_e4m3fnuz": 1,
    "c10::Float8_e5m2": 1, "c10::Float8_e5m2fnuz": 1, "c10::complex<float>": 8, "c10::complex<double>": 16,
}  # fmt: skip
"""Bytes an element."""

_RATES = {
    "float": "float32", "c10::BFloat16": "bfloat16", "c10::Half": "float16", "signed char": "int8", "char": "int8",
}  # fmt: skip


def size(name: str) -> int:
    """Bytes an element; 2 for a type that is not known."""
    return SIZES.get(name, 2)


def rate(name: str) -> str:
    """The matrix rate of `gpus.Gpu` that bounds an op on such inputs, or ""."""
    return "fp8" if "Float8" in name else _RATES.get(name, "")
