"""From a file to a `Trace`: keeps what is needed of each event, ties each kernel to its launch and that to the op around it."""

from __future__ import annotations

import marshal
from collections import defaultdict
from pathlib import Path
from typing import Any

from twinweight.errors import TraceError
from twinweight.roofline.ops import takes_inputs
from twinweight.roofline.records import Dims, Kernel, Node, Signature, Trace
from twinweight.roofline.stream import Progress, events

# Today's categories, and those of torch 1.x.
_CATEGORY = {
    "cpu_op": "op", "Operator": "op", "user_annotation": "label",
    "kernel": "kernel", "Kernel": "kernel", "gpu_memcpy": "kernel", "Memcpy": "kernel", "gpu_memset": "kernel",
    "Memset": "kernel",
    "cuda_runtime": "launch", "cuda_driver": "launch", "Runtime": "launch", "hip_runtime": "launch", "xpu_runtime": "launch",
}  # fmt: skip
_LAUNCHES = ("Launch", "Memcpy", "Memset", "memcpy", "memset")


def read(path: Path, progress: Progress | None = None) -> Trace:
    """Read one trace. Raises ConfigError or TraceError (empty, cut off, foreign, or without a single op or kernel)."""
    builder = _Builder(path.name)
    header: dict[str, Any] = {}
    for event in events(path, header, progress):
        builder.add(event)
    trace = builder.finish(header)
    if not trace.nodes and not trace.kernels:
        raise TraceError(file=path, expected="a trace of torch.profiler", found="no event of an op or a kernel")
    return trace


class _Builder:
    def __init__(self, name: str) -> None:
        self.trace = Trace(name)
        self.names: dict[str, str] = {}
        self.signatures: dict[bytes, Signature] = {}
        self.threads: dict[tuple[Any, Any], list[tuple[float, float, int]]] = defaultdict(list)
        self.launches: dict[int, tuple[float, bool]] = {}
        self.launch_node: dict[int, int] = {}
        self.external: dict[int, int] = {}

    def add(self, event: dict[str, Any]) -> None:
        category = _CATEGORY.get(event.get("cat", ""))
        if category is None or event.get("ph") != "X":
            return
        try:
            start, time, name = float(event["ts"]), float(event.get("dur", 0)), event["name"]
            args = event.get("args") or {}
            name = self.names.setdefault(name, name)
            if category == "kernel":
                self._kernel(name, start, time, args)
            elif category == "launch":
                self._launch(name, start, event, args)
            else:
                self._node(name, start, start + time, category == "label", event, args)
        except (KeyError, TypeError, ValueError, AttributeError):
            return  # an event of another writer: none of ours lacks these fields

    def _kernel(self, name: str, start: float, time: float, args: dict[str, Any]) -> None:
        grid = f"{args.get('grid')} {args.get('block')}" if "grid" in args else ""
        self.trace.kernels.append(
            Kernel(name, start, time, int(args.get("correlation", 0)), _external(args), self.names.setdefault(grid, grid),
                   args.get("bytes"), start)
        )  # fmt: skip

    def _launch(self, name: str, start: float, event: dict[str, Any], args: dict[str, Any]) -> None:
        correlation = int(args.get("correlation", 0))
        # ROCm gives 0 to what it cannot correlate.
        if correlation > 0 and any(word in name for word in _LAUNCHES):
            self.launches[correlation] = (start, "GraphLaunch" in name)
            self.threads[event.get("pid"), event.get("tid")].append((start, 0.0, -1 - correlation))

    def _node(self, name: str, start: float, end: float, label: bool, event: dict[str, Any], args: dict[str, Any]) -> None:
        index = len(self.trace.nodes)
        signature = None if label or not takes_inputs(name) else self._signature(args)
        self.trace.nodes.append(Node(name, start, end, label, signature, -1, end - start))
        # At equal starts the longer one comes first, and a launch last: parents before children.
        self.threads[event.get("pid"), event.get("tid")].append((start, -end, index))
        if external := _external(args):
            self.external[external] = index

    def _signature(self, args: dict[str, Any]) -> Signature | None:
        if "Input Dims" not in args and "Input dims" not in args:
            return None
        raw = (args.get("Input Dims", args.get("Input dims")), args.get("Input type"), args.get("Concrete Inputs"))
        key = marshal.dumps(raw)
        found = self.signatures.get(key)
        if found is None:
            found = self.signatures[key] = _parse(*raw)
        return found

    def finish(self, header: dict[str, Any]) -> Trace:
        for items in self.threads.values():
            self._nest(items)
        self.threads.clear()
        for kernel in self.trace.kernels:
            kernel.launched, kernel.graph = self.launches.get(kernel.correlation, (kernel.start, False))
            node = self.launch_node.get(kernel.correlation, -1)
            # Without its launch in the trace, a kernel may still carry the id of its op.
            kernel.node = self.external.get(kernel.external, -1) if node < 0 else node
        self.trace.kernels.sort(key=lambda k: k.start)
        devices = header.get("deviceProperties") or []
        if devices and isinstance(devices, list) and isinstance(devices[0], dict):
            self.trace.device = str(devices[0].get("name", ""))
        return self.trace

    def _nest(self, items: list[tuple[float, float, int]]) -> None:
        """Give every node of one thread its parent, and every launch the node around it."""
        nodes, stack = self.trace.nodes, list[int]()
        for start, _, index in sorted(items):
            while stack and nodes[stack[-1]].end <= start:
                stack.pop()
            parent = stack[-1] if stack else -1
            if index < 0:
                self.launch_node[-1 - index] = parent
                continue
            node = nodes[index]
            node.parent = parent
            if parent >= 0:
                # Times are rounded to nanoseconds: a child may seem to outlive its parent.
                node.end = min(node.end, nodes[parent].end)
                nodes[parent].own -= node.end - node.start
            stack.append(index)


def _external(args: dict[str, Any]) -> int:
    return int(args.get("External id", args.get("external id", 0)) or 0)


def _parse(dims: Any, types: Any, values: Any) -> Signature:
    plain, lists = list[Dims](), list[Dims]()
    for entry in dims if isinstance(dims, list) else ():
        if isinstance(entry, list) and entry and isinstance(entry[0], list):
            lists += [_ints(e) for e in entry]
            plain.append(())
        else:
            plain.append(_ints(entry))
    return Signature(tuple(plain), tuple(map(str, types or ())), tuple(map(str, values or ())), tuple(lists))


def _ints(entry: Any) -> Dims:
    return tuple(v for v in entry if isinstance(v, int)) if isinstance(entry, list) else ()
