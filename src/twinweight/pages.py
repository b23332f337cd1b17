"""What each command's page says, from the dictionaries that `--json` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twinweight import report
from twinweight.page import Page, Section
from twinweight.plots.canvas import duration
from twinweight.table import GIB

_TTFT, _TPOT = "the time to first token", "the time per output token"


def bench_page(result: dict[str, Any]) -> Page:
    """`bench` of either engine."""
    served = "records" in result
    model = result["records"][0]["model"] if served else result["environment"]["model"]
    summary = served_summary(result) if served else bench_summary(result)
    return Page(f"bench: {model}, twins off and on", summary, (_bench(result),), result["environment"], result["command"])


def tune_page(result: dict[str, Any]) -> Page:
    """`tune`."""
    from twinweight.plots.tune import panels

    shapes = result["shapes"]
    routes = (f"{s['n']} x {s['k']}\n{report.tune_routes(s)}" for s in shapes)
    sections = (
        Section.of("Time against rows, by path", panels(result)),
        Section.of("Which path from how many rows", *routes, *report.tune_closing(result)),
        Section.of("Times", *map(report.tune_shape, shapes)),
    )
    device = result["device"]
    facts = {"device": device["name"], "threads": device.get("threads"), **result["environment"]}
    return Page(f"tune: {result['model']}", tune_summary(result), sections, facts, result["command"])


def plan_page(result: dict[str, Any], only: str | None = None) -> Page:
    """`plan`. only: the mode that was asked for."""
    from twinweight.plots.plan import panels

    sections = (Section.of("Memory by mode", panels(result)), Section.of("The arithmetic", report.plan_table(result, only)))
    figures = {f"{what} of the {result['gpu']}": source for what, source in result["speed"]["figures"].items()}
    facts = {**figures, **result["environment"]}
    title = f"plan: {result['model']} on {result['tp']} x {result['gpu']}"
    return Page(title, plan_summary(result, only or "soft"), sections, facts, result["command"])


def roofline_page(result: dict[str, Any], top: int) -> Page:
    """`roofline` of one trace or two, with `top` ops."""
    from twinweight.plots.roofline import panels
    from twinweight.roofline.tables import render

    sections = (
        Section.of("Against the roof, and where the time went", panels(result)),
        Section.of("By kind and by op", render(result, by_op=True, top=top)),
    )
    two = "diff" in result
    first = result["before"] if two else result
    title = f"roofline: {first['trace']}" + (f" and {result['after']['trace']}" if two else "")
    facts = {"recorded on": first["device"] or None, **result["environment"]}
    if first["gpu"] is not None:
        facts |= {f"roof, {what}": source for what, source in first["gpu"]["source"].items()}
    summary = changes_summary(result) if two else roofline_summary(result)
    return Page(title, summary, sections, facts, result["command"])


def demo_page(result: dict[str, Any]) -> Page:
    """`demo`: quality of the trained model, then `bench` of the shape."""
    quality, bench = result["quality"], result["bench"]
    text = (
        "equal greedy text" if quality["greedy_equal"] else f"greedy text that differs for {len(quality['different'])} prompts"
    )
    summary = (
        f"On the trained model perplexity is {quality['ppl_int4']:.4f} on int4 and {quality['ppl_mixed']:.4f} with twins as in "
        f"use, with {text}. On the shape of Qwen3-0.6B: {_lower(bench_summary(bench))}"
    )
    sections = (Section.of("Quality of the trained model", report.quality_table(quality)), _bench(bench, "Speed, off and on"))
    return Page("demo: what a twin buys and what it costs", summary, sections, result["environment"], result["command"])


def _bench(result: dict[str, Any], title: str = "Off and on") -> Section:
    from twinweight.plots.bench import panels

    found = report.vllm_bench_table(result) if "records" in result else report.bench_table(result)
    return Section.of(title, panels(result), found)


# --- a sentence each ---


def bench_summary(result: dict[str, Any]) -> str:
    """`bench --engine hf`: both times and what memory is left."""
    off, on = result["arms"]["off"], result["arms"]["on"]
    noise, ratios = result["noise"] or {}, result["ratios"]
    parts = [_change(_TTFT, off["ttft_ms"]["median"], on["ttft_ms"]["median"], ratios["ttft"], noise.get("ttft"))]
    if "tpot" in ratios:
        medians = off["tpot_ms"]["median"], on["tpot_ms"]["median"]
        parts.append(_change(_TPOT, *medians, 1 / ratios["tpot"], noise.get("tpot")))
    parts.append(_kept(off["kv_cache_tokens"], on["kv_cache_tokens"]))
    return f"{_with(on)} {_and(parts)}{'' if result['noise'] else '; each was run once, so the noise is not known'}."


def served_summary(result: dict[str, Any]) -> str:
    """`bench --engine vllm`: both times, or how they range over the points."""
    off, on, ratios = result["arms"]["off"], result["arms"]["on"], result["ratios"]
    if len(ratios) == 1:
        by_mode = {r["mode"]: r for r in result["records"]}
        noise = result["noise"][0] if result["noise"] else {}
        parts = [
            _change(name, by_mode["off"][key], by_mode["on"][key], gain, noise.get(ratio))
            for name, key, ratio, gain in (
                (_TTFT, "ttft_ms", "ttft", ratios[0]["ttft"]), (_TPOT, "tpot_ms", "tpot", 1 / ratios[0]["tpot"])
            )
        ]  # fmt: skip
    else:
        gains = ([r["ttft"] for r in ratios], [1 / r["tpot"] for r in ratios])
        parts = [
            f"{name} is {_span(found, '{:.2f}x')} as fast{where}"
            for name, found, where in zip((_TTFT, _TPOT), gains, (f" over {len(ratios)} points", ""), strict=True)
        ]
    parts.append(_kept(off["kv_tokens"], on["kv_tokens"]))
    return f"{_with(on)} through vLLM {result['environment']['vllm']} {_and(parts)}."


def tune_summary(result: dict[str, Any]) -> str:
    """`tune`: from where twins pay, and how much at the most rows."""
    from twinweight.plots.tune import best_form

    starts, gains, most = [], [], 0
    for shape in result["shapes"]:
        pieces = dict(reversed(piece.split(" from M=")) for piece in shape["routes"][best_form(shape)].split(", "))
        start = next((int(m) for m, path in pieces.items() if path == "twin"), None)
        if start is None:
            continue
        last = shape["points"][-1]
        plain = min(us for choice, us in last["us"].items() if not choice.startswith("twin"))
        starts.append(start)
        gains.append(plain / last["us"][f"twin:{best_form(shape)}"])
        most = max(most, last["m"])
    where, shapes = result["device"]["name"], len(result["shapes"])
    if not starts:
        return f"On {where} a twin pays on none of {shapes} shapes at any size measured."
    return (
        f"On {where} a twin pays on {len(starts)} of {shapes} shapes, from {_span(starts, '{}')} rows; at {most} rows it is "
        f"{_span(gains, '{:.2f}x')} as fast as the best path without one."
    )


def plan_summary(result: dict[str, Any], mode: str) -> str:
    """`plan`: what one mode gives."""
    off, found = result["modes"]["off"], result["modes"][mode]
    where = f"{result['tp']} x {result['gpu']}"
    if not found["fits"]:
        missing = f"{found['missing_bytes'] / GIB:.1f} GiB are missing on each GPU"
        return f"Mode {mode} does not fit {result['model']} on {where}: {missing}."
    speed = ""
    if found["prefill_tok_s"] and off["prefill_tok_s"]:
        source = "a roofline" if result["speed"]["source"] == "roofline" else "stored measurements"
        speed = f"; by {source} prefill runs at {found['prefill_tok_s']:,} tok/s instead of {off['prefill_tok_s']:,}"
    size, room = f"{found['twin_bytes'] / GIB:.1f} GiB on each GPU", f"{found['kv_tokens']:,} of {off['kv_tokens']:,}"
    return (
        f"In mode {mode} on {where}, {found['twins']} of {found['weights']} weights of {result['model']} get a twin ({size}), "
        f"which leaves {room} KV tokens{speed}."
    )


def roofline_summary(result: dict[str, Any]) -> str:
    """`roofline` of one trace: where most of the time went."""
    parts = []
    for row in result["kinds"][:2]:
        roof = f", at {row['roof_pct']:.0f} % of the roof" if row["roof_pct"] is not None else ""
        parts.append(f"{row['share'] * 100:.1f} % went to {row['kind']} in {row['phase']}{roof}")
    known = f"{result['attributed'] * 100:.1f} % is attributed to an op or a known kernel"
    return f"Of {duration(result['device_time_us'])} of {result['on'].upper()} time {_and([*parts, known])}."


def changes_summary(result: dict[str, Any]) -> str:
    """`roofline` of two traces: time by phase, before and after."""
    before, after = result["before"], result["after"]
    times = {side: {p["phase"]: p["time_us"] for p in result[side]["phases"]} for side in ("before", "after")}
    parts = [_times("all", before["device_time_us"], after["device_time_us"])]
    parts += [
        _times(phase, times["before"][phase], times["after"][phase])
        for phase in ("prefill", "decode")
        if times["before"].get(phase) and times["after"].get(phase)
    ]
    return f"From {before['trace']} to {after['trace']}, {before['on'].upper()} time: {_and(parts)}."


# --- words ---


def _with(on: dict[str, Any]) -> str:
    twins, weights = on["twins"], on["weights"]
    return f"With twins for {twins} of {weights} weights" if twins else "No weight got a twin, and with the rest switched on"


def _change(name: str, off: float, on: float, gain: float, noise: float | None) -> str:
    """In words, slower too. noise: off against itself, as a ratio."""
    both = f"{_ms(off)} to {_ms(on)} ms"
    if noise is not None and abs(gain - 1) <= abs(noise - 1):
        return f"{name} goes from {both}, which is within the noise of {abs(noise - 1) * 100:.1f} %"
    if gain >= 1:
        return f"{name} falls from {both} ({gain:.2f}x as fast)"
    return f"{name} rises from {both} ({1 / gain:.2f}x as long)"


def _kept(off: int, on: int) -> str:
    return f"the KV cache has room for {on:,} tokens" + (f" instead of {off:,}" if on != off else ", as without them")


def _times(name: str, before: float, after: float) -> str:
    change = f"{before / after:.2f}x as fast" if after <= before else f"{after / before:.2f}x as long"
    return f"{name} {duration(before)} to {duration(after)} ({change})"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _and(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f", and {parts[-1]}" if len(parts) > 2 else " and ".join(parts)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
