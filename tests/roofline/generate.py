"""Traces in the layout that torch.profiler writes, for CUDA and for ROCm, made up so that every figure in them is known.

`python -m tests.roofline.generate FILE MEGABYTES` writes a large one, to time the reader with.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BF16, INT = "c10::BFloat16", "int"
Event = dict[str, Any]

MACHETE = (
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<machete::MacheteCollectiveMma<cute::tuple<...> > > >(int)"
)
NVJET = "nvjet_sm90_tst_192x128_64x5_1x2_h_bz_coopB_TNT"
FLASH = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...> > >(int)"
NORM = "triton_red_fused_fused_add_rms_norm_2"
TENSILE = "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT128x128x32_MI16x16x1"
SKINNY = "void wvSplitK_int4_g_hf_sml_<__hip_bfloat16, 64, 2, 16, 8, 1, 4, 128>(int, int, int)"


@dataclass
class Recorder:
    """Builds a trace event by event. Times in microseconds; the CPU runs `lead` microseconds ahead of the device."""

    rocm: bool = False
    shapes: bool = True
    lead: float = 1000.0
    cpu: float = 1000.0
    device: float = 0.0
    correlation: int = 100
    external: int = 0
    events: list[Event] = field(default_factory=list)

    def op(self, name: str, dims: list[Any], types: list[str], values: list[str] | None = None, dur: float = 20.0) -> Event:
        """An op around what is recorded before the next `end`."""
        self.external += 1
        args: dict[str, Any] = {"External id": self.external, "Record function id": 0, "Ev Idx": self.external}
        if self.shapes:
            args |= {"Input Dims": dims, "Input type": types, "Concrete Inputs": values or [""] * len(dims)}
        event = {"ph": "X", "cat": "cpu_op", "name": name, "pid": 7, "tid": 7, "ts": self.cpu, "dur": dur, "args": args}
        self.events.append(event)
        self.cpu += 1.0
        return event

    def end(self, *events: Event) -> None:
        """Ends ops or labels, the innermost first."""
        for event in events:
            self.cpu += 1.0
            event["dur"] = round(self.cpu - event["ts"], 3)
        self.cpu += 1.0

    def label(self, name: str) -> Event:
        event = {"ph": "X", "cat": "user_annotation", "name": name, "pid": 7, "tid": 7, "ts": self.cpu, "dur": 1.0, "args": {}}
        self.events.append(event)
        self.cpu += 1.0
        return event

    def kernel(self, name: str, dur: float, grid: list[int] | None = None, launch: str | None = "") -> None:
        """A kernel with its launch; launch None: one that the trace has no launch of."""
        if launch is not None:
            self._launch(launch or ("hipExtModuleLaunchKernel" if self.rocm else "cudaLaunchKernel"))
        self._kernel(name, dur, grid or [132, 1, 1], self.correlation if launch is not None else 0)

    def graph(self, *kernels: tuple[str, float]) -> None:
        """One replay of a graph of kernels (name, time)."""
        self._launch("hipGraphLaunch" if self.rocm else "cudaGraphLaunch")
        for name, dur in kernels:
            self._kernel(name, dur, [132, 1, 1], self.correlation)

    def _launch(self, name: str) -> None:
        self.correlation += 1
        args = {"External id": self.external, "cbid": 211, "correlation": self.correlation}
        category = "cuda_driver" if name.startswith("cu") and not name.startswith("cuda") else "cuda_runtime"
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": 7, "ts": self.cpu, "dur": 3.0, "args": args}
        )
        flow = {"id": self.correlation, "pid": 7, "tid": 7, "ts": self.cpu, "cat": "ac2g", "name": "ac2g"}
        self.events.append({"ph": "s"} | flow)
        self.cpu += 4.0

    def _kernel(self, name: str, dur: float, grid: list[int], correlation: int) -> None:
        start = max(self.device, self.cpu + self.lead)
        self.device = start + dur + 0.5
        args: dict[str, Any] = {"device": 0, "stream": 7, "correlation": correlation, "grid": grid, "block": [128, 1, 1]}
        args |= {"kind": "Dispatch Kernel"} if self.rocm else {"queued": 0, "context": 1, "registers per thread": 168}
        self.events.append(
            {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": start, "dur": dur, "args": args}
        )

    def write(self, path: Path) -> Path:
        device = "AMD Radeon 8060S Graphics" if self.rocm else "NVIDIA H200"
        data = {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": device}],
            "traceEvents": self.events,
            "traceName": "x",
        }
        text = json.dumps(data)
        if path.name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            path.write_text(text)
        return path


def linear(r: Recorder, m: int, n: int, k: int, dur: float, *, path: str) -> None:
    """One linear as vLLM runs it: "machete" or "skinny" (int4), or "dense", the twin in our op."""
    if path == "dense":
        outer = r.op("twinweight::vllm_linear", [[m, k], [1], [], []], [BF16, "long int", "", "Scalar"], ["", "", "", str(n)])
        label = r.label(f"twinweight::twin {m}x{n}x{k}")
        first = r.op("aten::linear", [[m, k], [n, k], []], [BF16, BF16, ""])
        second = r.op("aten::mm", [[m, k], [k, n]], [BF16, BF16])
        r.kernel(TENSILE if r.rocm else NVJET, dur)
        r.end(second, first, label, outer)
    elif path == "machete":
        op = r.op("_C::machete_mm", [[m, k], [k // 8, n], [], [], [k // 128, n]], [BF16, INT, "Scalar", "", BF16])
        r.kernel(MACHETE, dur)
        r.end(op)
    else:
        op = r.op("_rocm_C::wvSplitK_int4_g", [[n, k // 8], [m, k], [n, k // 128]], [INT, BF16, BF16])
        r.kernel(SKINNY, dur, launch="hipLaunchKernel")
        r.end(op)


def large(path: Path, megabytes: float) -> Path:
    """A trace of at least that size, step after step of 32 layers; nothing of it is kept in memory."""
    written, limit = 0, int(megabytes * 1e6)
    with path.open("w") as out:
        out.write('{"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}], "traceEvents": [\n')
        r = Recorder()
        for number, chunk in enumerate(_steps(r)):
            text = ",\n".join(json.dumps(e, indent=2) for e in chunk)
            written += out.write((",\n" if number else "") + text)
            if written > limit:
                break
        out.write('], "traceName": "large"}\n')
    return path


def _steps(r: Recorder) -> Iterator[list[Event]]:
    while True:
        label = r.label("execute_context_0(0)_generation_1(1)")
        for _ in range(32):
            for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
                linear(r, 1, n, k, 10.0, path="machete")
                r.end(r.op("aten::view", [[1, n], []], [BF16, "ScalarList"], ["", "[-1, 64, 128]"]))
                linear(r, 1, n, k, 12.0, path="dense")
        r.end(label)
        yield r.events
        r.events = []


if __name__ == "__main__":
    large(Path(sys.argv[1]), float(sys.argv[2]))
