"""`expand` equals `Int4Weight.dequantize` bit for bit, and touches nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import CASES, DEVICE, EXPAND_TILES, Case
from twinweight.kernels import gpu
from twinweight.kernels.expand import expand
from twinweight.kernels.forms import ExpandTiles
from twinweight.kernels.prepared import KernelWeight

UNIQUE = list({(c.n, c.k, c.group_size): c for c in CASES}.values())


@pytest.mark.parametrize("tiles", EXPAND_TILES.values(), ids=EXPAND_TILES.keys())
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("case", UNIQUE, ids=str)
def test_equals_dequantize(case: Case, gap: int, tiles: ExpandTiles | None) -> None:
    w, k = case.weight(), gpu.prepare(case.weight())
    buffer = torch.full((case.n, case.k + gap), float("nan"), dtype=case.dtype, device=DEVICE)
    expand(k.packed, k.scales, k.zeros, None, buffer[:, : case.k], group_size=w.group_size, tiles=tiles)
    assert torch.equal(buffer[:, : case.k], w.dequantize(case.dtype))
    assert bool(buffer[:, case.k :].isnan().all())


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(("k", "group_size"), [(160, 32), (320, 64)])
def test_act_order(k: int, group_size: int, index: torch.dtype) -> None:
    w = Case(0, 33, k, group_size, torch.float16, symmetric=False).weight(act_order=True)
    p = gpu.prepare(w)
    assert p.perm is not None
    out = torch.empty(w.shape, dtype=torch.float16, device=DEVICE)
    expand(p.packed, p.scales, p.zeros, p.perm.to(index), out, group_size=group_size)
    assert torch.equal(out, w.dequantize(torch.float16))


@pytest.mark.parametrize("rows", [(0, 0), (0, 5), (16, 40), (39, 40)])
def test_some_rows(rows: tuple[int, int]) -> None:
    w = Case(0, 40, 128, 32, symmetric=False).weight()
    p = gpu.prepare(w)
    out = torch.empty((rows[1] - rows[0], 128), dtype=torch.bfloat16, device=DEVICE)
    expand(p.packed, p.scales, p.zeros, None, out, group_size=32, rows=rows)
    assert torch.equal(out, w.dequantize(torch.bfloat16)[slice(*rows)])


def _call(w: KernelWeight, **change: object) -> None:
    arguments: dict[str, object] = {"perm": None, "out": torch.empty(w.n, w.k, dtype=torch.bfloat16, device=DEVICE), **change}
    expand(w.packed, w.scales, w.zeros, group_size=32, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"out": torch.empty(40, 128)}, "out"),
        ({"out": torch.empty(41, 128, dtype=torch.bfloat16)}, "out"),
        ({"out": torch.empty(128, dtype=torch.bfloat16, device=DEVICE).expand(40, 128)}, "row stride"),
        ({"perm": torch.arange(127)}, "perm"),
        ({"rows": (3, 41)}, "rows"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, object], named: str) -> None:
    w = gpu.prepare(Case(0, 40, 128, 32).weight())
    with pytest.raises(ValueError, match=named):
        _call(w, **{name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in change.items()})
