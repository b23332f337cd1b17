"""`python -m tests.roofline.strip TRACE OUT`: a trace with only what the reader uses, from time 0, for tests/data."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

_ARGS = ("External id", "Input Dims", "Input type", "Concrete Inputs", "correlation", "grid", "block", "bytes")
_CATEGORIES = ("cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver")


def strip(trace: Path, out: Path) -> None:
    content = trace.read_bytes()
    data = json.loads(gzip.decompress(content) if trace.name.endswith(".gz") else content)
    kept = [e for e in data["traceEvents"] if e.get("ph") == "X" and e.get("cat") in _CATEGORIES]
    used = {e["args"]["correlation"] for e in kept if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")}
    kept = [e for e in kept if e["cat"] not in ("cuda_runtime", "cuda_driver") or e["args"]["correlation"] in used]
    first = min(e["ts"] for e in kept)
    cpu = next((e["pid"], e["tid"]) for e in kept if e["cat"] == "cpu_op")
    events = [_event(e, first, cpu) for e in kept]
    devices = [{"id": d["id"], "name": d["name"]} for d in data.get("deviceProperties", [])]
    text = json.dumps({"schemaVersion": 1, "deviceProperties": devices, "traceEvents": events}, separators=(",", ":"))
    out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _event(event: dict[str, Any], first: float, cpu: tuple[int, int]) -> dict[str, Any]:
    kept = {k: event[k] for k in ("ph", "cat", "name", "pid", "tid", "ts", "dur")}
    kept["ts"] = round(kept["ts"] - first, 3)
    if (event["pid"], event["tid"]) == cpu:
        kept["pid"] = kept["tid"] = 1
    args = {k: v for k, v in event.get("args", {}).items() if k in _ARGS}
    return kept | {"args": args}


if __name__ == "__main__":
    strip(Path(sys.argv[1]), Path(sys.argv[2]))
