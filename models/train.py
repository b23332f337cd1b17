"""Train the small Llama-type language model that ships in `models/`, on the text of Python's own standard library.

    python models/train.py OUT [--minutes 40] [--layers 6] [--hidden 384] [--device cpu]

Writes OUT/dense: the bf16 model and its byte-level BPE tokenizer; OUT/heldout.txt: text of files the training never saw;
OUT/train.json: the log. `models/quantize.py` then makes the W4A16 checkpoint. Files are split by a hash of their
path, one in twenty held out; vendored packages are left out of both parts.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Texts of the standard library's modules, its test suite among them: (training, held out), each in order of the hash."""
    skip = {"site-packages", "lib2to3", "pydoc_data", "_vendor", "__pycache__"}
    train, held = [], []
    digests = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not skip & set(name.parts):
            digests[path] = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16)
    for path, digest in sorted(digests.items(), key=lambda item: item[1]):
        text = path.read_text(encoding="utf-8", errors="ignore")
        (held if digest % 20 == 0 else train).append(text)
    return train, held


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, CONTEXT):
            row = ids[start : start + CONTEXT + 1][None]
            loss = model(input_ids=row[:, :-1]).logits.float().log_softmax(-1).gather(2, row[:, 1:, None])
            total -= loss.sum().item()
            count += loss.numel()
    model.train()
    return math.exp(total / count)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--minutes", type=float, default=40)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")))
    p.add_argument("--python", default=platform.python_version(), help="version of the corpus, for the log")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    train, held = read_corpus(a.corpus)
    tok = train_tokenizer(train, a.vocab)
    eos = tok.eos_token_id

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor([i for t in texts for i in [*tok(t)["input_ids"], eos]], device=a.device)

    data, held_ids = encode(train), encode(held)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=a.hidden, intermediate_size=a.hidden * 3, num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, initializer_range=0.02,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(a.device)
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train)} files, {len(data)} tokens; held out {len(held)} files, {len(held_ids)}; {params} parameters", flush=True
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=a.lr, betas=(0.9, 0.95)
    )
    log, step, seen, started, last = [], 0, 0, time.monotonic(), 0.0
    while (progress := (time.monotonic() - started) / (60 * a.minutes)) < 1:
        # The schedule follows the clock: warm-up over 2 % of the time, then a cosine down to a twentieth of the peak.
        scale = min(1.0, progress / 0.02 + 1e-2) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for g in opt.param_groups:
            g["lr"] = a.lr * scale
        at = torch.randint(len(data) - CONTEXT - 1, (a.batch,)).tolist()
        rows = torch.stack([data[i : i + CONTEXT + 1] for i in at])
        with torch.autocast(a.device, dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + rows[:, 1:].numel()
        if (now := time.monotonic() - started) - last > 60 * a.minutes / 40:
            last = now
            log.append({"minutes": round(now / 60, 2), "step": step, "tokens": seen, "loss": round(loss.item(), 4)})
            print(log[-1], flush=True)

    model = model.to(torch.bfloat16)
    ppl = perplexity(model, held_ids)
    model.save_pretrained(a.out / "dense")
    tok.save_pretrained(a.out / "dense")
    (a.out / "heldout.txt").write_text("".join(held), encoding="utf-8")
    device = torch.cuda.get_device_name() if a.device == "cuda" else a.device
    summary = {
        "command": f"python models/train.py OUT --minutes {a.minutes:g} --layers {a.layers} --hidden {a.hidden} "
        f"--vocab {a.vocab} --batch {a.batch} --lr {a.lr:g}",
        "corpus": f"standard library of Python {a.python}",
        "device": device, "torch": torch.__version__, "parameters": params, "train_files": len(train),
        "train_tokens": len(data), "heldout_files": len(held), "heldout_tokens": len(held_ids),
        "heldout_ppl_bf16": round(ppl, 4), "steps": step, "tokens_seen": seen, "log": log,
    }  # fmt: skip
    (a.out / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"held-out perplexity {ppl:.3f} after {step} steps, {seen} tokens")


if __name__ == "__main__":
    main()
