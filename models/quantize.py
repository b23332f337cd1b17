"""Quantize the model that `train.py` left to W4A16 (compressed-tensors, symmetric, group 128) and measure what that costs.

    python models/quantize.py TRAINED OUT

TRAINED: the directory `train.py` wrote. OUT: the checkpoint that ships, with the tokenizer, the first 256 KiB of the held-out
text and train.json. Each group's scale is the one of 64 candidates with the least squared error. train.json gains the held-out
perplexity of the bf16 model and of its int4 form on the text that ships.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import twinweight
from twinweight.quality import arm, perplexity
from twinweight.weight import from_values

GROUP = 128
TEXT_BYTES = 256 << 10
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
        }
    },
}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (int32 [N, K / 8], bf16 [N, K / GROUP])."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True) / 7
    best, scale = torch.full_like(top, torch.inf), top
    for shrink in torch.linspace(0.5, 1.2, 64).tolist():
        s = (top * shrink).bfloat16().float()
        error = ((groups / s).round().clamp(-8, 7) * s - groups).square().sum(-1, keepdim=True)
        best, scale = torch.minimum(best, error), torch.where(error < best, s, scale)
    values = (groups / scale).round().clamp(-8, 7) + 8
    packed = from_values(values.flatten(1), scale.squeeze(-1).bfloat16(), group_size=GROUP)
    return packed.packed, packed.scales


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("trained", type=Path)
    p.add_argument("out", type=Path)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in load_file(a.trained / "dense" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"] = quantize(tensor)
            tensors[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        else:
            tensors[name] = tensor
    save_file(tensors, a.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((a.trained / "dense" / "config.json").read_text())
    (a.out / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}, indent=1) + "\n")
    for file in (a.trained / "dense").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, a.out)
    text = (a.trained / "heldout.txt").read_bytes()[:TEXT_BYTES].decode(errors="ignore")
    (a.out / "heldout.txt").write_text(text, encoding="utf-8")

    ids = torch.tensor(AutoTokenizer.from_pretrained(a.out)(text)["input_ids"])
    dense = AutoModelForCausalLM.from_pretrained(a.trained / "dense", dtype=torch.bfloat16).eval()
    model = twinweight.load(a.out, mode="off")
    summary = json.loads((a.trained / "train.json").read_text())
    with arm(model, "int4"):
        summary["shipped_text"] = {
            "tokens": len(ids), "ppl_bf16": round(perplexity(dense, ids), 4), "ppl_int4": round(perplexity(model, ids), 4)
        }  # fmt: skip
    (a.out / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(summary["shipped_text"])


if __name__ == "__main__":
    main()
