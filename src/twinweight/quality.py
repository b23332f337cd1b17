"""What a path does to the output of a real model: perplexity and greedy text, under int4 only, twin only, and both as in
use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinweight.paths import Path
from twinweight.twins import forced, twins_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARMS = ("int4", "twin", "mixed")
_CONTEXT = 512


@contextmanager
def arm(model: PreTrainedModel, name: str) -> Iterator[None]:
    """`int4`: no twin at all. `twin`: every call on the twin. `mixed`: routes as measured, decode on int4 and prefill on the
    twin.
    """
    with twins_in_use(model, name != "int4"):
        if name == "twin":
            with forced(model, Path.TWIN):
                yield
        else:
            yield


def perplexity(model: PreTrainedModel, ids: Tensor, context: int = _CONTEXT) -> float:
    """exp of the mean negative log likelihood of ids [tokens], in windows of `context` tokens that share one token."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(ids) - 1, context):
            window = ids[at : at + context + 1].unsqueeze(0).to(model.device)
            scores = model(input_ids=window[:, :-1]).logits.float().log_softmax(-1)
            total -= float(scores.gather(2, window[:, 1:, None]).sum())
            count += window.shape[1] - 1
    return math.exp(total / count)


def margin(model: PreTrainedModel, ids: Tensor, start: int) -> float:
    """How far a text ids [tokens] is from another greedy choice: the least lead, in logits, of ids[start:] over the next best.

    Negative where a token is not the most likely one. A small lead is a near-tie, which rounding alone can turn.
    """
    with torch.inference_mode():
        logits = model(input_ids=ids[:-1].unsqueeze(0).to(model.device)).logits[0, start - 1 :].float()
    taken = ids[start:].to(model.device).unsqueeze(1)
    others = logits.scatter(1, taken, -torch.inf).amax(1)
    return float((logits.gather(1, taken).squeeze(1) - others).min())


def greedy(model: PreTrainedModel, ids: Tensor, tokens: int) -> list[int]:
    """The `tokens` most likely tokens after ids [tokens], one after the other."""
    with torch.inference_mode():
        prompt = ids.unsqueeze(0).to(model.device)
        out = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
    return [int(i) for i in out[0, len(ids) :]]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    prompts: Sequence[str],
    *,
    ppl_tokens: int = 8192,
    tokens: int = 32,
) -> dict[str, Any]:
    """Perplexity on `text` and greedy continuations of `prompts`, per arm.

    Returns {"ppl_int4", "ppl_twin", "ppl_mixed", "margin": the least `margin` of int4's
    texts, "greedy_equal": whether all arms wrote the same, "ppl_tokens", "text":
    {prompt: int4's continuation}, "different": prompts where an arm differs}.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"][: ppl_tokens + 1])
    starts = {p: torch.tensor(tokenizer(p)["input_ids"]) for p in prompts}
    result: dict[str, Any] = {}
    written: dict[str, dict[str, list[int]]] = {}
    for name in ARMS:
        with arm(model, name):
            result[f"ppl_{name}"] = round(perplexity(model, ids), 5)
            written[name] = {p: greedy(model, start, tokens) for p, start in starts.items()}
            if name == "int4":
                texts = {p: torch.cat((start, torch.tensor(written[name][p]))) for p, start in starts.items()}
                result["margin"] = min(margin(model, t, len(starts[p])) for p, t in texts.items())
    different = [p for p in prompts if any(written[name][p] != written["int4"][p] for name in ARMS)]
    result |= {
        "greedy_equal": not different, "different": different, "ppl_tokens": len(ids) - 1,
        "text": {p: tokenizer.decode(written["int4"][p]) for p in prompts},
    }  # fmt: skip
    return result
