"""What each kind of twin costs the trained model that ships: perplexity, divergence from int4, equal first choices.

    python benchmarks/quality.py OUT.json [--model models/stdlib-15m] [--tokens N]

Every call is on the twin, or by the 8 bits of the output head, decode included: the most it can cost. e4m3 kinds are emulated
where there is no GPU for them. int4's own loss against the unquantized model, which does not ship, is what
`models/quantize.py` recorded on the same text.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import twinweight
from twinweight import twin
from twinweight.bench import environment
from twinweight.quality import arm, distance, lossy, twins_of
from twinweight.rounded import Rounded

MODEL = Path(__file__).parents[1] / "models" / "stdlib-15m"


def with_rounded_head(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """`distance` of int4 with every row through the 8 bits of the output head."""
    head = model.get_output_embeddings()
    exact, bits = head.forward, Rounded(head.weight)

    @contextmanager
    def going_by(forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        before, head.forward = head.forward, forward
        try:
            yield
        finally:
            head.forward = before

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return bits(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    with arm(model, "int4"), going_by(rounded):
        return distance(model, ids, without=lambda: going_by(exact))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--model", type=Path, default=MODEL)
    p.add_argument("--tokens", type=int, help="of the held-out text; default: all")
    p.add_argument("--device")
    a = p.parse_args()
    model = twinweight.load(a.model, mode="off", device=a.device)
    text = (a.model / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(a.model)(text)["input_ids"])[: a.tokens]
    with arm(model, "int4"):
        records = [{"kind": "int4", "emulated": False, **distance(model, ids)}]
    for kind in twin.dense_kinds(model.dtype, model.device):
        with twins_of(model, kind):
            records.append({"kind": kind, "emulated": False, **distance(model, ids)})
    records += lossy(model, ids, tuple(twin.LOSSY))
    records.append({"kind": "head int8", "emulated": False, **with_rounded_head(model, ids)})
    for record in records:
        print(record)
    recorded = json.loads((a.model / "train.json").read_text())["shipped_text"]
    result = {
        "command": f"python benchmarks/quality.py OUT.json{f' --tokens {a.tokens}' if a.tokens else ''}",
        "environment": environment(model), "tokens": len(ids), "records": records, "unquantized": recorded,
    }  # fmt: skip
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
