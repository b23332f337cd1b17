"""What a server's calls look like, from settings and from its counters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from twinweight.errors import ConfigError
from twinweight.workload import Workload, from_metrics


def test_shares_add_up_and_rows_ascend() -> None:
    assert Workload.of({2048: 3, 1: 1, 0: 7, 5: 0}).calls == ((1, 0.25), (2048, 0.75))
    assert Workload.prefill(8192).calls == ((8192, 1.0),)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompts": [1000]}, {1000: 1}),
        ({"prompts": [1000], "chunk": 2048}, {1000: 1}),
        ({"prompts": [5000], "chunk": 2048}, {2048: 2, 904: 1}),
        ({"prompts": [4096, 100], "chunk": 2048}, {2048: 2, 100: 1}),
        ({"prompts": [100], "output_tokens": 32}, {100: 1, 1: 32}),
        ({"prompts": [100, 100], "output_tokens": 32, "concurrency": 8}, {100: 2, 8: 8}),
    ],
)
def test_requests_become_calls(options: dict[str, object], expected: dict[int, float]) -> None:
    assert Workload.serving(**options) == Workload.of(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": []},
        {"prompts": [0]},
        {"prompts": [5], "chunk": 0},
        {"prompts": [5], "concurrency": 0},
        {"prompts": [5], "output_tokens": -1},
    ],
)
def test_bad_requests_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Workload.serving(**options)  # type: ignore[arg-type]


PROMETHEUS = """# HELP twinweight_calls_total Linear calls by path and rows.
# TYPE twinweight_calls_total counter
twinweight_calls_total{engine="0",path="int4",rank="0",rows="1"} 100.0
twinweight_calls_total{path="twin",rows="2048",rank="0"} 2e2
twinweight_calls_total{path="twin",rows="2048",rank="1"} 100
twinweight_calls_created{path="twin",rows="2048",rank="1"} 1.7e9
twinweight_bytes{rank="0"} 12
vllm:num_requests_running{rows="64"} 3
"""


@pytest.mark.parametrize(
    "text",
    [
        PROMETHEUS,
        json.dumps({"int4@1": 100, "twin@2048": 200, "fused@2048": 100, "int4@0": 3}),
        json.dumps({"calls": {"int4@1": 100, "twin@2048": 300}, "other": 1}),
        json.dumps({"calls": {"int4": {"1": 100}, "twin": {"2048": 300}}}),
    ],
    ids=["prometheus", "flat", "under calls", "by path"],
)
def test_counters_are_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(text)
    assert from_metrics(tmp_path / "m").calls == ((1, 0.25), (2048, 0.75))


STEPS = (
    "".join(
        f'vllm:iteration_tokens_total_bucket{{engine="{engine}",le="{edge}",model_name="m"}} {total}\n'
        for engine, totals in (("0", (80, 80, 90, 90, 96, 96)), ("1", (0, 4, 4, 4, 4, 4)))
        for edge, total in zip(("1.0", "8.0", "16.0", "4096.0", "16384.0", "+Inf"), totals, strict=True)
    )
    + 'vllm:iteration_tokens_total_count{engine="0",model_name="m"} 96.0\n'
)


def test_steps_of_vllm_count_before_calls_that_lack_replays(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(PROMETHEUS + STEPS)
    assert from_metrics(tmp_path / "m").calls == ((1, 0.8), (4, 0.04), (12, 0.1), (8193, 0.06))
    (tmp_path / "m").write_text(PROMETHEUS + re.sub(r"} \d+\n", "} 0\n", STEPS))
    assert from_metrics(tmp_path / "m").calls == ((1, 0.25), (2048, 0.75))


def test_steps_of_more_rows_than_a_chunk_were_several(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(STEPS)
    calls = dict(from_metrics(tmp_path / "m", chunk=2048).calls)
    assert calls[2048] / calls[1] == pytest.approx(6 * 8193 / 2048 / 80)
    assert max(calls) == 2048


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no calls"),
        ("vllm:num_requests_running 3\n", "no calls"),
        ("{}", "no calls"),
        ('{"int4@0": 3}', "no calls"),
        ("{nonsense", "not JSON"),
        ('{"int4": 3}', "int4@16"),
        ('{"int4@x": 3}', "int4@16"),
        ('{"int4@1": "3"}', "int4@16"),
        ('{"calls": 3}', "no calls"),
        ('{"int4@²": 100}', "int4@16"),
        ('{"int4@1": 1e400}', "endlessly"),
        ('{"int4@' + "9" * 300 + '": 1}', "rows or more"),
        ('twinweight_calls_total{path="int4",rows="1"} 1..2', "no calls"),
        ('twinweight_calls_total{path="int4",rows="1"} e', "no calls"),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_metrics(tmp_path / "m")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-here"):
        from_metrics(tmp_path / "nothing-here")
