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


def quality_table(result: dict[str, Any]) -> Group:
    """The table of the demo's first half: perplexity per arm, whether greedy text is equal, and some of that text."""
    table = _table(f"trained model, {result['ppl_tokens']} tokens of held-out text", "paths", "perplexity", "against int4")
    for name, label in (("int4", "int4 only"), ("twin", "twin only"), ("mixed", "both, as in use")):
        value = result[f"ppl_{name}"]
        table.add_row(label, f"{value:.4f}", f"{(value / result['ppl_int4'] - 1) * 100:+.3f} %")
    verdict = "equal under all three" if result["greedy_equal"] else f"differs for {len(result['different'])} prompts"
    prompt, text = next(iter(result["text"].items()))
    return Group(
        table,
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
    table = _table(f"{result['architecture']} on {result['device']}", "weight", "N x K", "twin", "exact")
    for row in result["checked"]:
        table.add_row(row["name"], f"{row['n']} x {row['k']}", row["twin"], "yes" if row["exact"] else "NO")
    text = f"{result['weights']} int4 weights, {result['twins']} twins; logits of one forward pass finite: {result['finite']}"
    return Group(table, Text(text))
