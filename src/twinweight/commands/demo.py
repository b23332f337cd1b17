"""`twinweight demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinweight.commands.output import check_files, say, stamp, write_html, write_json
from twinweight.errors import ConfigError


def demo(
    model: Annotated[Path, typer.Option(help="the trained model that ships with the repository")] = Path("models/stdlib-15m"),
    build: Annotated[Path, typer.Option(help="directory for the synthetic model, demo.json and demo.html")] = Path("build"),
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 1024,
) -> None:
    """Show what a twin buys and what it costs: quality on a trained model, speed on a Qwen3-0.6B shape."""
    from twinweight import demo as demonstration
    from twinweight import pages, report

    demonstration.check_model(model)
    out, page, why = Console(), build / "demo.html", ""
    try:
        check_files(html=page)
    except ConfigError as error:  # a demo without matplotlib is still one
        why = str(error)
    check_files(build / "demo.json")
    with Console(stderr=True).status("quality of the trained model under int4, twin and both") as status:
        quality = demonstration.quality(model)
        out.print(report.quality_table(quality))
        out.print()
        status.update("writing and loading a synthetic Qwen3-0.6B")
        speed = demonstration.speed(
            build, repeats=repeats, prompt_tokens=prompt_tokens, step=lambda text: status.update(f"measuring {text}")
        )
    out.print(report.bench_table(speed))
    result = stamp({"environment": speed["environment"], "quality": quality, "bench": speed})
    write_json(out, build / "demo.json", result)
    if why:
        say(out, f"no {page}: {why}")
    else:
        write_html(out, page, pages.demo_page(result))
