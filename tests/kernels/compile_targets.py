"""Compile every Triton kernel for GPUs that are not here, and print what the machine code holds, as JSON.

Run as a script without TRITON_INTERPRET: `python tests/kernels/compile_targets.py [--full] [TARGET ...]`. Each kernel is
compiled with the tiles that are chosen for the target: group 128 and round shapes with two of the four pairs of dtype and
symmetry, one of the ragged shapes with one; --full compiles all shapes with all four. One JSON object a line: target,
kernel, shape, dtype, symmetric, matrix (instructions), registers, spills (registers on AMD, bytes of stack on NVIDIA), load16
(16-byte loads), shared (bytes), seconds; with Hopper's products loop_addresses (integer instructions of their loop that unpack
nothing). On AMD also of the loop that holds the products (of the whole kernel where there is none): loop_vector (VALU
instructions), loop_matrix, and per_weight, loop_vector over the weights a lane would hold if none were held twice.
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

from twinweight.kernels import expand, forms, fused, recover, tiles

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), forms.DeviceTraits("nvidia", 32, 108, 166912, True, ptx=True, gluon=True)),
    "sm_90": (GPUTarget("cuda", 90, 32), forms.DeviceTraits("nvidia", 32, 132, 232448, True, ptx=True, wgmma=True, gluon=True)),
    "sm_100": (GPUTarget("cuda", 100, 32), forms.DeviceTraits("nvidia", 32, 148, 232448, True, ptx=True, gluon=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), forms.DeviceTraits("amd", 64, 304, 65536, False)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), forms.DeviceTraits("amd", 32, 96, 65536, False)),
    "gfx1151": (GPUTarget("hip", "gfx1151", 32), forms.DeviceTraits("amd", 32, 40, 65536, False)),
    "gfx1201": (GPUTarget("hip", "gfx1201", 32), forms.DeviceTraits("amd", 32, 64, 65536, False)),
}
N, WIDE = 4096, 28672
SHAPES = {"g128": (4096, 128), "g32-ragged": (4128, 32), "channel-ragged": (4099, 4099)}
"""K and group size. Ragged: K does not fill the tiles, no stride is a multiple of 16, K is split, columns are permuted."""
ALIGNED = {"N", "K", "W", "rows", "first_row", "stride_x", "stride_out"}
"""Integer arguments that a launch with round shapes specialises as multiples of 16."""

ADDRESSES = r"(?:@!?U?P\w+ )?(?:IADD3|IMAD|LEA|ISETP|SEL|VIADD|VIMNMX)\b"
"""Integer instructions of NVIDIA's that unpack nothing."""

Constants = dict[str, Any]


def variants(
    shape: str, dtype: str, symmetric: bool, traits: forms.DeviceTraits
) -> dict[str, tuple[Any, Constants, dict[str, int]]]:
    """kernel name -> (function, constants, compile options), as the launchers would have them."""
    (k, group_size), ragged = SHAPES[shape], shape.endswith("ragged")
    common: Constants = {
        "GROUP": 0 if group_size == k else group_size, "HAS_ZEROS": not symmetric, "NATIVE": traits.rounds_bf16,
        "PACKED": 2 if traits.ptx else int(dtype == "fp16"),
    }  # fmt: skip
    common |= {"zeros_ptr": None} if symmetric else {}
    made: dict[str, tuple[Any, Constants, dict[str, int]]] = {}

    hopper = [("fused-96", 96, N, tiles.fused_tiles), ("fused-wide", 512, WIDE, tiles.fused_tiles)]
    hopper += [("fused-half", 128, N, tiles.fused_tiles), ("fused-features", 128, WIDE, tiles.fused_tiles)]
    hopper += [("fused-plain", 512, N, tiles.plain_tiles)]
    gluon = [("int4-wide", 8, WIDE, tiles.decode_tiles), ("int4-plain", 1, N, tiles.plain_decode_tiles)]
    gluon += [("int4-32", 32, N, tiles.decode_tiles)]
    for name, m, n, choose in (
        ("int4", 1, N, tiles.decode_tiles),
        ("int4-16", 16, N, tiles.decode_tiles),
        ("fused", 512, N, tiles.fused_tiles),
        *(hopper if traits.wgmma and not ragged else []),
        *(gluon if traits.gluon and not ragged else []),
    ):
        t = choose(m, n, k, group_size, traits, not symmetric)
        if not isinstance(t, forms.DotTiles):
            options = {"num_warps": t.num_warps} | ({"maxnreg": t.registers} if t.registers else {})
        if isinstance(t, forms.HopperTiles):
            from twinweight.kernels.hopper import hopper_dot_kernel

            # Groups of 32 and K split: what no shape here that K of whole steps has would have.
            other = {"GROUP": 32, "SPLITS": True} if name == "fused-half" else {}
            made[name] = (hopper_dot_kernel, common | hopper_constants(t) | other, options)
            continue
        if isinstance(t, forms.HopperFewTiles):
            from twinweight.kernels.hopper_few import hopper_few_dot_kernel

            made[name] = (hopper_few_dot_kernel, common | hopper_few_constants(t), options)
            continue
        if isinstance(t, forms.AmpereTiles):
            from twinweight.kernels.ampere import ampere_dot_kernel

            made[name] = (ampere_dot_kernel, common | ampere_constants(t), options)
            continue
        made[name] = (
            fused._dot_kernel,
            common | dot_constants(t, common, traits, bias=not ragged, even=not ragged) | ({"SPLIT_K": 2} if ragged else {}),
            {"num_warps": t.num_warps, "num_stages": t.num_stages},
        )
    e = tiles.expand_tiles(N, k, group_size, traits)
    constants = {**common, "HAS_PERM": ragged, "EVEN": not ragged, "BLOCK_N": e.block_n, "BLOCK_W": e.block_words}
    made["expand"] = (expand._expand_kernel, constants | ({} if ragged else {"perm_ptr": None}), {"num_warps": e.num_warps})
    if not ragged:
        constants = {"GROUP": 128, "COLUMNS": 128, "ROWS": 16, "STEPS": 15, "NATIVE": traits.rounds_bf16}
        made["recover"] = (recover._read_back_kernel, constants, {"num_warps": 4})
    return made


def dot_constants(t: forms.DotTiles, common: Constants, traits: forms.DeviceTraits, *, bias: bool, even: bool) -> Constants:
    """The constants of `_dot_kernel` that follow from tiles, from the shape and from the GPU."""
    sums, settle = fused.kernel_flags(t, common["GROUP"], common["PACKED"], traits)
    return {
        "HAS_BIAS": bias, "EVEN_K": even, "EVEN_W": even, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_W": t.block_words,
        "SPLIT_K": t.split_k, "GROUP_N": t.group_n, "SCALE_SUMS": sums, "SETTLE": settle,
        **({} if bias else {"bias_ptr": None}),
    }  # fmt: skip


def hopper_constants(t: forms.HopperTiles) -> Constants:
    """The constants of `hopper_dot_kernel` that follow from tiles."""
    return {
        "HAS_BIAS": True, "BLOCK_M": t.block_m, "MORE_M": t.more_m, "BLOCK_N": t.block_n,
        "SPLITS": t.split_k > 1, "GROUP_N": t.group_n,
    }  # fmt: skip


def ampere_constants(t: forms.AmpereTiles) -> Constants:
    """The constants of `ampere_dot_kernel` that follow from tiles."""
    return {
        "HAS_BIAS": True, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_W": t.block_words, "DEPTH": t.depth,
        "SPLITS": t.split_k > 1,
    }  # fmt: skip


def hopper_few_constants(t: forms.HopperFewTiles) -> Constants:
    """The constants of `hopper_few_dot_kernel` that follow from tiles."""
    return {"HAS_BIAS": True, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "DEPTH": t.depth, "SPLITS": t.split_k > 1}


def compile_one(
    kernel: Any, constants: Constants, options: dict[str, int], dtype: str, target: GPUTarget, aligned: bool
) -> Any:
    pointers = {"packed_ptr": "*i32", "zeros_ptr": "*i16", "parts_ptr": "*fp32", "counters_ptr": "*i32", "perm_ptr": "*i64",
                "likely_ptr": "*fp32", "steps_ptr": "*i8", "found_ptr": "*i8"}  # fmt: skip
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in constants else pointers.get(name, f"*{dtype}" if pointer else "i32")
        if name not in constants and (pointer or (aligned and name in ALIGNED)):
            attributes[(at,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return triton.compile(source(kernel, signature, constants, attributes), target=target, options=options)


def _amd(code: str) -> dict[str, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found.group(1)) if found else -1

    matrix = len(re.findall(r"^\s+v_(?:wmma|mfma)", code, re.M))
    loop = _loop(code.splitlines())
    in_loop = sum(bool(re.match(r"\s+v_(?:wmma|mfma)", line)) for line in loop)
    return {
        "matrix": matrix,
        "wmma": len(re.findall(r"^\s+v_wmma", code, re.M)),
        "mfma": len(re.findall(r"^\s+v_mfma", code, re.M)),
        "loop_matrix": in_loop,
        "loop_vector": sum(bool(re.match(r"\s+v_", line)) for line in loop) - in_loop,
        "load16": len(re.findall(r"^\s+(?:global|buffer)_load_b?(?:dwordx4|128)", code, re.M)),
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
    }


def _loop(lines: list[str]) -> list[str]:
    """The shortest loop with the most matrix instructions; all lines where there is none."""
    labels = {found.group(1): at for at, line in enumerate(lines) if (found := re.match(r"(\.LBB\d+_\d+):", line))}
    best, most = lines, 0
    for at, line in enumerate(lines):
        jump = re.match(r"\s+s_c?branch\S*\s+(\.LBB\d+_\d+)", line)
        if jump and labels.get(jump.group(1), at) < at:
            body = lines[labels[jump.group(1)] : at + 1]
            matrix = sum("v_wmma" in x or "v_mfma" in x for x in body)
            if (matrix, -len(body)) > (most, -len(best)):
                best, most = body, matrix
    return best


def _nvidia(ptx: str, cubin: bytes) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(*command: str) -> str:
            return subprocess.run(
                [tools / command[0], *command[1:], file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = output("cuobjdump", "-res-usage")
        sass = output("nvdisasm", "-c") if "wgmma.mma_async" in ptx else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "matrix": len(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "loose": _copies_after(r"wgmma\.wait_group", ptx),  # products of other warps may still read what is overwritten
        "racing": _copies_after(r"\bld\.shared|\bldmatrix", ptx),
        "running": len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx)),
        "loop_spills": sum(bool(re.search(r"\b(?:STL|LDL)\b", line)) for line in _product_loop(sass)[0]),
        "loop_addresses": sum(bool(re.match(ADDRESSES, line)) for line in _product_loop(sass)[0]),
        "unsettled": unsettled(sass),
        "serialized": serialized(ptx, sass),
        "load16": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", ptx)),
        "trap": len(re.findall(r"^\s+trap;", ptx, re.M)),
        "registers": int(registers),
        "spills": int(stack),
    }


def _copies_after(event: str, ptx: str) -> int:
    """Copies into shared memory after an event and before a barrier: other warps may not be as far."""
    found, happened = 0, False
    for line in ptx.splitlines():
        if re.search(r"\b(?:bar|barrier)(?:\.cta)?\.sync", line):
            happened = False
        elif re.search(event, line):
            happened = True
        elif happened and re.search(r"cp\.async\.c[ag]", line):
            found += 1
    return found


def _product_loop(sass: str) -> tuple[list[str], list[str]]:
    """The instructions of the loop that holds Hopper's products, and those after it; nothing where there are no products."""
    lines = [re.sub(r"^.*\*/\s+", "", line).strip() for line in sass.splitlines()]
    products = [at for at, line in enumerate(lines) if "HGMMA" in line]
    if not products:
        return [], []
    label = max(at for at in range(products[0]) if re.match(r"\.L_x_\d+:", lines[at]))
    name = lines[label].rstrip(":")
    jump = next(at for at in range(products[-1], len(lines)) if "BRA" in lines[at] and f"`({name})" in lines[at])
    return lines[label : jump + 1], lines[jump + 1 :]


def serialized(ptx: str, sass: str) -> int:
    """Waits for all products that ptxas added: it does where it cannot tell what else writes their sums (C7510 to C7519)."""
    asked = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+0", ptx)
    return len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass)) - len(asked)


def unsettled(sass: str) -> int:
    """Instructions that read sums of products, or write what products read from registers, while those may be in flight.

    The loop is walked twice, so that its end is seen to be followed by its start.
    """
    loop, after = _product_loop(sass)
    found, running, current = 0, [], (set(), set())  # of each group in flight: (registers read, sums)
    for line in loop * 2 + after:
        if product := re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+), R(\d+)", line):
            size, sums, left = map(int, product.groups())
            current[0].update(range(left, left + 4))
            current[1].update(range(sums, sums + size // 2))
            if "gsb0" in line:
                running.append(current)
                current = (set(), set())
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line):
            running = running[len(running) - int(wait.group(1)) :] if int(wait.group(1)) else []
        else:
            operands = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
            touched = [int(r) for r in re.findall(r"\bR(\d+)\b", operands[2])]
            written = set()
            if touched and re.match(r"(?:U?P\d,\s*|PT,\s*)*R\d", operands[2]):  # the first operand is a register: written
                wide = 4 if re.search(r"\.128|M88\.4", operands[0]) else 2 if re.search(r"\.64|WIDE|CS2R", operands[0]) else 1
                written = set(range(touched[0], touched[0] + wide))
            found += any(written & read or set(touched) & sums for read, sums in [*running, current])
    return found


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
                    if amd is not None and "BLOCK_W" in constants:
                        tile = constants["BLOCK_N"] * constants["BLOCK_W"] * 8
                        lanes = target.warp_size * options["num_warps"]
                        row["per_weight"] = round(facts["loop_vector"] * lanes / tile, 2)
                    row |= {"shared": compiled.metadata.shared, "seconds": round(time.perf_counter() - start, 2)}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
