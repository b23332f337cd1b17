"""Measure the tables of the README on this machine's CPU: int4 only, with twins, and dense weights for every call.

    python benchmarks/cpu.py OUT [--repeats 5]

Writes OUT/<model>.json for a synthetic Qwen3-0.6B and for the 8B shape cut to 2 layers, 1024 tokens in and 32 out. The dense
arm is plain bf16 or fp32 serving (whichever twin the machine runs faster): prefill and decode both on the dense weights.
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
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name, (preset, layers) in MODELS.items():
        with tempfile.TemporaryDirectory() as tmp:
            synth.write(presets.preset(preset, layers), Path(tmp) / "model")
            model = twinweight.load(Path(tmp) / "model", mode="soft", device="cpu")
            result = bench(model, Workload(1024, 32), repeats=a.repeats, dense=True)
        result["command"] = f"python benchmarks/cpu.py OUT --repeats {a.repeats}"
        (a.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        arms = {arm: (f["ttft_ms"]["median"], f["tpot_ms"]["median"]) for arm, f in result["arms"].items()}
        print(name, "TTFT and TPOT in ms:", arms)


if __name__ == "__main__":
    main()
