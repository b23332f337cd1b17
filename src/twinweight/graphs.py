"""CUDA graphs of calls to be timed: hundreds of them, captured in a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable

import torch

Wrap = Callable[[Callable[[], None]], Callable[[], object]]
"""Turns calls into what is timed in their place."""


class Graphs:
    """Captures graphs on a stream of its own, all in one memory pool: they must not replay at the same time.

    Not `torch.cuda.graph`, which empties the allocator's cache before every capture. A pool ends with the last graph in it and
    cannot be used again: a graph is kept until this object goes.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        one = torch.ones(1, device="cuda")
        torch.cuda.synchronize()
        self._kept = self._captured(lambda: one.add_(1))

    def capture(self, run: Callable[[], object], warm: Callable[[], object] | None = None) -> torch.cuda.CUDAGraph:
        """The graph of `run`, once `warm` (default: `run`) has compiled kernels and allocated workspaces.

        Raises RuntimeError where a kernel cannot be captured.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            (warm or run)()
        torch.cuda.synchronize()
        return self._captured(run)

    def replayed(self, run: Callable[[], None]) -> Callable[[], object]:
        """The replay of `run`'s graph; `run` itself where a kernel cannot be captured."""
        try:
            replay: Callable[[], object] = self.capture(run).replay
        except RuntimeError:
            torch.cuda.synchronize()
            return run
        return replay

    def _captured(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may go on allocating: a server has some.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return graph
