"""What a path does to the output of a real model: perplexity, distance from int4 and greedy text, under int4 only, twin only,
both as in use, and 8-bit twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinweight import twin
from twinweight.paths import Path
from twinweight.twins import forced, int4_linears, lossy_kinds, shape_of, twins_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARMS = ("int4", "twin", "mixed")
_CONTEXT = 512


@contextmanager
def arm(model: PreTrainedModel, name: str) -> Iterator[None]:
    """`int4`: every call on the int4 kernel. `twin`: every call on the twin. `mixed`: routes as measured, decode on int4 and
    prefill on the twin.
    """
    path = {"int4": Path.INT4, "twin": Path.TWIN}.get(name)
    with twins_in_use(model, name != "int4"), forced(model, path) if path is not None else nullcontext():
        yield


def perplexity(model: PreTrainedModel, ids: Tensor, context: int = _CONTEXT) -> float:
    """exp of the mean negative log likelihood of ids [tokens], in windows of `context` tokens that share one token."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in _windows(model, ids, context):
            scores = model(input_ids=window[:, :-1]).logits.float().log_softmax(-1)
            total -= float(scores.gather(2, window[:, 1:, None]).sum())
            count += window.shape[1] - 1
    return math.exp(total / count)


def _windows(model: PreTrainedModel, ids: Tensor, context: int) -> Iterator[Tensor]:
    """ids [tokens] as [1, context + 1] on the model's device, each sharing a token with the next."""
    for at in range(0, len(ids) - 1, context):
        yield ids[at : at + context + 1].unsqueeze(0).to(model.device)


def distance(
    model: PreTrainedModel,
    ids: Tensor,
    context: int = _CONTEXT,
    without: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """How far the model as it is set up now is from the same model on int4 only, over ids [tokens] in windows as `perplexity`.

    without: within what it makes the model is without anything else that is set up.

    Returns {"ppl", "kl": mean Kullback-Leibler divergence from int4 in nats a token, "top1": share of tokens with the same most
    likely next token}. Logits come in the model's dtype: the rounding of these is part of "kl", whatever the path.
    """
    loss, kl, same, count = 0.0, 0.0, 0, 0
    with torch.inference_mode():
        for window in _windows(model, ids, context):
            scores = model(input_ids=window[:, :-1]).logits.float().log_softmax(-1)
            with arm(model, "int4"), without():
                expected = model(input_ids=window[:, :-1]).logits.float().log_softmax(-1)
            loss -= float(scores.gather(2, window[:, 1:, None]).sum(dtype=torch.float64))
            kl += float((expected.exp() * (expected - scores)).sum(dtype=torch.float64))
            same += int((expected.argmax(-1) == scores.argmax(-1)).sum())
            count += window.shape[1] - 1
    return {"ppl": round(math.exp(loss / count), 5), "kl": round(kl / count, 7), "top1": round(same / count, 5)}


@contextmanager
def twins_of(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """Every weight has a twin of this kind and every call is on it; what was there before is built again afterwards."""
    before = {linear: linear.twin_kind for linear in int4_linears(model).values()}
    for linear in before:
        linear.build_twin(kind)
    try:
        with forced(model, Path.TWIN):
            yield
    finally:
        for linear, held in before.items():
            linear.drop_twin()
            if held is not None:
                linear.build_twin(held)


def lossy(model: PreTrainedModel, ids: Tensor, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """`distance` for 8-bit kinds (`twin.LOSSY`), every call on the twin: [{"kind", "emulated", "ppl", "kl", "top1"}].

    A kind that the model's device does not have is emulated (`emulation`); one that its weights cannot have is left out.
    """
    from twinweight.emulation import emulated

    found = []
    for kind in kinds:
        shapes = {shape_of(linear) for linear in int4_linears(model).values()}
        real = all(lossy_kinds(shape, kind)[0] for shape in shapes)
        if not real and kind == "fp8-exact" and any(s.act_order or s.group_size % twin.GROUP for s in shapes):
            continue
        with twins_of(model, kind) if real else emulated(model, kind):
            found.append({"kind": kind, "emulated": not real, **distance(model, ids)})
    return found


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
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """Perplexity on `text` and greedy continuations of `prompts`, per arm; kinds: of 8-bit twins, see `lossy`.

    Returns {"ppl_int4", "ppl_twin", "ppl_mixed", "kl_...", "top1_..." (see `distance`), "margin": the least `margin` of int4's
    texts, "greedy_equal": whether all arms wrote the same, "ppl_tokens", "text":
    {prompt: int4's continuation}, "different": prompts where an arm differs, "lossy"}.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"][: ppl_tokens + 1])
    starts = {p: torch.tensor(tokenizer(p)["input_ids"]) for p in prompts}
    result: dict[str, Any] = {}
    written: dict[str, dict[str, list[int]]] = {}
    for name in ARMS:
        with arm(model, name):
            result |= {f"{key}_{name}": value for key, value in distance(model, ids).items()}
            written[name] = {p: greedy(model, start, tokens) for p, start in starts.items()}
            if name == "int4":
                texts = {p: torch.cat((start, torch.tensor(written[name][p]))) for p, start in starts.items()}
                result["margin"] = min(margin(model, t, len(starts[p])) for p, t in texts.items())
    different = [p for p in prompts if any(written[name][p] != written["int4"][p] for name in ARMS)]
    result |= {
        "greedy_equal": not different, "different": different, "ppl_tokens": len(ids) - 1,
        "text": {p: tokenizer.decode(written["int4"][p]) for p in prompts}, "lossy": lossy(model, ids, kinds),
    }  # fmt: skip
    return result
