"""Compile a few kernels for an H200 that is not here, in other processes, and say what this one found of them.

Run as a script without TRITON_INTERPRET: `python tests/kernels/compile_ahead.py`, with TRITON_CACHE_DIR an empty directory. One
JSON object: jobs, again (jobs of the same calls afterwards), compiled (kernels on disk), rewritten (those of them that this
process compiled anew), failed (kernels on disk after a job that fails, beyond those).
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.runtime.driver import driver

from tests.kernels.compile_targets import TARGETS
from twinweight.kernels import compilers, fused, gpu, int4_path
from twinweight.kernels.launch import only_compiling
from twinweight.paths import Path as Way

META = torch.device("meta")


def kernels() -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}


def main() -> None:
    target, traits = TARGETS["sm_90"]
    driver.set_active(compilers._Target(target.backend, target.arch, target.warp_size))  # type: ignore[arg-type]
    fused.traits_of = lambda device: traits  # type: ignore[assignment]
    weight = gpu.empty(4096, 4096, 128, torch.bfloat16, META, symmetric=True)

    def call(way: Way, m: int) -> Any:
        return partial(int4_path, way, torch.empty(m, 4096, dtype=torch.bfloat16, device=META), weight, None)

    calls = [call(Way.INT4, 1), call(Way.FUSED, 128), call(Way.FUSED, 100), call(Way.FUSED, 4096)]
    calls += gpu.launches(4096, 4096, 128, torch.bfloat16, {Way.FUSED: [128]}, symmetric=True, bias=True)
    ahead = compilers.Compilers()
    found: dict[str, Any] = {"jobs": len(compilers.launched(calls))}
    ahead.add(calls[:2])
    ahead.add(calls)
    ahead.finish()
    before = kernels()
    with only_compiling():
        for one in calls:
            one()
    found |= {"compiled": len(before), "rewritten": len(set(kernels().items()) - set(before.items()))}
    found["again"] = len(compilers.launched(calls))

    broken = compilers.Job("twinweight.kernels.hopper", "hopper_dot_kernel", "{}", ("cuda", 90, 32))
    ahead._send([broken])
    ahead.finish()
    found["failed"] = len(kernels()) - len(before)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
