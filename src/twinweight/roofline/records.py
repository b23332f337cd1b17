"""What is kept of a trace: ops with their place in the call tree, kernels, and the launches that tie the two."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LABEL = re.compile(r"^(?P<name>\S+) (?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)$")
"""A record_function label that carries a shape: "twinweight::int4 1x4096x4096", "wvsplitk_int4 1x12288x2048"."""

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs of an op, one entry an argument: dims (of a tensor list: () ), dtype as the profiler names it, value of a scalar.

    lists: the dims of the tensors in tensor lists, in order.
    """

    dims: tuple[Dims, ...] = ()
    types: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    lists: tuple[Dims, ...] = ()


@dataclass(slots=True)
class Node:
    """An op or a label on a CPU thread. start, end, own: microseconds, own being the time outside of children; parent: index of
    the enclosing node, or -1. label: a record_function, not an op.
    """

    name: str
    start: float
    end: float
    label: bool = False
    signature: Signature | None = None
    parent: int = -1
    own: float = 0.0


@dataclass(slots=True)
class Kernel:
    """A kernel, copy or fill on a device. start, time: microseconds; grid: grid and block as text; moved: bytes of a copy.

    launched: when the CPU launched it (its own start where that is not in the trace); node: index of the op that did, or -1;
    graph: launched by replaying a captured graph, at `launched`.
    """

    name: str
    start: float
    time: float
    correlation: int
    external: int
    grid: str = ""
    moved: int | None = None
    launched: float = 0.0
    node: int = -1
    graph: bool = False


@dataclass
class Trace:
    """One file. device: the GPU's name as the trace has it, or ""."""

    name: str
    device: str = ""
    nodes: list[Node] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What one call of an op computes and must move.

    flops: two a multiply-add, counted as torch.utils.flop_counter does (causal attention in full); needed: those that cannot be
    left out (causal attention: half), for the roof. bytes: every input read once, every output written once, None if not
    known. dtype: which matrix rate bounds it. shape: "MxNxK" or what else tells calls apart.
    """

    flops: int | None = None
    needed: int | None = None
    bytes: int | None = None
    dtype: str = ""
    shape: str = ""
    rows: int = 0


@dataclass
class Call:
    """One call of an op with the device time it took, in microseconds (the CPU's, in a trace without a GPU).

    at: when it was launched, on the CPU's clock, or, replayed by a graph, when it ran. part: a further kernel of a call that is
    counted with its first one. grids: name and grid of its kernels, in order.
    how: "launch" (tied by correlation), "graph" (a replayed kernel, tied to its twin outside of the graph), "name" (known by
    the kernel's name alone) or "none".
    """

    op: str
    kind: str
    time: float
    at: float
    how: str = "launch"
    work: Work | None = None
    path: str = ""
    phase: str = "other"
    replayed: bool = False
    part: bool = False
    grids: list[tuple[str, str]] = field(default_factory=list)
