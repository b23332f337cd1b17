"""Steps of a model in a trace, each prefill or decode.

A step begins where a label says so (vLLM's `execute_context_..._generation_...`, ours), else where token ids are embedded.
Without a label it is decode where every sequence has one query: the ids say so, or the linears have no more rows than the last
one, which makes the logits.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from twinweight.roofline.ops import LINEAR
from twinweight.roofline.records import Call, Kernel, Node

PREFILL, DECODE, OTHER = "prefill", "decode", "other"

_OURS = re.compile(r"^twinweight::(prefill|decode)$")
_VLLM = re.compile(r"^execute_(?:\d+_)?context_(\d+)\(([^)]*)\)_generation_(\d+)\(([^)]*)\)")
_FIELD = re.compile(r"([a-z]+)(\d+)")


@dataclass(frozen=True)
class Lengths:
    """Sums over the sequences of a step: query tokens, context tokens, queries x context, sequences."""

    queries: int
    context: int
    pairs: int
    sequences: int


@dataclass
class Step:
    """start: microseconds; it lasts until the next. rows: the most rows that a linear has, 0 if unknown."""

    start: float
    phase: str = OTHER
    rows: int = 0
    lengths: Lengths | None = None
    calls: list[Call] = field(default_factory=list)


class Steps:
    """The steps of one trace."""

    def __init__(self, steps: Sequence[Step], labelled: bool) -> None:
        self.steps, self.labelled = list(steps), labelled
        self.starts = [s.start for s in self.steps]

    def at(self, time: float) -> Step | None:
        """The step at a CPU time; what comes before the first belongs to it where no label says when it begins."""
        index = bisect_right(self.starts, time) - 1
        if index < 0 and self.steps and not self.labelled:
            return self.steps[0]
        return self.steps[index] if index >= 0 else None


def find_steps(nodes: Sequence[Node], kernels: Iterable[Kernel]) -> Steps:
    """Steps by labels, or by embeddings: ops, or, where they are compiled, kernels."""
    labelled = sorted((s for n in nodes if n.label and (s := _labelled(n))), key=lambda s: s.start)
    if labelled:
        return Steps(labelled, labelled=True)
    tables = [(_table(n), n) for n in nodes if not n.label and n.name in ("aten::embedding", "vllm::embedding")]
    largest = max((rows for rows, _ in tables), default=0)
    starts = sorted((n.start, _one_query(n)) for rows, n in tables if rows == largest)
    if not starts:
        starts = sorted((k.launched, None) for k in kernels if "embedding" in k.name and "rotary" not in k.name)
    return Steps([Step(at, DECODE if one else PREFILL if one is False else OTHER) for at, one in starts], labelled=False)


def settle(steps: Steps) -> None:
    """Give phases to the steps that have none yet, from the rows of their calls, and the calls their step's phase."""
    for step in steps.steps:
        linears = sorted((c for c in step.calls if c.work and c.work.rows and c.kind in LINEAR), key=lambda c: c.at)
        others = [c.work.rows for c in step.calls if c.work and c.work.rows]
        step.rows = max(others, default=0)
        if step.phase == OTHER and step.rows:
            last = linears[-1].work.rows if linears and linears[-1].work else 0
            step.phase = DECODE if step.rows <= last else PREFILL
        for call in step.calls:
            call.phase = step.phase


def _labelled(node: Node) -> Step | None:
    if match := _OURS.match(node.name):
        return Step(node.start, match[1])
    if match := _VLLM.match(node.name):
        contexts, context, generations, generation = match.groups()
        phase = PREFILL if int(contexts) else DECODE if int(generations) else OTHER
        return Step(node.start, phase, lengths=_lengths(int(contexts) + int(generations), context, generation))
    return None


def _lengths(sequences: int, *texts: str) -> Lengths | None:
    """From vLLM's detailed labels: "sq512sk512sqsq262144sqsk262144"."""
    sums = dict.fromkeys(("sq", "sk", "sqsk"), 0)
    for text in texts:
        if "sk" not in text:
            return None
        for name, value in _FIELD.findall(text):
            if name in sums:
                sums[name] += int(value)
    return Lengths(sums["sq"], sums["sk"], sums["sqsk"], sequences)


def _table(node: Node) -> int:
    return node.signature.dims[0][0] if node.signature and node.signature.dims and node.signature.dims[0] else 0


def _one_query(node: Node) -> bool | None:
    """Whether ids [B, S] have S = 1; None for packed ids, which do not tell."""
    dims = node.signature.dims if node.signature else ()
    return dims[1][1] == 1 if len(dims) > 1 and len(dims[1]) == 2 else None
