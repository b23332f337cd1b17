"""The tables that commands print: rich renderables from the dictionaries that `--json` writes."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_GIB = 1 << 30


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return table


def bench_table(result: dict[str, Any]) -> Group:
    """The table of `bench`: a row a figure, off and on, with the ratio and the noise of off against itself."""
    off, on = result["arms"]["off"], result["arms"]["on"]
    ratios, noise, work = result["ratios"], result["noise"] or {}, result["workload"]
    image = f", image {work['image'][0]}x{work['image'][1]}" if work["image"] else ""
    load = f"{work['prompt_tokens']} tokens in, {work['output_tokens']} out, batch {work['batch']}{image}"
    title = f"{result['environment']['model']}: {load}"
    table = _table(title, "", "off", "on", "gain", "noise")
    for key, label, digits in (
        ("ttft_ms", "TTFT (ms)", 1),
        ("prefill_tok_s", "prefill (tok/s)", 0),
        ("tpot_ms", "TPOT (ms)", 2),
        ("e2e_ms", "end to end (ms)", 0),
    ):
        if off[key] is None:
            continue
        ratio = {"ttft_ms": "ttft", "prefill_tok_s": "ttft", "tpot_ms": "tpot", "e2e_ms": "e2e"}[key]
        gain = 1 / ratios[ratio] if ratio == "tpot" else ratios[ratio]
        drift = abs(noise[ratio] - 1) * 100 if ratio in noise else None
        cells = [f"{arm[key]['median']:,.{digits}f}" for arm in (off, on)]
        table.add_row(label, *cells, f"{gain:.2f}x", f"{drift:.1f} %" if drift is not None else "")
    table.add_row("KV cache (GiB)", f"{off['kv_cache_gib']:,.2f}", f"{on['kv_cache_gib']:,.2f}", "", "")
    table.add_row("KV cache (tokens)", f"{off['kv_cache_tokens']:,}", f"{on['kv_cache_tokens']:,}", "", "")
    table.add_row("twins (GiB)", f"{off['twin_gib']:.3f}", f"{on['twin_gib']:.3f}", "", "")
    table.add_row("weights with a twin", f"{off['twins']} of {off['weights']}", f"{on['twins']} of {on['weights']}", "", "")
    lines = [f"  {shape}: {route}" for shape, route in result["routes"].items()]
    return Group(table, Text("paths by rows (M), per shape:"), Text("\n".join(lines)))


_ARMS = (("int4", "int4 only"), ("twin", "twin only"), ("mixed", "both, as in use"))


def quality_table(result: dict[str, Any]) -> Group:
    """The table of the demo's first half: perplexity per arm, whether greedy text is equal, and some of that text."""
    title = f"trained model, {result['ppl_tokens']} tokens of held-out text"
    table = _table(title, "paths", "perplexity", "to int4", "KL (nats)", "top-1 equal")
    rows = [(label, {key: result[f"{key}_{name}"] for key in ("ppl", "kl", "top1")}) for name, label in _ARMS]
    rows += [(f"{row['kind']} twin only{' *' if row['emulated'] else ''}", row) for row in result["lossy"]]
    for label, row in rows:
        change = f"{(row['ppl'] / result['ppl_int4'] - 1) * 100:+.3f} %"
        table.add_row(label, f"{row['ppl']:.4f}", change, f"{row['kl']:.6f}", f"{row['top1'] * 100:.2f} %")
    notes = ["* emulated: this device has no such product"] if any(row["emulated"] for row in result["lossy"]) else []
    if (cost := result["int4_cost"]) is not None:
        change = f"{(cost['ppl_int4'] / cost['ppl_bf16'] - 1) * 100:+.2f} %"
        notes.append(f"int4 itself, against the unquantized model over {cost['tokens']} tokens (train.json): {change}")
    verdict = "equal under all three" if result["greedy_equal"] else f"differs for {len(result['different'])} prompts"
    prompt, text = next(iter(result["text"].items()))
    return Group(
        table,
        *map(Text, notes),
        Text(f"greedy text of {len(result['text'])} prompts: {verdict}; least lead {result['margin']:.2f}; one:"),
        Text(prompt + text, style="dim"),
    )


def inspect_table(result: dict[str, Any]) -> Group:
    """The table of `inspect`: a row a distinct shape."""
    title = f"{result['architecture']}, {result['format']}, {result['weights']} int4 weights"
    table = _table(title, "N x K", "weights", "group", "int4 (GiB)", "bf16 twins (GiB)")
    for row in result["shapes"]:
        kind = f"{row['group_size']}{'' if row['symmetric'] else ' asym'}{' act-order' if row['act_order'] else ''}"
        table.add_row(
            f"{row['n']} x {row['k']}",
            str(row["count"]),
            kind,
            f"{row['int4_bytes'] / _GIB:.3f}",
            f"{row['twin_bytes'] / _GIB:.3f}",
        )
    total = f"int4 {result['int4_bytes'] / _GIB:.3f} GiB, dense tensors {result['dense_bytes'] / _GIB:.3f} GiB"
    twins = f"all bf16 twins {result['twin_bytes'] / _GIB:.3f} GiB, KV cache {result['kv_bytes_per_token']:,} bytes a token"
    return Group(table, Text(total), Text(twins))


def check_table(result: dict[str, Any]) -> Group:
    """The table of `load-check`: a row a distinct shape that was checked."""
    table = _table(f"{result['architecture']} on {result['device']}", "weight", "N x K", "twin", "exact", "rounded")
    for row in result["checked"]:
        table.add_row(
            row["name"],
            f"{row['n']} x {row['k']}",
            row["twin"],
            "yes" if row["exact"] else "NO",
            f"{row['rounded'] * 100:.2f} %" if row["rounded"] else "",
        )
    text = f"{result['weights']} int4 weights, {result['twins']} twins; logits of one forward pass finite: {result['finite']}"
    return Group(table, Text(text))


def vllm_bench_table(result: dict[str, Any]) -> Group:
    """The table of `bench --engine vllm`: a row a point of the workload, off and on, with the gain."""
    work, off, on = result["workload"], result["arms"]["off"], result["arms"]["on"]
    records = {(r["mode"], r["prompt_tokens"], r["concurrency"]): r for r in result["records"]}
    title = f"{result['records'][0]['model']}: {work['output_tokens']} tokens out, vLLM {result['environment']['vllm']}"
    table = _table(title, "prompt", "at once", "TTFT off", "on (ms)", "gain", "TPOT off", "on (ms)", "gain")
    for ratio in result["ratios"]:
        point = ratio["prompt_tokens"], ratio["concurrency"]
        arms = [records[arm, *point] for arm in ("off", "on")]
        ttft, tpot = ([f"{r[key]:,.{digits}f}" for r in arms] for key, digits in (("ttft_ms", 1), ("tpot_ms", 2)))
        gains = (f"{ratio['ttft']:.2f}x", f"{1 / ratio['tpot']:.2f}x")
        table.add_row(f"{point[0]:,}", str(point[1]), *ttft, gains[0], *tpot, gains[1])
    lines = []
    if result["noise"]:
        drift = {key: max(abs(n[key] - 1) for n in result["noise"]) * 100 for key in ("ttft", "tpot")}
        lines.append(f"noise, off against itself: TTFT up to {drift['ttft']:.1f} %, TPOT up to {drift['tpot']:.1f} %")
    twins = f"{on['twins']} of {on['weights']} weights have a twin, {on['twin_gib']:.3f} GiB a rank"
    lines += [
        f"KV cache: {off['kv_tokens']:,} tokens off, {on['kv_tokens']:,} on",
        f"start-up: {off['startup_s']} s off, {on['startup_s']} s on",
        f"{twins}; paths by rows (M), per shape:",
        *(f"  {shape}: {route}" for shape, route in on["routes"].items()),
    ]
    return Group(table, Text("\n".join(lines)))
