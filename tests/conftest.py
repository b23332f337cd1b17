"""Before anything imports Triton: without a GPU its kernels run in the interpreter (decided when a kernel is decorated)."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch

with suppress(ModuleNotFoundError):  # where only tests without it are run
    from hypothesis import settings

    settings.register_profile("any speed", settings.default, deadline=None)
    settings.load_profile("any speed")

os.environ["TWINWEIGHT_CACHE"] = "off"  # measurements of tests are not kept, and those of others not used

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from triton import language as tl
    from triton.runtime import interpreter

    def _dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
        """The interpreter multiplies the bits of bf16 operands as integers (Triton 3.7): give it fp32, which holds them
        exactly.
        """
        a, b = (self.create_fp_to_fp(t, tl.float32, None) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return _interpreter_dot(self, a, b, d, *settings)

    _interpreter_dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = _dot
