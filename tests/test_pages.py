"""What the pages' sentences say: the numbers of the result, slower as well as faster."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests import reports
from twinweight import pages


def measured() -> dict[str, Any]:
    """A result of `bench` with figures of its own: the record that it is made of may be measured anew."""
    result = reports.bench()
    for arm, ttft, tpot, tokens in (("off", 6317.07, 101.305, 1963951), ("on", 2636.76, 90.668, 1857455)):
        figures = result["arms"][arm]
        figures["ttft_ms"]["median"], figures["tpot_ms"]["median"], figures["kv_cache_tokens"] = ttft, tpot, tokens
    result["ratios"] |= {"ttft": 2.3958, "tpot": 0.895}
    result["noise"] |= {"ttft": 0.9618, "tpot": 0.9203}
    return result


def changed(result: dict[str, Any], **ratios: float) -> dict[str, Any]:
    """A result of `bench` whose arm "on" is off's time over these ratios."""
    for name, gain in ratios.items():
        off, on = (result["arms"][arm][f"{name}_ms"] for arm in ("off", "on"))
        on["median"] = off["median"] / gain
        result["ratios"][name] = gain if name == "ttft" else round(1 / gain, 4)
    return result


def test_bench() -> None:
    assert pages.bench_summary(measured()) == (
        "With twins for 14 of 14 weights the time to first token falls from 6,317 to 2,637 ms (2.40x as fast), the time per "
        "output token falls from 101.3 to 90.7 ms (1.12x as fast), and the KV cache has room for 1,857,455 tokens instead of "
        "1,963,951."
    )


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (2.0, "falls from 6,317 to 3,159 ms (2.00x as fast)"),
        (0.5, "rises from 6,317 to 12,634 ms (2.00x as long)"),
        (1.03, "goes from 6,317 to 6,133 ms, which is within the noise of 3.8 %"),
        (0.97, "goes from 6,317 to 6,512 ms, which is within the noise of 3.8 %"),
    ],
)
def test_slower_and_noise_are_said(gain: float, text: str) -> None:
    assert f"the time to first token {text}" in pages.bench_summary(changed(measured(), ttft=gain))


def test_one_run_has_no_noise_and_no_twin_no_credit() -> None:
    result = changed(measured(), ttft=1.01) | {"noise": None}
    result["arms"]["on"] |= {"twins": 0, "kv_cache_tokens": result["arms"]["off"]["kv_cache_tokens"]}
    del result["ratios"]["tpot"]
    text = pages.bench_summary(result)
    assert text.startswith("No weight got a twin")
    assert "(1.01x as fast)" in text
    assert "per output token" not in text
    assert "1,963,951 tokens, as without them; each was run once, so the noise is not known." in text


def test_vllm() -> None:
    result = reports.served()
    for record, (ttft, tpot) in zip(result["records"], ((2000.0, 42.0), (1000.0, 30.0)), strict=True):
        record |= {"ttft_ms": ttft, "tpot_ms": tpot}
    result["ratios"][0] |= {"ttft": 2.0, "tpot": 0.7143}
    assert pages.served_summary(result) == (
        "With twins for 8 of 8 weights through vLLM 0.32.0 the time to first token falls from 2,000 to 1,000 ms (2.00x as "
        "fast), the time per output token falls from 42.0 to 30.0 ms (1.40x as fast), and the KV cache has room for 131,072 "
        "tokens, as without them."
    )
    several = pages.served_summary(reports.served_at((512, 1), (512, 8), (8192, 1)))
    assert "first token is 0.80x to 1.50x as fast over 3 points, the time per output token is 1.00x as fast" in several


def test_tune() -> None:
    result = reports.tune()
    assert pages.tune_summary(result) == (
        "On AMD EPYC a twin pays on 4 of 4 shapes, from 9 rows; at 512 rows it is 1.35x to 1.60x as fast as the best path "
        "without one."
    )
    for shape in result["shapes"]:
        shape["saved_us"] = dict.fromkeys(shape["saved_us"], 0.0)
    assert pages.tune_summary(result) == "On AMD EPYC a twin pays on none of 4 shapes at any size measured."


def test_plan() -> None:
    result = reports.plan()
    soft = result["modes"]["soft"]
    text = pages.plan_summary(result, "soft")
    for figure in (
        f"{soft['twins']} of 128",
        f"{soft['kv_tokens']:,} of {result['modes']['off']['kv_tokens']:,}",
        "by a roofline",
    ):
        assert figure in text
    large = pages.plan_summary(reports.plan("rtx4090", "llama-3.3-70b"), "hard")
    assert re.fullmatch(r"Mode hard does not fit llama-3.3-70b on 1 x RTX 4090: \d+\.\d GiB are missing on each GPU\.", large)


def test_roofline() -> None:
    assert pages.roofline_summary(reports.traced("h200-eager-on")) == (
        "Of 7.44 ms of GPU time 32.0 % went to gemm in decode, at 83 % of the roof, 28.6 % went to w4a16 in decode, at 33 % "
        "of the roof, and 100.0 % is attributed to an op or a known kernel."
    )
    assert pages.changes_summary(reports.traced("h200-graphs-off", "h200-graphs-on")) == (
        "From h200-graphs-off.json.gz to h200-graphs-on.json.gz, GPU time: all 38.6 ms to 38.2 ms (1.01x as fast), prefill "
        "13.4 ms to 12.2 ms (1.10x as fast), and decode 25.2 ms to 26.1 ms (1.03x as long)."
    )


def test_demo() -> None:
    made = pages.demo_page(reports.demo())
    assert "perplexity is 7.8156 on int4 and 7.8155 with twins as in use, with equal greedy text" in made.summary
    assert "6,968 to 3,673 ms (1.90x as fast)" in made.summary
    different = reports.demo()
    different["quality"] |= {"greedy_equal": False, "different": ["a"]}
    assert "greedy text that differs for 1 prompts" in pages.demo_page(different).summary
