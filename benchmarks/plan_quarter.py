"""Time saved with memory for a quarter of the twins: the planned quarter against the first weights in module order.

    python benchmarks/plan_quarter.py OUT.json [--repeats 9] [--tokens 1024] [--layers 4]

Two models of random weights, Llama-3.2-1B's shapes cut to a few layers, in the embedded engine on this machine's CPU. `shapes`:
all weights alike but for their shape. `shapes-and-kinds`: the MLP of every second layer in act-order, whose columns are
gathered in every call without a twin; checkpoints that mix config groups have it. Arms (no twin, planned, module order) run in
turn on one loaded model; what counts is the time of a prefill. `busy` is what other processes took of the machine meanwhile.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import twinweight
from twinweight import presets, synth
from twinweight.bench import environment
from twinweight.linear import Int4Linear
from twinweight.plan import Budget, Plan, plan
from twinweight.twins import TwinState, attach, build_twins, costs_of, int4_linears, shape_of, state_of, twins_in_use
from twinweight.workload import Workload


def to_act_order(model: Any) -> None:
    """Give the MLP weights of every second layer a random column order."""
    for name, linear in int4_linears(model).items():
        parts = name.split(".")
        if "mlp" in parts and int(parts[parts.index("layers") + 1]) % 2:
            weight = linear.int4_weight
            order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(0))
            weight = dataclasses.replace(weight, g_idx=(order // weight.group_size).to(torch.int32))
            model.get_submodule(name.rpartition(".")[0]).add_module(parts[-1], Int4Linear(weight))


def quarters(model: Any, tokens: int) -> tuple[Plan, dict[str, str]]:
    """The plan within a quarter of all twins' bytes, and what fits in module order: weight -> kind of its twin."""
    crossovers = state_of(model).crossovers
    shapes = {name: shape_of(linear) for name, linear in int4_linears(model).items()}
    costs = {shape: costs_of(shape, crossovers) for shape in dict.fromkeys(shapes.values())}
    work = Workload.prefill(tokens)
    every = plan(shapes, Budget(1 << 50, 1 << 50, 1.0), costs, work, "hard")
    room = every.twin_bytes // 4
    found = plan(shapes, Budget(room, room, 1.0), costs, work, "soft")
    first: dict[str, str] = {}
    for name, option in every.twins.items():
        if option.nbytes <= room:
            room -= option.nbytes
            first[name] = option.name
    attach(model, TwinState(every, crossovers))
    build_twins(model)
    return found, first


def prefill(model: Any, ids: torch.Tensor, use: set[str]) -> float:
    """Seconds of a prefill in which only the twins in `use` are used."""
    for name, linear in int4_linears(model).items():
        linear.use_twin = name in use
    started = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, logits_to_keep=1)
    return time.perf_counter() - started


def measure(model: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Both quarters of one model, and what they save."""
    found, first = quarters(model, tokens)
    arms = {"off": set(), "planned": set(found.twins), "module_order": set(first)}
    samples: dict[str, list[float]] = {arm: [] for arm in arms}
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    me, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    with twins_in_use(model, True):
        for repeat in range(repeats + 1):
            for arm, use in arms.items():
                seconds = prefill(model, ids, use)
                if repeat:
                    samples[arm].append(seconds)
    mine = sum(psutil.Process().cpu_times()[:2]) - sum(me[:2])
    now = psutil.cpu_times()
    total, idle = sum(now) - sum(machine), now.idle - machine.idle
    # Round by round, so that what slows a whole round down slows all its arms.
    saved = {
        arm: statistics.median(off - s for off, s in zip(samples["off"], samples[arm], strict=True)) * 1e3
        for arm in ("planned", "module_order")
    }
    linears = int4_linears(model)
    kinds = {arm: [n.removeprefix("model.layers.") for n in linears if n in use] for arm, use in arms.items()}
    times = {arm: {"median": statistics.median(s) * 1e3, "min": min(s) * 1e3} for arm, s in samples.items()}
    return {
        "ms": {arm: {k: round(v, 2) for k, v in t.items()} for arm, t in times.items()},
        "saved_ms": {arm: round(ms, 2) for arm, ms in saved.items()},
        "ratio": round(saved["planned"] / saved["module_order"], 4),
        "predicted_ratio": round(found.saved_us / sum(_saved(model, first, tokens)), 4),
        "twin_bytes": {"planned": found.twin_bytes, "module_order": sum(linears[n].twin.nbytes for n in first)},
        "twins": kinds, "busy": round(max(0.0, (total - idle - mine) / total), 4), "samples_ms":
        {arm: [round(v * 1e3, 2) for v in s] for arm, s in samples.items()},
    }  # fmt: skip


def _saved(model: Any, first: dict[str, str], tokens: int) -> list[float]:
    crossovers, work = state_of(model).crossovers, Workload.prefill(tokens)
    linears = int4_linears(model)
    return [
        next(o.saved_us for o in costs_of(shape_of(linears[name]), crossovers).options(work) if o.name == kind)
        for name, kind in first.items()
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--layers", type=int, default=4)
    a = p.parse_args()
    command = f"python benchmarks/plan_quarter.py OUT.json --repeats {a.repeats} --tokens {a.tokens}"
    result: dict[str, Any] = {"command": command, "models": {}}
    with tempfile.TemporaryDirectory() as tmp:
        synth.write(presets.preset("llama-3.2-1b", a.layers), Path(tmp) / "model")
        for name in ("shapes", "shapes-and-kinds"):
            model = twinweight.load(Path(tmp) / "model", mode="off", device="cpu", progress=False)
            if name == "shapes-and-kinds":
                to_act_order(model)
            found = result["models"][name] = measure(model, a.tokens, a.repeats)
            result["environment"] = environment(model)
            print(
                name, found["saved_ms"], "ratio", found["ratio"], "predicted", found["predicted_ratio"], "busy", found["busy"]
            )
            del model
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
