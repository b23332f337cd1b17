"""The plots of the README, from committed results: `python benchmarks/readme_plots.py [DIRECTORY]` (default: docs/images)."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from twinweight.plots import bench, canvas, tune

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
_N, _K = 28672, 4096
# What Twinweight runs, by the names it has in plots, and the kernels of others beside it.
_OURS = {"int4": "int4", "fused": "fused", "stream": "stream", "twin": "twin:bfloat16", "fp8-row": "twin:fp8-row"}
_PEERS = ("marlin", "machete", "humming")
# `server` of llama-3.1-8b, off and on, each pair on one H200. Over Marlin on is with "reload": false.
_SERVERS = {"Marlin": ("10-0-3", "10-0-4"), "Machete": ("18-0-1", "18-0-2")}


def paths(directory: Path) -> Path:
    """Time of one weight by path against rows, on an H200."""
    found = _read("h200-paths.json")
    records = [r for r in found["records"] if r["dtype"] == "bfloat16" and r["symmetric"]]
    return _save([path_panel(records, _N, _K, "MLP of Llama-3.1-8B", found["environment"]["gpu"])], directory / "paths.svg")


def path_panel(records: Sequence[dict[str, Any]], n: int, k: int, what: str, gpu: str) -> canvas.Panel:
    """Time against rows by path, of the records of one shape."""
    times: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for r in records:
        if (r["n"], r["k"]) == (n, k) and r["m"] and r["path"] in (*_OURS, *_PEERS):
            times[_OURS.get(r["path"], r["path"])].append((r["m"], r["time_us"]))
    ranked = {name: sorted(times[name]) for name in (*_OURS.values(), *_PEERS) if name in times}
    return canvas.Panel(f"{n} x {k} ({what}) on one {gpu.split()[1]}", "", partial(tune.draw_times, ranked), 3.7)


def vllm(directory: Path) -> Path:
    """TTFT and TPOT through vLLM, off and on, over either int4 kernel: medians, least and most of each point.

    Points of one sample are left out: first tokens of a batch may come with their chunk or only with the next.
    """
    records = _read("h200-vllm.json")["records"]
    panels: list[canvas.Panel] = []
    for key, name in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
        for kernel, servers in _SERVERS.items():
            found = [r for r in records if r.get("server") in servers and len(set(r[f"{key}_range"])) > 1]
            groups = bench.groups_of(found, key)
            panels.append(canvas.Panel(f"{name}, int4 by {kernel}", "", partial(bench.draw, groups), bench.height(groups)))
    return _save(panels, directory / "vllm.svg", "Llama-3.1-8B through vLLM on H200s, Twinweight off and on")


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _save(panels: list[canvas.Panel], file: Path, title: str | None = None) -> Path:
    canvas.save(panels, file, title)
    return file


if __name__ == "__main__":
    for make in (paths, vllm):
        print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images"))
