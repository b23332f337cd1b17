"""Which op a node of the call tree belongs to.

Attention, norms, experts and the like own all that happens inside them, from the outermost. Linears are known best by the
innermost: `aten::linear` by its `aten::mm`, `twinweight::vllm_linear` by the kernel that it calls; what else happens inside
belongs to that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from twinweight.roofline.counting import from_label, work_of
from twinweight.roofline.ops import LINEAR, SEALED, kind_of
from twinweight.roofline.records import LABEL, Node, Work

_FOLDED = frozenset(("copy", "elementwise"))


class Tree:
    """Owners of the nodes of one trace, found on demand."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.kinds = [_kind_of_label(n.name) if n.label else kind_of(n.name) for n in nodes]
        self.leaf: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        for index, node in enumerate(nodes):
            if self.kinds[index] in LINEAR:
                self._mark(index, node.parent)

    def _mark(self, leaf: int, parent: int) -> None:
        """The first linear inside a linear stands for it, and so up the tree."""
        while parent >= 0:
            if self.kinds[parent] in LINEAR:
                first = self.leaf.setdefault(parent, leaf)
                if self.nodes[leaf].start < self.nodes[first].start:
                    self.leaf[parent] = leaf
            parent = self.nodes[parent].parent

    def owner(self, index: int) -> int:
        """The node that index is a part of; -1 where there is no op around it, only labels."""
        found = self.owners.get(index)
        if found is None:
            found = self.owners[index] = self._owner(index)
        return found

    def _owner(self, index: int) -> int:
        innermost = linear = sealed = folded = -1
        while index >= 0:
            kind = self.kinds[index]
            if kind:
                innermost = index if innermost < 0 else innermost
                if kind in LINEAR and linear < 0:
                    linear = index
                if kind in SEALED:
                    sealed = index
                if kind in _FOLDED:
                    folded = index
            index = self.nodes[index].parent
        if sealed >= 0:
            return sealed
        if linear >= 0:
            while linear in self.leaf:
                linear = self.leaf[linear]
            return linear
        return folded if folded >= 0 else innermost

    def label(self, index: int) -> tuple[str, int, int, int] | None:
        """(path, M, N, K) of the nearest label around a node that carries a shape."""
        while index >= 0:
            node = self.nodes[index]
            if node.label and (match := LABEL.match(node.name)):
                return match["name"].rsplit("::", 1)[-1], int(match["m"]), int(match["n"]), int(match["k"])
            index = node.parent
        return None

    def work(self, index: int, owner: int) -> Work | None:
        """The work of `owner`, told by the nodes from `index` up to it, by linears around it, or by a label with its shape."""
        label, kind = self.label(owner) or self.label(index), self.kinds[owner]
        for node in self._tellers(index, owner):
            if work := work_of(self.nodes[node].name, self.kinds[node], self.nodes[node].signature):
                return work
        return from_label(*label[1:], int4=kind == "w4a16") if kind in LINEAR and label is not None else None

    def _tellers(self, index: int, owner: int) -> Iterator[int]:
        inside = []
        while index >= 0 and index != owner:
            inside.append(index)
            index = self.nodes[index].parent
        # A node that is no part of its owner encloses it: aten::linear, of which aten::mm is the owner.
        yield from inside if index == owner else ()
        yield owner
        index = self.nodes[owner].parent
        while index >= 0 and self.kinds[owner] in LINEAR:
            if self.kinds[index] == self.kinds[owner]:
                yield index
            index = self.nodes[index].parent


def name_of(node: Node) -> str:
    """The name of the op, or of a label that carries a shape without that."""
    match = LABEL.match(node.name) if node.label else None
    return match["name"] if match else node.name


@functools.lru_cache(maxsize=65536)
def _kind_of_label(name: str) -> str:
    """A label with the shape of a linear stands for one, where no op inside does: kernels of Triton are launched without."""
    match = LABEL.match(name)
    if match is None:
        return ""
    path = match["name"]
    kind = _PATHS.get(path) or kind_of(path)
    return kind if kind in LINEAR else ""


_PATHS = {"twinweight::twin": "gemm", "twinweight::stream": "gemm", "twinweight::int4": "w4a16", "twinweight::fused": "w4a16"}
