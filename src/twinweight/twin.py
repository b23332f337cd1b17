"""What kinds of twin there are: what each weighs, where it can be used, how it is filled and multiplied.

A kind is named by the dtype it holds ("bfloat16", "float32": dense, exact) or is one of `LOSSY`, which round activations to 8
bits in every call; `fp8-row` and `int8` round the weight as well. A dense twin is one tensor [N, K], a lossy one has scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinweight.asked import given_or_set, one_of
from twinweight.kernels import backend_for, dense_linear, int8
from twinweight.kernels.pages import in_huge_pages
from twinweight.kernels.prepared import TILE_BYTES, KernelWeight

LOSSY = {"int8": torch.int8, "fp8-row": torch.float8_e4m3fn, "fp8-exact": torch.float8_e4m3fn}
"""The 8-bit kinds and what their data is."""

FROM_DENSE = ("fp8-row",)
"""Of those, what `fill` also makes from a dense weight."""

REQUESTS: Mapping[str, tuple[str, ...]] = {
    "dense": (), "int8": ("int8",), "fp8": ("fp8-exact", "fp8-row"), "fp8-exact": ("fp8-exact",), "fp8-row": ("fp8-row",),
}  # fmt: skip
"""What may be asked for, and the kinds that are then offered beside dense twins."""

VARIABLE = "TWINWEIGHT_DTYPE"
_WHAT = "twin dtype"
GROUP = 128  # columns that share a scale in an fp8-exact twin


def check_request(value: str) -> str:
    """`value`, one of `REQUESTS`. Raises ConfigError naming them."""
    return one_of(_WHAT, value, REQUESTS)


def request(given: str | None, environ: Mapping[str, str] | None = None) -> str:
    """What is asked for: `given`, else TWINWEIGHT_DTYPE, else "dense". Raises ConfigError for a value that is not known."""
    return given_or_set(_WHAT, given, VARIABLE, REQUESTS, environ)


def dense_kinds(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """The exact kinds that may be worth their bytes for activations of `dtype`."""
    return tuple(str(d).removeprefix("torch.") for d in backend_for(device).twin_dtypes(dtype))


def refusal(kind: str, n: int, k: int, group_size: int, act_order: bool, device: torch.device) -> str | None:
    """Why a weight cannot have a lossy kind; None where it can."""
    if kind == "int8":
        if device.type != "cpu":
            return "only on a CPU"
        if k > int8.MAX_K:
            return f"K is {k}, at most {int8.MAX_K} fit int32 sums"
        return None if int8.available() else "this CPU has neither VNNI nor AMX, or torch's int8 product is not exact on it"
    if device.type == "cpu":
        return "only on a GPU"
    exact = kind == "fp8-exact"
    least = (9, 0) if exact else (8, 9)
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < least:
        return f"needs an NVIDIA GPU of compute capability {least[0]}.{least[1]}"
    if n % 16 or k % (GROUP if exact else 16):
        return f"N is {n} and K {k}, expected multiples of 16 and {GROUP if exact else 16}"
    if exact and (act_order or group_size % GROUP):
        return f"groups of {group_size}{' in act-order' if act_order else ''} are not blocks of {GROUP} columns"
    return None


def scales_shape(kind: str, n: int, k: int) -> tuple[int, ...] | None:
    """Of the fp32 scales of a lossy kind: one a row, or one for 128 columns of a row; None for dense twins."""
    if kind not in LOSSY:
        return None
    return (n, k // GROUP) if kind == "fp8-exact" else (n,)


def held_bytes(data: Tensor | None, scales: Tensor | None) -> int:
    """Bytes that a twin holds, padding and scales included; 0 where there is none."""
    return sum(t.untyped_storage().nbytes() for t in (data, scales) if t is not None)


def nbytes(kind: str, n: int, k: int, device: torch.device) -> int:
    """Bytes of a twin, padding and scales included."""
    shape = scales_shape(kind, n, k)
    if shape is None:
        return backend_for(device).twin_bytes(n, k, getattr(torch, kind), device)
    return n * k + 4 * torch.Size(shape).numel()


def empty(kind: str, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """An uninitialised twin: (data [N, K], scales or None)."""
    shape = scales_shape(kind, n, k)
    if shape is None:
        return backend_for(device).empty_twin(n, k, getattr(torch, kind), device), None
    data = torch.empty(n, k, dtype=LOSSY[kind], device=device)
    if device.type == "cpu":
        in_huge_pages(data)
    # Scales of one block of columns lie side by side, as the fp8 product wants them.
    return data, torch.empty(shape[::-1], dtype=torch.float32, device=device).t()


def kind_of(data: Tensor, scales: Tensor | None) -> str:
    """The kind of a twin, from its tensors."""
    if scales is None:
        return str(data.dtype).removeprefix("torch.")
    if data.dtype == torch.int8:
        return "int8"
    return "fp8-row" if scales.dim() == 1 else "fp8-exact"


@torch.no_grad()
def fill(w: KernelWeight | Tensor, data: Tensor, scales: Tensor | None) -> None:
    """Write a twin in place from its int4 weight; one of `FROM_DENSE` also from the dense weight [N, K]. Temporaries stay
    below 2 x TILE_BYTES.
    """
    backend = backend_for(data.device)
    if isinstance(w, Tensor):
        from twinweight.kernels import fp8

        kind = kind_of(data, scales)
        if scales is None or kind not in FROM_DENSE:
            raise ValueError(f"w: expected an int4 weight for a twin of kind {kind}, found a dense one")
        scales.copy_(fp8.row_twin(w, data)[1])
    elif scales is None:
        backend.expand(w, data)
    elif data.dtype == torch.int8:
        step = max(64, TILE_BYTES // 16 // w.k // 64 * 64)
        scratch = torch.empty(min(step, w.n), w.k, dtype=torch.float32)
        for start in range(0, w.n, step):
            rows = slice(start, min(start + step, w.n))
            dense = scratch[: rows.stop - start]
            backend.expand_rows(w, start, rows.stop, dense)
            data[rows], scales[rows] = int8.quantize_weight(dense)
    else:
        from twinweight.kernels import fp8

        if scales.dim() == 1:
            scales.copy_(fp8.row_twin(w, data)[1])
        else:
            scales.copy_(fp8.exact_twin(w.packed, w.scales, w.zeros, w.group_size, data)[1])


def linear(x: Tensor, data: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N] in the dtype of x, on a twin of any kind."""
    if scales is None:
        return dense_linear(x, data, bias)
    if data.dtype == torch.int8:
        return int8.linear(x, data, scales, bias)
    from twinweight.kernels import fp8

    return (fp8.row_linear if scales.dim() == 1 else fp8.exact_linear)(x, data, scales, bias)


def turned(data: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A GPU's twin as its products take it, [K, N]: views."""
    if scales is None:
        return data.t(), None
    from twinweight.kernels import fp8

    return fp8.turned(data, scales)


def again(x: Tensor, data: Tensor, scales: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """`linear` on a GPU's 8-bit twin, `turned`, without a bias, for other x of exactly this size, contiguous and aligned to 16
    bytes: it looks at nothing. None where that cannot be, or for this x.
    """
    if not x.is_contiguous() or x.data_ptr() % 16:
        return None
    from twinweight.kernels import fp8

    return fp8.row_again(x) if scales.dim() == 1 else fp8.exact_again(x)


def dequantize(data: Tensor, scales: Tensor | None) -> Tensor:
    """The weight [N, K] that a twin stands for, in fp32."""
    if scales is None:
        return data.float()
    wide = scales.unsqueeze(1) if scales.dim() == 1 else scales.repeat_interleave(GROUP, dim=1)
    return data.float() * wide
