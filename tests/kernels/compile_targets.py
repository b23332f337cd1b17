"""Compile every Triton kernel for GPUs that are not here, and print what the machine code holds, as JSON.

Run as a script without TRITON_INTERPRET: `python tests/kernels/compile_targets.py [--full] [TARGET ...]`. Each kernel is
compiled with the tiles that are chosen for the target: group 128 and round shapes with two of the four pairs of dtype and
symmetry, one of the ragged shapes with one; --full compiles all shapes with all four. One JSON object a line: target,
kernel, shape, dtype, symmetric, matrix (instructions), vector (AMD's VALU instructions in the whole kernel), registers,
spills (registers on AMD, bytes of stack on NVIDIA), load16 (16-byte loads), shared (bytes), seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twinweight.kernels import decode, expand, fused, parts, tiles

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), tiles.DeviceTraits("nvidia", 32, 108, 166912, True)),
    "sm_90": (GPUTarget("cuda", 90, 32), tiles.DeviceTraits("nvidia", 32, 132, 232448, True)),
    "sm_100": (GPUTarget("cuda", 100, 32), tiles.DeviceTraits("nvidia", 32, 148, 232448, True, tensor_memory=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), tiles.DeviceTraits("amd", 64, 304, 65536, False)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), tiles.DeviceTraits("amd", 32, 96, 65536, False)),
    "gfx1151": (GPUTarget("hip", "gfx1151", 32), tiles.DeviceTraits("amd", 32, 40, 65536, False)),
    "gfx1201": (GPUTarget("hip", "gfx1201", 32), tiles.DeviceTraits("amd", 32, 64, 65536, False)),
}
N = 4096
SHAPES = {"g128": (4096, 128), "g32-ragged": (4128, 32), "channel-ragged": (4099, 4099)}
"""K and group size. Ragged: K does not fill the tiles, no stride is a multiple of 16, K is split, columns are permuted."""
ALIGNED = {"W", "K", "stride_x", "stride_out", "stride_split", "stride_sorted"}
"""Integer arguments that a launch with round shapes specialises as multiples of 16."""

Constants = dict[str, Any]


def variants(
    shape: str, dtype: str, symmetric: bool, traits: tiles.DeviceTraits
) -> dict[str, tuple[Any, Constants, dict[str, int]]]:
    """kernel name -> (function, constants, compile options), as the launchers would have them."""
    (k, group_size), ragged = SHAPES[shape], shape.endswith("ragged")
    words = 0 if group_size == k else group_size // 8
    common: Constants = {"HAS_ZEROS": not symmetric, "GROUP_WORDS": words, "NATIVE": traits.rounds_bf16}
    common |= {"zeros_ptr": None} if symmetric else {}
    linear = {**common, "HAS_BIAS": not ragged, "EVEN_W": not ragged} | ({"bias_ptr": None} if ragged else {})
    made: dict[str, tuple[Any, Constants, dict[str, int]]] = {}

    for name, m, choose in (
        ("gemv", 1, tiles.decode_tiles),
        ("dot", 16, tiles.decode_tiles),
        ("fused", 512, tiles.fused_tiles),
    ):
        t = choose(m, N, k, group_size, traits)
        options = {"num_warps": t.num_warps, "num_stages": t.num_stages}
        block = {"BLOCK_N": t.block_n, "BLOCK_W": t.block_words, "SPLIT_K": 2 if ragged else 1}
        if isinstance(t, tiles.GemvTiles):
            made[name] = (decode._gemv_kernel, {**linear, **block, "STAGES": t.num_stages}, options)
        else:
            dot = {"BLOCK_M": t.block_m, "GROUP_N": t.group_n, "SORTED_X": t.sort_x}
            made[name] = (fused._dot_kernel, {**linear, **block, **dot}, options)
    e = tiles.expand_tiles(N, k, group_size, traits)
    constants = {**common, "HAS_PERM": ragged, "WHOLE_WORDS": not ragged, "BLOCK_N": e.block_n, "BLOCK_W": e.block_words}
    made["expand"] = (expand._expand_kernel, constants | ({} if ragged else {"perm_ptr": None}), {"num_warps": e.num_warps})
    if symmetric and not ragged:  # the last two do not see the weight
        made["sort"] = (fused._sort_kernel, {"BLOCK_M": 16, "BLOCK_W": 16}, {"num_warps": 4})
        constants = {"HAS_BIAS": True, "SPLIT_K": 4, "BLOCK": 512, "NATIVE": traits.rounds_bf16}
        made["sum"] = (parts._sum_kernel, constants, {"num_warps": 4})
    return made


def compile_one(
    kernel: Any, constants: Constants, options: dict[str, int], dtype: str, target: GPUTarget, aligned: bool
) -> Any:
    pointers = {"packed_ptr": "*i32", "zeros_ptr": "*u8", "parts_ptr": "*fp32", "perm_ptr": "*i64"}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in constants else pointers.get(name, f"*{dtype}" if pointer else "i32")
        if name not in constants and (pointer or (aligned and name in ALIGNED)):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def _amd(code: str) -> dict[str, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found.group(1)) if found else -1

    matrix = len(re.findall(r"^\s+v_(?:wmma|mfma)", code, re.M))
    return {
        "matrix": matrix,
        "wmma": len(re.findall(r"^\s+v_wmma", code, re.M)),
        "mfma": len(re.findall(r"^\s+v_mfma", code, re.M)),
        "vector": len(re.findall(r"^\s+v_", code, re.M)) - matrix,
        "load16": len(re.findall(r"^\s+(?:global|buffer)_load_b?(?:dwordx4|128)", code, re.M)),
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
    }


def _nvidia(ptx: str, cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "matrix": len(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "load16": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", ptx)),
        "trap": len(re.findall(r"^\s+trap;", ptx, re.M)),
        "registers": int(registers),
        "spills": int(stack),
    }


def main(arguments: list[str]) -> None:
    full = "--full" in arguments
    wanted = [a for a in arguments if a != "--full"] or list(TARGETS)
    pairs = [("bf16", True), ("fp16", False), ("bf16", False), ("fp16", True)]
    for name in wanted:
        target, traits = TARGETS[name]
        turn = list(TARGETS).index(name)
        for at, shape in enumerate(SHAPES):
            if not full and at == 1 + turn % 2:
                continue
            first = 2 * (turn % 2) if shape == "g128" else (turn + at) % 4
            for dtype, symmetric in pairs if full else pairs[first : first + (2 if shape == "g128" else 1)]:
                for kernel, (function, constants, options) in variants(shape, dtype, symmetric, traits).items():
                    start = time.perf_counter()
                    compiled = compile_one(function, constants, options, dtype, target, not shape.endswith("ragged"))
                    amd = compiled.asm.get("amdgcn")
                    facts = _amd(amd) if amd is not None else _nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
                    row = {"target": name, "kernel": kernel, "shape": shape, "dtype": dtype, "symmetric": symmetric, **facts}
                    row |= {"shared": compiled.metadata.shared, "seconds": round(time.perf_counter() - start, 2)}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
