"""One arm of a benchmark, before vLLM starts: what it sets, and what it leaves. Needs no vLLM."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from twinweight.engines.vllm import arm


class Started(Exception):
    """vLLM would start now."""


def start(**llm: Any) -> None:
    raise Started


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("0", "0")])
def test_servers_to_compare_compile_alike_unless_the_environment_says_otherwise(
    given: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    environ = {} if given is None else {arm.DETERMINISTIC: given}
    monkeypatch.setattr(arm.os, "environ", environ)
    with pytest.raises(Started):
        arm.run(arm.Job({"model": "none"}, arm.Workload(((8, 1),))))
    assert environ[arm.DETERMINISTIC] == seen
    assert environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
