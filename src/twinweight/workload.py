"""`Workload`: how many rows the calls of a server have. What a twin is worth depends on nothing else about the traffic."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from twinweight.errors import ConfigError, reason

DEFAULT_ROWS = 2048
"""A prefill of this many rows stands for a workload that nobody described."""

HEAD_ROWS = 8
"""Rows of an output head's calls, at most: of a prompt it multiplies the last one, and so of a step as many as prompts end."""

_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
_LINE = re.compile(
    rf"^twinweight_calls_total\{{(?P<labels>[^}}]*)\}}[ \t]+(?P<value>{_NUMBER})(?:[ \t]+-?[0-9]+)?[ \t]*$", re.MULTILINE
)
_ROWS = re.compile(r'\brows="([0-9]+)"')
_STEPS = re.compile(
    rf'^vllm:iteration_tokens_total_bucket\{{[^}}]*\ble="({_NUMBER}|\+Inf)"[^}}]*\}}[ \t]+({_NUMBER})', re.MULTILINE
)


@dataclass(frozen=True)
class Workload:
    """calls: (rows M, share of all calls of a weight), by ascending M; the shares add up to 1."""

    calls: tuple[tuple[int, float], ...]

    @staticmethod
    def of(counts: Mapping[int, float]) -> Workload:
        """From calls by number of rows; calls without rows do nothing and are left out. Raises ConfigError for none."""
        used = {m: n for m, n in sorted(counts.items()) if m > 0 and n > 0}
        total = sum(used.values())
        if not used:
            raise ConfigError("the workload has no call of at least one row")
        return Workload(tuple((m, n / total) for m, n in used.items()))

    @staticmethod
    def prefill(rows: int = DEFAULT_ROWS) -> Workload:
        """Nothing but prefills of `rows` tokens, such as a server's chunk (vLLM: max_num_batched_tokens)."""
        return Workload.of({rows: 1.0})

    @staticmethod
    def serving(prompts: Iterable[int], *, output_tokens: int = 0, concurrency: int = 1, chunk: int | None = None) -> Workload:
        """Requests with these prompt lengths, each decoding `output_tokens` in steps that `concurrency` requests share.

        chunk: the most prompt tokens a call; longer prompts take several calls, the last of which has what is left. Decode
        steps are calls of their own here, though chunked prefill puts both into one call.
        Raises ConfigError for sizes below 1 and an empty list.
        """
        lengths = list(prompts)
        if not lengths or min(lengths) < 1 or concurrency < 1 or output_tokens < 0 or (chunk is not None and chunk < 1):
            raise ConfigError(
                f"a workload needs prompts, concurrency and chunk of at least 1 and output tokens of at least 0, found prompts "
                f"{lengths[:3]}, concurrency {concurrency}, chunk {chunk}, output tokens {output_tokens}"
            )
        counts: dict[int, float] = {}
        for length in lengths:
            whole, rest = divmod(length, chunk or length)
            for rows, n in ((chunk or length, whole), (rest, 1)):
                counts[rows] = counts.get(rows, 0) + n
        steps = output_tokens * len(lengths) / concurrency
        counts[concurrency] = counts.get(concurrency, 0) + steps
        return Workload.of(counts)


def from_metrics(file: Path, chunk: int | None = None) -> Workload:
    """What a server saw, from Prometheus text (vLLM's /metrics) or JSON (`paths.calls` as {"int4@16": 123, ...} or
    {"int4": {"16": 123}, ...}, by itself or under "calls").

    Of Prometheus text vLLM's own histogram of tokens a step counts, `vllm:iteration_tokens_total`: replays of CUDA graphs are
    in it, and warming up is not. A step stands for the (geometric) middle of its bucket. vLLM counts a prompt in the step that
    ends it; chunk: the most rows a step, several of which a larger one was. A server without that histogram, or before its
    first step, has `twinweight_calls_total{path=...,rows=...}`, which round rows down to a power of two and lack replays.
    Raises ConfigError where the file holds none of these.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read metrics from {file}: {reason(error)}") from error
    if text.lstrip().startswith("{"):
        counts = _json_counts(text, file)
    else:
        counts = _in_chunks(_step_counts(text), chunk) or _prometheus_counts(text)
    if not all(m < 1 << 32 and n < math.inf for m, n in counts.items()):
        raise ConfigError(f"{file} holds calls of 2^32 rows or more, or endlessly many")
    if not any(m > 0 and n > 0 for m, n in counts.items()):
        raise ConfigError(f"{file} holds no calls: expected lines of twinweight_calls_total, or JSON like {{'int4@16': 123}}")
    return Workload.of(counts)


def _step_counts(text: str) -> dict[int, float]:
    """Steps by tokens, of all engines. Buckets count what is up to their edge."""
    up_to: dict[float, float] = {}
    for edge, value in _STEPS.findall(text):
        up_to[float(edge)] = up_to.get(float(edge), 0) + float(value)
    counts: dict[int, float] = {}
    below, before = 0.0, 0.0
    for edge, total in sorted(up_to.items()):
        least = math.floor(below) + 1
        middle = round(math.sqrt(least * edge)) if edge < math.inf else least
        if total > before:
            counts[middle] = counts.get(middle, 0) + total - before
        below, before = edge, max(before, total)
    return counts


def _in_chunks(steps: Mapping[int, float], chunk: int | None) -> dict[int, float]:
    counts: dict[int, float] = {}
    for m, n in steps.items():
        rows = min(m, chunk or m)
        counts[rows] = counts.get(rows, 0) + n * m / max(rows, 1)
    return counts


def _prometheus_counts(text: str) -> dict[int, float]:
    counts: dict[int, float] = {}
    for line in _LINE.finditer(text):
        if rows := _ROWS.search(line["labels"]):
            m = int(rows[1])
            counts[m] = counts.get(m, 0) + float(line["value"])
    return counts


def _json_counts(text: str, file: Path) -> dict[int, float]:
    """{"int4@16": n}, or by path first: {"int4": {"16": n}}."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    counts: dict[int, float] = {}
    calls = found.get("calls", found)
    for key, value in calls.items() if isinstance(calls, dict) else ():
        rows = value if isinstance(value, dict) else {key.partition("@")[2]: value}
        for m, n in rows.items():
            if not (m.isascii() and m.isdigit()) or isinstance(n, bool) or not isinstance(n, int | float) or n < 0:
                raise ConfigError(f"{file}: found {key!r}: {value!r}, expected calls by path and rows like 'int4@16': 123")
            counts[int(m)] = counts.get(int(m), 0) + n
    return counts
