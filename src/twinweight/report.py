"""The tables that commands print and pages show, from the dictionaries that `--json` writes."""

from __future__ import annotations

from typing import Any

from twinweight.plan import NONE_PAYS
from twinweight.table import Report, Table, gib, per_item

Row = tuple[str, ...]


def bench_table(result: dict[str, Any]) -> Report:
    """The table of `bench`: a row a figure, off and on, with the ratio and the noise of off against itself."""
    off, on = result["arms"]["off"], result["arms"]["on"]
    ratios, noise, work = result["ratios"], result["noise"] or {}, result["workload"]
    image = f", image {work['image'][0]}x{work['image'][1]}" if work["image"] else ""
    load = f"{work['prompt_tokens']} tokens in, {work['output_tokens']} out, batch {work['batch']}{image}"
    rows: list[Row] = []
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
        drift = f"{abs(noise[ratio] - 1) * 100:.1f} %" if ratio in noise else ""
        rows.append((label, *(f"{arm[key]['median']:,.{digits}f}" for arm in (off, on)), f"{gain:.2f}x", drift))
    for label, cells in (
        ("KV cache (GiB)", [f"{arm['kv_cache_gib']:,.2f}" for arm in (off, on)]),
        ("KV cache (tokens)", [f"{arm['kv_cache_tokens']:,}" for arm in (off, on)]),
        ("twins (GiB)", [f"{arm['twin_gib']:.3f}" for arm in (off, on)]),
        ("weights with a twin", [f"{arm['twins']} of {arm['weights']}" for arm in (off, on)]),
    ):
        rows.append((label, *cells, "", ""))
    table = Table(f"{result['environment']['model']}: {load}", ("", "off", "on", "gain", "noise"), tuple(rows))
    return Report((table, _routes("paths by rows (M), per shape:", result["routes"])))


def _routes(title: str, routes: dict[str, str]) -> str:
    return "\n".join([title, *(f"  {shape}: {route}" for shape, route in routes.items())])


_ARMS = (("int4", "int4 only"), ("twin", "twin only"), ("mixed", "both, as in use"))


def quality_table(result: dict[str, Any]) -> Report:
    """The table of the demo's first half: perplexity per arm, whether greedy text is equal, and some of that text."""
    arms = [(label, {key: result[f"{key}_{name}"] for key in ("ppl", "kl", "top1")}) for name, label in _ARMS]
    arms += [(f"{row['kind']} twin only{' *' if row['emulated'] else ''}", row) for row in result["lossy"]]
    rows = tuple(
        (
            label, f"{row['ppl']:.4f}", f"{(row['ppl'] / result['ppl_int4'] - 1) * 100:+.3f} %", f"{row['kl']:.6f}",
            f"{row['top1'] * 100:.2f} %",
        )
        for label, row in arms
    )  # fmt: skip
    title = f"trained model, {result['ppl_tokens']} tokens of held-out text"
    table = Table(title, ("paths", "perplexity", "to int4", "KL (nats)", "top-1 equal"), rows)
    notes = ["* emulated: this device has no such product"] if any(row["emulated"] for row in result["lossy"]) else []
    if (cost := result["int4_cost"]) is not None:
        change = f"{(cost['ppl_int4'] / cost['ppl_bf16'] - 1) * 100:+.2f} %"
        notes.append(f"int4 itself, against the unquantized model over {cost['tokens']} tokens (train.json): {change}")
    verdict = "equal under all three" if result["greedy_equal"] else f"differs for {len(result['different'])} prompts"
    prompt, text = next(iter(result["text"].items()))
    greedy = f"greedy text of {len(result['text'])} prompts: {verdict}; least lead {result['margin']:.2f}; one:"
    return Report((table, *notes, greedy, prompt + text))


def inspect_table(result: dict[str, Any]) -> Report:
    """The table of `inspect`: a row a distinct shape."""

    def kind(row: dict[str, Any]) -> str:
        return f"{row['group_size']}{'' if row['symmetric'] else ' asym'}{' act-order' if row['act_order'] else ''}"

    title = f"{result['architecture']}, {result['format']}, {result['weights']} int4 weights"
    table = per_item(title, result["shapes"], {
        "N x K": lambda row: f"{row['n']} x {row['k']}",
        "weights": lambda row: str(row["count"]),
        "group": kind,
        "int4 (GiB)": lambda row: gib(row["int4_bytes"]),
        "bf16 twins (GiB)": lambda row: gib(row["twin_bytes"]),
    })  # fmt: skip
    total = f"int4 {gib(result['int4_bytes'])} GiB, dense tensors {gib(result['dense_bytes'])} GiB"
    twins = f"all bf16 twins {gib(result['twin_bytes'])} GiB, KV cache {result['kv_bytes_per_token']:,} bytes a token"
    return Report((table, total, twins))


def check_table(result: dict[str, Any]) -> Report:
    """The table of `load-check`: a row a distinct shape that was checked."""
    table = per_item(f"{result['architecture']} on {result['device']}", result["checked"], {
        "weight": lambda row: row["name"],
        "N x K": lambda row: f"{row['n']} x {row['k']}",
        "twin": lambda row: row["twin"],
        "exact": lambda row: "yes" if row["exact"] else "NO",
        "rounded": lambda row: f"{row['rounded'] * 100:.2f} %" if row["rounded"] else "",
    })  # fmt: skip
    text = f"{result['weights']} int4 weights, {result['twins']} twins; logits of one forward pass finite: {result['finite']}"
    return Report((table, text))


def vllm_bench_table(result: dict[str, Any]) -> Report:
    """The table of `bench --engine vllm`: a row a point of the workload, off and on, with the gain."""
    work, off, on = result["workload"], result["arms"]["off"], result["arms"]["on"]
    records = {(r["mode"], r["prompt_tokens"], r["concurrency"]): r for r in result["records"]}
    # With one request at a time all of its tokens but the first are behind the last prompt.
    itl = any("itl" in r and r["concurrency"] > 1 for r in result["ratios"])
    rows: list[Row] = []
    for ratio in result["ratios"]:
        point = ratio["prompt_tokens"], ratio["concurrency"]
        arms = [records[arm, *point] for arm in ("off", "on")]
        ttft, tpot = ([f"{r[key]:,.{digits}f}" for r in arms] for key, digits in (("ttft_ms", 1), ("tpot_ms", 2)))
        gains = (f"{ratio['ttft']:.2f}x", f"{1 / ratio['tpot']:.2f}x")
        last = (f"{1 / ratio['itl']:.2f}x",) if itl else ()
        rows.append((f"{point[0]:,}", str(point[1]), *ttft, gains[0], *tpot, gains[1], *last))
    title = f"{result['records'][0]['model']}: {work['output_tokens']} tokens out, vLLM {result['environment']['vllm']}"
    columns = ("prompt", "at once", "TTFT off", "on (ms)", "gain", "TPOT off", "on (ms)", "gain", "ITL gain")
    lines = []
    if result["noise"]:
        drift = {key: max(abs(n[key] - 1) for n in result["noise"]) * 100 for key in ("ttft", "tpot")}
        lines.append(f"noise, off against itself: TTFT up to {drift['ttft']:.1f} %, TPOT up to {drift['tpot']:.1f} %")
    if itl:
        lines.append("ITL: as TPOT, of the request whose first token came last, behind all prompts")
    lines += [
        f"KV cache: {off['kv_tokens']:,} tokens off, {on['kv_tokens']:,} on",
        f"start-up: {off['startup_s']} s off, {on['startup_s']} s on",
    ]
    copies = f", {on['copies']} an int4 copy" if on.get("copies") else ""
    twins = f"{on['twins']} of {on['weights']} weights have a twin{copies}, {on['twin_gib']:.3f} GiB a rank"
    none = "no weight could have a twin (the server's log says which it left alone)"
    return Report((
        Table(title, columns if itl else columns[:-1], tuple(rows)),
        "\n".join(lines),
        none if on["weights"] == 0 else _routes(f"{twins}; paths by rows (M), per shape:", on["routes"]),
    ))  # fmt: skip


_SPEED = {
    "roofline": "prefill speed is a roofline of the GPU's figures, no measurement: real kernels stay below it. `off` stands "
    "there as if every call expanded its weights; an engine's own int4 kernel may be faster or slower, and by its times `soft` "
    "builds fewer twins, or none, where they are not worth their share of the KV cache",
    "measured": "prefill speed follows from stored measurements of this GPU's linear layers, and a roofline for attention",
}


def plan_table(result: dict[str, Any], only: str | None = None) -> Report:
    """Two tables, a row a mode and the budget's lines; then what does not fit, and what the figures rest on."""
    each = " on each" if result["tp"] > 1 else ""
    budget = Table(
        f"{result['model']} on {result['tp']} x {result['gpu']}, memory{each}",
        ("", "GiB"),
        tuple(
            (f"KV floor, {result['kv_floor_tokens']:,} tokens" if line == "KV floor" else line, gib(nbytes))
            for line, nbytes in result["budget"].items()
            if line != "in use by others"
        ),
    )
    rows = []
    for mode, found in result["modes"].items():
        if only in (None, mode) or mode == "off":
            speed = f"{found['prefill_tok_s']:,}" if found["prefill_tok_s"] else ""
            twins = f"{found['twins']} of {found['weights']}" + (f", {found['copies']} int4 copies" if found["copies"] else "")
            fits = "yes" if found["fits"] else "NO"
            rows.append((mode, twins, gib(found["twin_bytes"]), f"{found['kv_tokens']:,}", speed, fits))
    modes = Table("", ("mode", "twins", "twins (GiB)", "KV tokens", "prefill (tok/s)", "fits"), tuple(rows))
    lines = [
        *([workload_line(result["workload_from"], result["workload"])] if "workload_from" in result else []),
        f"prefill in steps of {result['max_num_batched_tokens']:,} tokens; decode reads int4 in every mode: at most "
        f"{result['decode_tok_s_bound']:,.0f} tok/s for one sequence by bandwidth",
        _SPEED[result["speed"]["source"]],
        *result["assumptions"],
    ]
    verdicts = [f"{mode}: {text}" for mode, text in result["verdicts"].items() if only is None and mode != "hard"]
    if only is None and "hard" in result["verdicts"] and "soft" not in result["verdicts"]:
        verdicts.append(f"hard: {result['verdicts']['hard']}")
    sizes = f", those of {result['workload_from']}" if "workload_from" in result else ""
    refused = [
        f"{mode}: {text}{sizes if text == NONE_PAYS else ''}"
        for mode, text in result["refused"].items()
        if only in (None, mode)
    ]
    return Report((budget, modes, *verdicts, *refused, *lines))


def workload_line(source: str, calls: list[list[float]]) -> str:
    """Rows of calls and their shares, the most frequent by ascending rows, and what the others are together."""
    most = sorted(sorted(calls, key=lambda call: -call[1])[:_SIZES])
    parts = [f"{rows:,} row{'s' if rows != 1 else ''} {share * 100:.3g} %" for rows, share in most]
    if len(calls) > _SIZES:
        parts.append(f"{len(calls) - _SIZES} other sizes {(1 - sum(share for _, share in most)) * 100:.3g} %")
    return f"workload from {source}: {', '.join(parts)}"


_SIZES = 6  # of a workload that are told one by one
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def tune_table(result: dict[str, Any]) -> Report:
    """A table a shape: time of every path by rows, the fastest marked; and the routes."""
    parts = [part for shape in result["shapes"] for part in (tune_shape(shape), tune_routes(shape))]
    return Report((*parts, *tune_closing(result)))


def tune_shape(shape: dict[str, Any]) -> Table:
    """A row a number of rows M, a column a path."""
    kind = f"group {shape['group_size']}{'' if shape['symmetric'] else ' asym'}{' act-order' if shape['act_order'] else ''}"
    weights = f"{shape['count']} weight{'s' if shape['count'] != 1 else ''}"
    title = f"{shape['n']} x {shape['k']}, {kind}, {weights} (us, * the fastest)"
    choices = list(shape["points"][0]["us"])
    rows = tuple(
        (str(p["m"]), *(("* " if c == p["winner"] else "") + _us(p["us"][c]) for c in choices)) for p in shape["points"]
    )
    return Table(title, ("M", *map(_named, choices)), rows)


def tune_routes(shape: dict[str, Any]) -> str:
    """Which path from how many rows, a line a kind of twin."""
    routes = shape["routes"].items()
    return "\n".join(f"  {'no twin' if name == 'none' else name}: {text}" for name, text in routes)


def tune_closing(result: dict[str, Any]) -> list[str]:
    """What was measured, where it is kept, and what the choices lose."""
    where = f"kept in {result['cache']}" if result["cache"] else "not kept"
    shapes = f"{len(result['shapes'])} shape{'s' if len(result['shapes']) != 1 else ''}"
    lines = [f"{result['device']['name']}: {shapes} in {result['seconds']} s, {where}"]
    if "regret" in result:
        found, points = result["regret"], result["points"]
        worst = max(points, key=lambda p: p["regret"], default=None)
        text = f"regret over {len(points)} points: geometric mean {found['geomean']:.3f}, worst {found['worst']:.3f}"
        if worst is not None:
            text += f" ({worst['n']} x {worst['k']} at M={worst['m']}: {worst['chosen']}, where {worst['best']} is best)"
        lines.append(text)
    return lines


def _named(choice: str) -> str:
    path, _, kind = choice.partition(":")
    return f"{path} {_SHORT.get(kind, kind)}".strip()


def _us(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
