"""`roofline` from files to a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twinweight import gpus
from twinweight.errors import ConfigError
from twinweight.gpus import Gpu
from twinweight.roofline.attributing import Attributed, attribute
from twinweight.roofline.comparing import compare
from twinweight.roofline.ops import KINDS
from twinweight.roofline.reading import read
from twinweight.roofline.summary import summarise
from twinweight.roofs import roof_by_name

PHASES = ("all", "prefill", "decode", "other")
REFERENCE = ".eager"
"""What stands before the suffix of a trace that was recorded without graphs: on.json.gz has its ops from on.eager.json.gz."""

Step = Callable[[str, float], None]


def roofline(
    traces: Sequence[Path],
    *,
    gpu: str | None = None,
    gpu_table: Path | None = None,
    kind: str = "all",
    phase: str = "all",
    top: int | None = None,
    reference: Path | None = None,
    progress: Step | None = None,
) -> dict[str, Any]:
    """Analyse one trace (`summary.summarise`), or two: {"before", "after", "diff"}, the first being before.

    A directory stands for the traces in it, the ranks of one run; one that `profile` wrote for the two in it. gpu: a name of
    `roofs.roof_by_name`; None takes the one that the trace names, if the table has it. reference: a trace of the same model
    without graphs; None takes NAME.eager.json(.gz) beside it.
    Raises ConfigError for bad settings and TraceError for a file that is no trace.
    """
    if not 1 <= len(traces) <= 2:
        raise ConfigError(f"{len(traces)} traces given, expected one, or two to compare")
    wanted, when = kind.lower(), phase.lower()
    if wanted not in ("all", *KINDS):
        raise ConfigError(f"--kind is {kind!r}, expected all, {', '.join(KINDS)}")
    if when not in PHASES:
        raise ConfigError(f"--phase is {phase!r}, expected {', '.join(PHASES)}")
    if gpu_table is not None:
        gpus.load(gpu_table)  # a bad table is one whether or not a trace needs it
    roof = roof_by_name(gpu, gpu_table) if gpu is not None else None
    traces = _profiled(traces[0]) if len(traces) == 1 else traces
    results = []
    for path in traces:
        found = [_attributed(file, reference, progress) for file in files(path)]
        device = roof or _named(found, gpu_table)
        results.append(summarise(found, device, kind=wanted, phase=when, top=top if len(traces) == 1 else None))
    if len(results) == 1:
        return results[0]
    return {"before": results[0], "after": results[1], "diff": compare(*results)}


def _profiled(path: Path) -> list[Path]:
    """What `profile` wrote into a directory, off before on: files, or of several ranks directories; else the path alone."""
    arms = [[p for p in (path / name, path / f"{name}.json", path / f"{name}.json.gz") if p.exists()] for name in ("off", "on")]
    return [found[0] for found in arms] if all(arms) else [path]


def files(path: Path) -> list[Path]:
    """The traces that a path stands for. Raises ConfigError where there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.name.endswith((".json", ".json.gz")) and _reference_stem(p) is None)
    if not found:
        raise ConfigError(f"no *.json or *.json.gz in {path}")
    return found


def _attributed(path: Path, reference: Path | None, progress: Step | None) -> Attributed:
    beside = reference or _beside(path)
    other = attribute(read(beside, _shown(beside, progress))) if beside is not None else None
    return attribute(read(path, _shown(path, progress)), other)


def _shown(path: Path, progress: Step | None) -> Callable[[float], None] | None:
    return None if progress is None else lambda share: progress(path.name, share)


def _beside(path: Path) -> Path | None:
    """NAME.eager.json beside NAME.json, or of a rank, DIR.eager/NAME.json beside DIR/NAME.json."""
    if _reference_stem(path) is not None:
        return None
    stem, dot, suffix = path.name.partition(".json")
    parent = path.absolute().parent
    beside = (path.with_name(f"{stem}{REFERENCE}{dot}{suffix}"), Path(f"{parent}{REFERENCE}") / path.name)
    return next((p for p in beside if dot and p.exists()), None)


def _reference_stem(path: Path) -> str | None:
    stem = path.name.partition(".json")[0]
    return stem.removesuffix(REFERENCE) if stem.endswith(REFERENCE) else None


def _named(found: Sequence[Attributed], table: Path | None) -> Gpu | None:
    name = next((a.device for a in found if a.device), "")
    try:
        return gpus.gpu(name, table) if name else None
    except ConfigError:
        return None
