"""The life of a vLLM server with twins on a GPU, under torch.compile and CUDA graphs: sleep, wake, reload, own int4 copies.

    python benchmarks/vllm_gpu_life.py OUT.json [--model models/stdlib-15m] [--only records|own]

Serves the trained model without anything, with twins, and with own int4 copies that serve all, through the same stages and
compares greedy tokens (up to the first near-tie) and, bit for bit, each twin and copy with what the inner kernel computes. A
further server, with copies and "reload": false, frees the inner kernel's weights, so that it has no stage but its start and
nothing to compare copies with. Then serves Llama-3.1-8B's shapes on Marlin with memory for a third of the twins, where the plan
takes own int4 copies. Writes {"environment", "records": [{"server", "stage", "same_tokens", "compared_tokens", "twins",
"copies", "freed", "exact", "moved", "calls"}], "own": {...}}, where server is twins, copies or freed, and freed is in bytes.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLEAR = 0.25  # a lead that no rounding of bf16 turns
TOKENS = 16
CROSSOVER = 16


def served(job: dict[str, Any]) -> dict[str, Any]:
    """Run one server through its stages: {"stages": {name: {"ids", "leads", "report", "copies"}}}."""
    import vllm

    if job.get("copies"):
        _let_copies_win()
    llm = vllm.LLM(seed=0, enable_prefix_caching=False, skip_tokenizer_init=True, **job["llm"])
    on, lives = "additional_config" in job["llm"], job["llm"]["enable_sleep_mode"]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=2)
    found: dict[str, Any] = {}

    def look(stage: str) -> None:
        outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling, use_tqdm=False)
        found[stage] = {
            "ids": [list(o.outputs[0].token_ids) for o in outputs],
            "leads": [[_lead(top) for top in o.outputs[0].logprobs] for o in outputs],
            "report": json.loads(llm.collective_rpc("twinweight_report", kwargs={"check": lives})[0]) if on else None,
            "copies": llm.collective_rpc(_copies)[0] if on and lives else {},
        }

    look("start")
    if not lives:
        return {"stages": found}
    llm.sleep(level=1)
    llm.wake_up()
    look("sleep 1 and wake")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": job["other"]})
    look("reload other weights")
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": job["llm"]["model"]})
    llm.wake_up(tags=["kv_cache"])
    look("sleep 2, wake, reload")
    llm.collective_rpc(_rescale)
    look("kernel-format update")
    return {"stages": found}


def _let_copies_win() -> None:
    """Times, for every kind of layer, by which the plan takes own copies, and each of their paths serves some rows."""
    from twinweight.engines.vllm import measure
    from twinweight.measured import Measured
    from twinweight.timing import Timing

    rows = (1, 8, 32, 256)
    us = {"int4": (9, 9, 90, 900), "own": (1, 1, 60, 600), "fused": (5, 5, 9, 300), "stream": (50, 50, 50, 50)}
    times = {name: tuple(Timing(t / 1e6, t / 1e6, t / 1e6) for t in row) for name, row in us.items()}
    times["twin:bfloat16"] = times["stream"]
    measure.measure = lambda layers, *args: [Measured(rows, times, same[0].n) for same in layers]


def _rescale(worker: Any) -> None:
    """New scales in the kernel's own format, written past the checkpoint loader."""
    model = worker.model_runner.get_model()
    scales = [(name, p.data * 0.75) for name, p in model.named_parameters() if name.endswith("weight_scale")]
    worker.reload_weights(weights_iterator=iter(scales), is_checkpoint_format=False)


def _lead(top: dict[int, Any]) -> float:
    best = sorted((t.logprob for t in top.values()), reverse=True)
    return float(best[0] - best[1])


def squeezed(job: dict[str, Any]) -> dict[str, Any]:
    """Serve with a KV floor that leaves room for a third of the twins, and check every own copy: {"budget", "report", ...}."""
    import torch
    import vllm

    from twinweight.engines.vllm.arm import fill_integers

    fill_integers()
    llm = vllm.LLM(seed=0, enable_prefix_caching=False, skip_tokenizer_init=True, **job["llm"])
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    ids = torch.randint(0, vocabulary // 2, (2, 4096), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in ids], sampling, use_tqdm=False)
    return dict(llm.collective_rpc(_own_copies)[0])


def _copies(worker: Any) -> dict[str, Any]:
    """Own copies by name: where they are, and whether they are exactly what the inner kernel computes."""
    import torch

    from twinweight.engines.vllm import identity
    from twinweight.kernels import backend_for

    found = {}
    for name, kernel in worker.twinweight_report.__self__.kernels.items():
        if kernel.own is not None:
            expanded = torch.empty(kernel.n, kernel.k, dtype=kernel.dtype, device=kernel.device)
            backend_for(kernel.device).expand_rows(kernel.own, 0, kernel.n, expanded)
            exact = bool(torch.equal(expanded, identity.dense(kernel)))
            found[name] = {"address": kernel.own.packed.data_ptr(), "exact": exact}
    return found


def _own_copies(worker: Any) -> dict[str, Any]:
    life, copies = worker.twinweight_report.__self__, _copies(worker)
    return {
        "for_twins": life.plan.budget.for_twins, "all_twins": sum(k.n * k.k * 2 for k in life.kernels.values()),
        "floor_tokens": life.floor.tokens, "floor_bytes": life.floor.nbytes, "weights": len(life.kernels),
        "forms": {name: built.form for name, built in life.built.items()}, "own_copies": len(copies),
        "exact": all(c["exact"] for c in copies.values()),
        "seconds": life.seconds, **{k: v for k, v in json.loads(life.report()).items() if k in ("calls", "routes")},
    }  # fmt: skip


def alone(job: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own, whose memory is free afterwards."""
    with tempfile.TemporaryDirectory() as tmp:
        given, found = Path(tmp) / "job.json", Path(tmp) / "found.json"
        given.write_text(json.dumps(job))
        subprocess.run([sys.executable, __file__, "--job", str(given), str(found)], check=True)
        return dict(json.loads(found.read_text()))


def compare(server: str, off: dict[str, Any], on: dict[str, Any]) -> list[dict[str, Any]]:
    """A record a stage."""
    records, before = [], None
    for stage, b in on["stages"].items():
        a, same, compared = off["stages"][stage], True, 0
        for ids, leads, others in zip(a["ids"], a["leads"], b["ids"], strict=True):
            clear = next((i for i, lead in enumerate(leads) if lead < CLEAR), len(ids))
            same, compared = same and ids[:clear] == others[:clear], compared + clear
        twins, copies = b["report"]["twins"], b["copies"]
        derived = [*twins.values(), *copies.values()]
        addresses = [d["address"] for d in derived]
        records.append({
            "server": server, "stage": stage, "same_tokens": same, "compared_tokens": compared, "twins": len(twins),
            "copies": b["report"]["copies"], "freed": b["report"]["freed"],
            "exact": all(d["exact"] for d in derived) if derived else None,
            "moved": before is not None and before != addresses, "calls": b["report"]["calls"],
        })  # fmt: skip
        before = addresses
    return records


def rescaled(model: Path, out: Path) -> Path:
    """A copy of a checkpoint with other scales."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 0.9 if n.endswith("weight_scale") else t for n, t in tensors.items()}, file, {"format": "pt"})
    return out


def stages(model: Path) -> list[dict[str, Any]]:
    """Serve a trained model without anything, with twins, with own copies, and without what was copied: a record a stage."""
    from tokenizers import Tokenizer

    text, tokenizer = (model / "heldout.txt").read_text(), Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(text[at : at + length]).ids for at, length in ((36000, 120), (24000, 2600), (44000, 30))]
    llm = {
        "model": str(model), "max_model_len": 2048, "gpu_memory_utilization": 0.3, "attention_backend": "FLASH_ATTN",
        "enable_sleep_mode": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as tmp:
        job = {"llm": llm, "other": str(rescaled(model, Path(tmp) / "other")), "prompts": prompts}
        off = alone(job)
        records = []
        for server, more in (("twins", {"crossover": CROSSOVER}), ("copies", {}), ("freed", {"reload": False})):
            config = {"twinweight": {"mode": "soft", **more}}
            served_so = {**llm, "enable_sleep_mode": server != "freed", "additional_config": config}
            records += compare(server, off, alone({**job, "llm": served_so, "copies": server != "twins"}))
        return records


def short_of_memory() -> dict[str, Any]:
    """Serve four layers of Llama-3.1-8B with memory for a third of the twins: what `squeezed` says."""
    from vllm_gpu import write_config

    with tempfile.TemporaryDirectory() as tmp:
        write_config("llama-3.1-8b", Path(tmp), dense=False, layers=4)
        llm = {
            "model": tmp, "load_format": "dummy", "max_model_len": 8192, "gpu_memory_utilization": 0.3,
            "linear_backend": "marlin", "attention_backend": "FLASH_ATTN",
        }  # fmt: skip
        first = alone({"llm": {**llm, "additional_config": {"twinweight": {"mode": "soft"}}}})
        # One server has told what there is; the next gets a floor that leaves a third of what twins would take.
        spare = first["for_twins"] - first["all_twins"] // 3
        floor = first["floor_tokens"] + spare * first["floor_tokens"] // first["floor_bytes"]
        return alone({"llm": {**llm, "additional_config": {"twinweight": {"mode": "soft", "kv_floor": floor}}}})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--model", type=Path, default=Path("models/stdlib-15m"))
    p.add_argument("--only", choices=("records", "own"), help="measure one part, and leave the other of OUT.json as it is")
    a = p.parse_args()
    from vllm_gpu import set_environment

    set_environment()
    import vllm

    from twinweight.engines.vllm.bench import environment

    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {}
    if a.only != "own":
        result["records"] = stages(a.model)
    if a.only != "records":
        result["own"] = short_of_memory()
    result["environment"] = {**environment(vllm.__version__), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps(result), flush=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


def run_job(given: Path, found: Path) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ["TWINWEIGHT_CACHE"] = "off"
    job = json.loads(given.read_text())
    found.write_text(json.dumps(served(job) if "prompts" in job else squeezed(job)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
