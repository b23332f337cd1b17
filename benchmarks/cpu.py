"""Measure the tables of the README on this machine's CPU: int4 only, with twins, and dense weights for every call.

    python benchmarks/cpu.py OUT [--repeats 5] [--twin-dtype int8]

Writes OUT/<model>.json for a synthetic Qwen3-0.6B and for the 8B shape cut to 2 layers, 1024 tokens in and 32 out; with int8
twins OUT/<model>-int8.json. The dense arm, which goes with dense twins only, is plain bf16 or fp32 serving (whichever twin the
machine runs faster): prefill and decode both on the dense weights.
"""

import argparse
import json
import tempfile
from pathlib import Path

import twinweight
from twinweight import presets, synth
from twinweight.bench import Workload, bench

MODELS = {"qwen3-0.6b": ("qwen3-0.6b", None), "llama-3.1-8b-2-layers": ("llama-3.1-8b", 2)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--twin-dtype", default="dense")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name, (preset, layers) in MODELS.items():
        with tempfile.TemporaryDirectory() as tmp:
            synth.write(presets.preset(preset, layers), Path(tmp) / "model")
            model = twinweight.load(Path(tmp) / "model", mode="soft", device="cpu", twin_dtype=a.twin_dtype)
            result = bench(model, Workload(1024, 32), repeats=a.repeats, dense=a.twin_dtype == "dense")
        more = "" if a.twin_dtype == "dense" else f"-{a.twin_dtype}"
        result["command"] = f"python benchmarks/cpu.py OUT --repeats {a.repeats}" + (
            f" --twin-dtype {a.twin_dtype}" if more else ""
        )
        (a.out / f"{name}{more}.json").write_text(json.dumps(result, indent=1) + "\n")
        arms = {arm: (f["ttft_ms"]["median"], f["tpot_ms"]["median"]) for arm, f in result["arms"].items()}
        print(name, "TTFT and TPOT in ms:", arms)


if __name__ == "__main__":
    main()
