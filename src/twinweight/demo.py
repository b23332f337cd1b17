"""`make demo`: what a twin buys and what it costs, on real text and on a model of true shape, in two and a half minutes on
two cores with AVX-512, in five without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinweight import presets, synth, twin
from twinweight.bench import Workload, bench
from twinweight.engines.hf import load
from twinweight.errors import ConfigError
from twinweight.quality import compare

PRESET = "qwen3-0.6b"
_SECONDS = 100.0  # five repeats take less on two cores with AVX-512; without it three take longer
# Starts of code whose continuation is no near-tie under int4 (`quality.margin`): rounding alone turns a near-tie either way.
PROMPTS = (
    "    with open(",
    "class Error(Exception):\n    pass\n\nclass ",
    "    yield ",
    "    def __init__(self",
)


def check_model(model_dir: Path) -> Path:
    """The text that comes with the trained model. Raises ConfigError where there is no such model."""
    text = model_dir / "heldout.txt"
    if not text.exists():
        raise ConfigError(f"no trained model at {model_dir}: run this from the repository, or name the directory (--model)")
    return text


def quality(model_dir: Path) -> dict[str, Any]:
    """Perplexity and greedy text of the shipped model, per arm; what 8-bit twins cost it, and what int4 itself did when it was
    quantized ("int4_cost": {"tokens", "ppl_bf16", "ppl_int4"} or None). Raises ConfigError where there is no model.
    """
    from transformers import AutoTokenizer

    text = check_model(model_dir)
    model = load(model_dir, mode="soft", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    found = compare(model, tokenizer, text.read_text(encoding="utf-8"), PROMPTS, kinds=tuple(twin.LOSSY))
    log = model_dir / "train.json"
    return found | {"int4_cost": json.loads(log.read_text(encoding="utf-8")).get("shipped_text") if log.exists() else None}


def speed(directory: Path, *, repeats: int, prompt_tokens: int, step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """`bench` on a synthetic Qwen3-0.6B, written into `directory` unless it is there from an earlier run."""
    out = directory / f"synth-{PRESET}"
    if not (out / synth.MARKER).exists():
        synth.write(presets.preset(PRESET), out)
    model = load(out, mode="soft", progress=False)
    return bench(model, Workload(prompt_tokens=prompt_tokens, output_tokens=32), repeats=repeats, seconds=_SECONDS, step=step)
