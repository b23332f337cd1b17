"""From a trace to calls: each with its op, its device time, its work, its phase, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field

from twinweight.roofline import replay
from twinweight.roofline.attention import packed_work
from twinweight.roofline.kernels import kind_of_kernel, short
from twinweight.roofline.ops import VIEW
from twinweight.roofline.records import Call, Kernel, Trace
from twinweight.roofline.steps import Steps, find_steps, settle
from twinweight.roofline.tree import Tree, name_of


@dataclass
class Attributed:
    """The calls of a trace. gpu: whether times are a GPU's; else they are the CPU's own time of each op."""

    name: str
    device: str
    gpu: bool
    calls: list[Call] = field(default_factory=list)
    steps: Steps = field(default_factory=lambda: Steps((), labelled=False))


def attribute(trace: Trace, reference: Attributed | None = None) -> Attributed:
    """Attribute all the time in a trace.

    reference: another trace of the same model, without graphs, from which the ops of replayed kernels are taken.
    """
    steps = find_steps(trace.nodes, trace.kernels)
    out = Attributed(trace.name, trace.device, bool(trace.kernels), steps=steps)
    maker = _Maker(Tree(trace.nodes), steps)
    if trace.kernels:
        for kernel in trace.kernels:
            maker.add_kernel(kernel)
    else:
        for index in range(len(trace.nodes)):
            maker.add_cpu(index)
    out.calls = maker.calls
    settle(steps)
    replay.resolve(steps, [a.steps for a in (out, reference) if a is not None])
    settle(steps)
    return out


class _Maker:
    def __init__(self, tree: Tree, steps: Steps) -> None:
        self.tree, self.steps = tree, steps
        self.calls: list[Call] = []
        self.by_owner: dict[int, Call] = {}

    def add_kernel(self, kernel: Kernel) -> None:
        owner = self.tree.owner(kernel.node) if kernel.node >= 0 and not kernel.graph else -1
        if owner < 0:
            kind = kind_of_kernel(kernel.name)
            call = Call(short(kernel.name), kind or "other", kernel.time, kernel.launched, "name" if kind else "none")
            call.grids.append((kernel.name, kernel.grid))
            call.replayed = kernel.graph
            self._place(call, kernel.launched)
            call.at = kernel.start if kernel.graph else call.at
            return
        call = self._call(owner, kernel.node, kernel.launched)
        call.time += kernel.time
        call.grids.append((kernel.name, kernel.grid))

    def add_cpu(self, index: int) -> None:
        node = self.tree.nodes[index]
        owner = self.tree.owner(index)
        if owner >= 0:
            self._call(owner, index, node.start).time += max(0.0, node.own)

    def _call(self, owner: int, index: int, at: float) -> Call:
        """The call that `owner` is, with the work that is known of it by now."""
        call = self.by_owner.get(owner)
        if call is None:
            node = self.tree.nodes[owner]
            kind = self.tree.kinds[owner]
            label = self.tree.label(owner) or self.tree.label(index)
            call = Call(name_of(node), "other" if kind == VIEW else kind, 0.0, at, path=label[0] if label else "")
            self.by_owner[owner] = call
            self._place(call, at)
        if call.work is None or call.work.bytes is None:
            call.work = self.tree.work(index, owner) or call.work
            if call.kind == "attention" and (call.work is None or call.work.bytes is None):
                self._by_lengths(call, index, owner)
        return call

    def _by_lengths(self, call: Call, index: int, owner: int) -> None:
        """Packed attention, where the step's label tells the lengths."""
        step = self.steps.at(call.at)
        if step is None or step.lengths is None:
            return
        while index >= 0:
            signature = self.tree.nodes[index].signature
            if signature and len(signature.dims) > 1 and len(signature.dims[0]) == 3 == len(signature.dims[1]):
                (_, heads, d), kv_heads = signature.dims[0], signature.dims[1][1]
                s = step.lengths
                call.work = packed_work(
                    signature.types[0], heads, kv_heads, d, s.queries, s.pairs, s.context, causal=True, sequences=s.sequences
                )
                return
            index = -1 if index == owner else self.tree.nodes[index].parent

    def _place(self, call: Call, at: float) -> None:
        self.calls.append(call)
        if (step := self.steps.at(at)) is not None:
            step.calls.append(call)
