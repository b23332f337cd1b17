"""The ops of replayed kernels: a CUDA graph launches them without one.

The same model outside of the graph (before the capture, or in a second trace recorded without graphs) runs the same GEMM and
attention kernels in the same order. So the i-th kernel of a name and grid in a replayed step is the i-th of them in a step that
has ops, where both have as many; where all of those belong to one op and shape, the order does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from twinweight.roofline.records import Call
from twinweight.roofline.steps import Step, Steps

_Key = tuple[str, str]
_Origin = dict[_Key, list[Call]]


def resolve(steps: Steps, references: Sequence[Steps]) -> None:
    """Fill op, kind, work and path of replayed calls in `steps`, in place, from steps of the references that have ops."""
    known = [(step, _by_kernel(step)) for ref in references for step in ref.steps]
    for step in steps.steps:
        calls = defaultdict(list)
        for call in step.calls:
            # Copies and fills have no grid, and their name says nothing.
            if call.replayed and call.grids[0][1]:
                calls[call.grids[0]].append(call)
        if calls:
            candidates = [(other, origin) for other, origin in known if other is not step and _alike(step, other)]
            for key, replayed in calls.items():
                _match(key, replayed, candidates)


def _alike(step: Step, other: Step) -> bool:
    """Same phase and, as far as known, as many rows: shapes may be taken over."""
    return step.phase == other.phase and (step.rows == other.rows or 0 in (step.rows, other.rows))


def _by_kernel(step: Step) -> _Origin:
    found: _Origin = defaultdict(list)
    for call in sorted(step.calls, key=lambda c: c.at):
        if call.how == "launch":
            for key in call.grids:
                found[key].append(call)
    return found


def _match(key: _Key, replayed: list[Call], candidates: Sequence[tuple[Step, _Origin]]) -> None:
    """By order, from the first step that has as many; else by what all of a step without any graph agree on."""
    for _, origin in candidates:
        sources = origin.get(key, ())
        if len(sources) == len(replayed):
            for call, source in zip(sorted(replayed, key=lambda c: c.at), sources, strict=True):
                _take(call, source, key)
            return
    for step, origin in candidates:
        sources = origin.get(key, ())
        whole = not any(c.replayed for c in step.calls)
        if sources and whole and len({(s.op, s.work.shape if s.work else "") for s in sources}) == 1:
            for call in replayed:
                _take(call, sources[0], key)
            return


def _take(call: Call, source: Call, key: _Key) -> None:
    call.op, call.kind, call.path, call.how = source.op, source.kind, source.path, "graph"
    # A call of several kernels is counted once: with the first of them.
    call.part = key != source.grids[0]
    call.work = source.work
